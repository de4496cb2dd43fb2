"""The one door for communication: every collective of the engine goes through here, over mesh axes by name.

So each call can be counted, timed, faked or checked in one place: attach a recorder and read the stream of `Call`s.
torch's distributed checkpoint, a library, has small ones of its own while it plans who writes what.
"""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megalite.errors import RunError, UserError
from megalite.mesh import AXES, Mesh
from megalite.world import wait_for_rank_zero


@dataclass(frozen=True)
class Call:
    """One collective as this rank saw it. `bytes` is the size of the payload this rank hands in."""

    op: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int


class Communicator:
    """Collectives over the axes of a mesh. A group of one rank returns at once and records nothing."""

    def __init__(self, mesh: Mesh, record: Callable[[Call], None] | None = None) -> None:
        self.mesh = mesh
        self.record = record
        self._waits = 0

    def _enter(self, op: str, axes: tuple[str, ...], tensor: torch.Tensor) -> dist.ProcessGroup | None:
        group = self.mesh.group(*axes)
        if group is not None and self.record is not None:
            self.record(
                Call(op, axes, str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.element_size())
            )
        return group

    def all_reduce(self, tensor: torch.Tensor, *axes: str, op: str = "sum", async_op: bool = False) -> dist.Work | None:
        """Reduce in place ("sum" or "max"). With `async_op` the caller waits on the handle (None: nothing to do)."""
        group = self._enter(f"all_reduce_{op}", axes, tensor)
        if group is None:
            return None
        reduce_op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        work = dist.all_reduce(tensor, reduce_op, group, async_op)
        return work if async_op else None

    def broadcast(self, tensor: torch.Tensor, *axes: str) -> None:
        """Copy from the group's first rank, in place."""
        group = self._enter("broadcast", axes, tensor)
        if group is not None:
            dist.broadcast(tensor, self.mesh.ranks(*axes)[0], group)

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value on every rank; as JSON, which cannot carry code as a pickle can."""
        if self.mesh.world_size == 1:
            return value
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([payload.numel()])
        self.broadcast(length, *AXES)
        if self.mesh.rank != 0:
            payload = torch.empty(int(length), dtype=torch.uint8)
        self.broadcast(payload, *AXES)
        return json.loads(payload.numpy().tobytes())

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank; as JSON."""
        if self.mesh.world_size == 1:
            return [value]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.mesh.world_size, dtype=torch.int64)
        lengths[self.mesh.rank] = payload.numel()
        self.all_reduce(lengths, *AXES)
        padded = torch.zeros(self.mesh.world_size, int(lengths.max()), dtype=torch.uint8)
        padded[self.mesh.rank, : payload.numel()] = payload
        self.all_reduce(padded, *AXES)
        return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(padded, lengths.tolist(), strict=True)]

    def on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and hand its (JSON) result to all; its failure is raised on every rank.

        The others wait at the store, not inside a collective: such work (building data) may outlast a group's timeout.
        """
        outcome: dict[str, Any] = {}
        self._waits += 1
        if self.mesh.rank == 0:
            try:
                outcome = {"result": work()}
            except UserError as error:
                outcome = {"error": list(error.lines), "code": error.exit_code}
            except Exception as error:
                traceback.print_exc()
                outcome = {"error": [f"rank 0 failed: {type(error).__name__}: {error}"], "code": RunError.exit_code}
        if self.mesh.world_size > 1:
            wait_for_rank_zero(f"work{self._waits}", self.mesh.rank)
        outcome = self.broadcast_json(outcome)
        if "error" in outcome:
            kind = RunError if outcome["code"] == RunError.exit_code else UserError
            failure = kind(*outcome["error"])
            failure.on_every_rank = True
            raise failure
        return outcome["result"]
