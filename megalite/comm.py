"""The one door for communication: every collective of the engine goes through here, over mesh axes by name.

So each call can be counted, timed, faked or checked in one place: attach a recorder and read the stream of `Call`s.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megalite.errors import RunError, UserError
from megalite.mesh import AXES, Mesh


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

    def barrier(self) -> None:
        """Wait for every rank of the world."""
        self.all_reduce(torch.zeros(1), *AXES)

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value on every rank. JSON, not pickle: nothing a peer sends can run code."""
        if self.mesh.world_size == 1:
            return value
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([payload.numel()])
        self.broadcast(length, *AXES)
        if self.mesh.rank != 0:
            payload = torch.empty(int(length), dtype=torch.uint8)
        self.broadcast(payload, *AXES)
        return json.loads(payload.numpy().tobytes())

    def on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and hand its (JSON) result to all; its UserError is raised on every rank."""
        outcome: dict[str, Any] = {}
        if self.mesh.rank == 0:
            try:
                outcome = {"result": work()}
            except UserError as error:
                outcome = {"error": list(error.lines), "code": error.exit_code}
        outcome = self.broadcast_json(outcome)
        if "error" in outcome:
            kind = RunError if outcome["code"] == RunError.exit_code else UserError
            failure = kind(*outcome["error"])
            failure.on_every_rank = True
            raise failure
        return outcome["result"]
