"""ZeRO 3 (Rajbhandari et al. 2020, arXiv:1910.02054) through PyTorch's FSDP2: weights are sharded over replicas too.

A unit (a block; its experts; the stage with all that is in no block) is gathered before it runs and again before its
backward, whose gradients are summed into this rank's rows at once, after every microbatch. FSDP2 decides when; what
moves goes through the one door. Along the mesh axis shard ranks share out one copy of the weights, along copy they hold
the same (HSDP); experts are shared out along edp, by all ranks that hold the same ones.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megalite.comm import Communicator
from megalite.mesh import Mesh
from megalite.parallel.data import Gradients, Piece, unowned
from megalite.parallel.parameter import Placement, attach, declaration, dtype_of, initial_values, local, placement
from megalite.precision import Precision


def shard_fully(
    stage: nn.Module,
    units: Sequence[tuple[nn.Module, str]],
    comm: Communicator,
    device: torch.device,
    seed: int,
    precision: Precision,
) -> None:
    """Shard every weight of `stage` by rows over the mesh axis shard and give it initial values.

    The stage comes from the meta device, so a rank never holds more than its rows. `units`: modules of it that are
    gathered alone, the inner ones first, and the mesh axis that each is shared out along. Rows are in
    `precision.main`, whole weights in `precision.compute`. What has no gradient stays whole.
    """
    meshes = {
        axis: DeviceMesh.from_group(comm.mesh.group(axis) or comm.mesh.alone(), device.type)
        for axis in ("shard", *dict.fromkeys(axis for _, axis in units if axis != "shard"))
    }
    states = {p for p in stage.parameters() if not p.requires_grad}
    mixed = MixedPrecisionPolicy(precision.compute, precision.main, cast_forward_inputs=False)
    known = {name: (declaration(p), placement(p)) for name, p in stage.named_parameters()}
    stage.to(precision.main)
    for module, axis in (*units, (stage, "shard")):
        sharded = fully_shard(module, mesh=meshes[axis], mp_policy=mixed, ignored_params=states)
        sharded.set_custom_all_gather(_Gather(comm, axis))  # type: ignore[arg-type]
        sharded.set_custom_reduce_scatter(_Reduce(comm, axis))  # type: ignore[arg-type]
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    stage.to_empty(device=device)
    for name, parameter in stage.named_parameters():
        declared, whole = known[name]
        placed = rows_of(whole, comm.mesh) if parameter.requires_grad else whole
        attach(parameter, declared, placed)
        values = initial_values(declared, name, seed, placed)
        local(parameter).copy_(values.to(dtype_of(declared, precision.compute)))


def rows_of(whole: Placement, mesh: Mesh) -> Placement:
    """This rank's rows of a part of a logical tensor, as FSDP2 cuts it: equally many, fewer or none at the end."""
    axis, copies = ("shard", ("copy",)) if whole.replicas != ("edp",) else ("edp", ())
    rows, ranks, place = whole.shape[0], mesh.size(axis), mesh.index(axis)
    each = -(-rows // ranks)
    start, stop = min(rows, place * each), min(rows, (place + 1) * each)
    offsets, shape = (whole.offsets[0] + start, *whole.offsets[1:]), (stop - start, *whole.shape[1:])
    return replace(whole, offsets=offsets, shape=shape, replicas=copies)


class LocalWeights(nn.Module):
    """This rank's rows of a stage, under the same names, as parameters of their own in the same memory."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.sharded = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
        self.rows = {name: nn.Parameter(local(parameter)) for name, parameter in self.sharded.items()}
        for name, parameter in self.sharded.items():
            attach(self.rows[name], declaration(parameter), placement(parameter))

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.rows.items()


class ShardedGradients(Gradients):
    """Gradients of fully sharded stages: FSDP2 adds each microbatch's sum over shard onto this rank's rows in our
    buckets, which are then summed over copy, as soon as a bucket has all of the step.

    `of` and `full` give a rank's rows, which is its part of a sharded parameter.
    """

    def __init__(
        self, stages: Sequence[nn.Module], comm: Communicator, precision: Precision, bucket_bytes: float
    ) -> None:
        weights = [LocalWeights(stage) for stage in stages]
        self.stages = stages
        super().__init__(weights, comm, precision.main, bucket_bytes)
        self.compute = precision.compute
        self._rows = {whole: of.rows[name] for of in weights for name, whole in of.sharded.items()}
        for sharded, rows in self._rows.items():
            sharded.grad = _like(sharded, self.of(sharded))
            sharded.register_post_accumulate_grad_hook(partial(unowned(self._reduced), rows))

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        return super().of(self._rows[parameter])

    def full(self, parameter: nn.Parameter) -> torch.Tensor:
        return super().full(self._rows[parameter])

    def zero(self) -> None:
        """As of `Gradients`. What an evaluation, which has no backward, left gathered is dropped."""
        super().zero()
        for stage in self.stages:
            _sharded(stage).reshard()

    def pieces(self) -> list[Piece]:
        """As of `Gradients`; a rank may have no row of a small parameter."""
        return [piece for piece in super().pieces() if piece.start < piece.stop]

    @contextmanager
    def accumulating(self, chunk: int = 0, last: bool = False, complete: bool = True) -> Iterator[None]:
        """As of `Gradients`. The stage's own weights come back first: the loss reads the head's outside of modules."""
        assert complete, "a weight gradient put off would miss its reduction"
        _sharded(self.stages[chunk]).unshard()
        with super().accumulating(chunk, last):
            yield

    def _reduced(self, rows: nn.Parameter, _: torch.Tensor) -> None:
        self._arrived(rows)


def _sharded(stage: nn.Module) -> FSDPModule:
    assert isinstance(stage, FSDPModule)
    return stage


def _like(sharded: nn.Parameter, rows: torch.Tensor) -> DTensor:
    """`rows` of this rank as a tensor that is sharded as a parameter is."""
    assert isinstance(sharded, DTensor)
    where, shape, stride = (sharded.device_mesh, sharded.placements), sharded.shape, sharded.stride()
    return DTensor.from_local(rows, *where, run_check=False, shape=shape, stride=stride)


class _Door:
    """What FSDP2 asks of a collective of one's own."""

    def __init__(self, comm: Communicator, axis: str) -> None:
        self.comm, self.axis = comm, axis

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Door):
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        return self.comm.all_gather_into(output_tensor, input_tensor, self.axis, async_op=async_op)


class _Reduce(_Door):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        assert op == dist.ReduceOp.SUM, f"gradients are sums, not {op}"
        return self.comm.reduce_scatter_into(output_tensor, input_tensor, self.axis, async_op=async_op)
