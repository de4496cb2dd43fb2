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
from torch.distributed.tensor import DTensor, Shard

from megalite.comm import Communicator
from megalite.mesh import Mesh
from megalite.parallel.data import Gradients, Piece, unowned
from megalite.parallel.fp8_gather import Part, Products, gather_codes, parts_of
from megalite.parallel.parameter import Placement, attach, declaration, dtype_of, initial_values, local, placement
from megalite.precision import Precision


def shard_fully(
    stage: nn.Module,
    units: Sequence[tuple[nn.Module, str]],
    comm: Communicator,
    device: torch.device,
    seed: int,
    precision: Precision,
    products: Products | None = None,
) -> None:
    """Shard every weight of `stage` by rows over the mesh axis shard and give it initial values.

    The stage comes from the meta device, so a rank never holds more than its rows. `units`: modules of it that are
    gathered alone, the inner ones first, and the mesh axis that each is shared out along. Rows are in
    `precision.main`, whole weights in `precision.compute`. What has no gradient stays whole. `products`: the weights
    that travel as codes of FP8.
    """
    groups = {axis: comm.mesh.group(axis) or comm.mesh.alone() for axis in ("shard", "edp")}
    meshes = {axis: DeviceMesh.from_group(groups[axis], device.type) for axis in {"shard", *(a for _, a in units)}}
    states = {p for p in stage.parameters() if not p.requires_grad}
    mixed = MixedPrecisionPolicy(precision.compute, precision.accumulate, cast_forward_inputs=False)
    known = {name: (declaration(p), placement(p)) for name, p in stage.named_parameters()}
    stage.to(precision.main)
    dims = {p: cut_along(placement(p), comm.mesh) for p in stage.parameters()}

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(dims[parameter])

    for module, axis in (*units, (stage, "shard")):
        sharded = fully_shard(
            module, mesh=meshes[axis], mp_policy=mixed, ignored_params=states, shard_placement_fn=place
        )
        parts = parts_of(sharded, products) if products else []
        sharded.set_custom_all_gather(_Gather(comm, axis, parts))  # type: ignore[arg-type]
        sharded.set_custom_reduce_scatter(_Reduce(comm, axis, precision.communicate))  # type: ignore[arg-type]
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    stage.to_empty(device=device)
    for name, parameter in stage.named_parameters():
        declared, whole = known[name]
        placed = rows_of(whole, comm.mesh) if parameter.requires_grad else whole
        attach(parameter, declared, placed)
        values = initial_values(declared, name, seed, placed)
        local(parameter).copy_(values.to(dtype_of(declared, precision.compute)))


def cut_along(whole: Placement, mesh: Mesh) -> int:
    """The dimension along which FSDP2 cuts a part of a logical tensor: rows; of experts that are fewer than the ranks
    that share them, the rows of each where those divide."""
    ranks = mesh.size("edp")
    few = whole.replicas == ("edp",) and whole.shape[0] % ranks > 0
    return 1 if few and len(whole.shape) > 1 and whole.shape[1] % ranks == 0 else 0


def rows_of(whole: Placement, mesh: Mesh) -> Placement:
    """This rank's rows of a part of a logical tensor, as FSDP2 cuts it: equally many, fewer or none at the end."""
    axis, copies = ("shard", ("copy",)) if whole.replicas != ("edp",) else ("edp", ())
    dim, ranks, place = cut_along(whole, mesh), mesh.size(axis), mesh.index(axis)
    each = -(-whole.shape[dim] // ranks)
    start, stop = (min(whole.shape[dim], n * each) for n in (place, place + 1))
    offsets, shape = list(whole.offsets), list(whole.shape)
    offsets[dim], shape[dim] = offsets[dim] + start, stop - start
    return replace(whole, offsets=tuple(offsets), shape=tuple(shape), replicas=copies)


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

    lent = True  # to FSDP2

    def __init__(
        self, stages: Sequence[nn.Module], comm: Communicator, precision: Precision, bucket_bytes: float
    ) -> None:
        weights = [LocalWeights(stage) for stage in stages]
        self.stages = stages
        super().__init__(weights, comm, precision.accumulate, bucket_bytes, communicate=precision.communicate)
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
        self._count(self._slots[rows][0], rows)


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
    def __init__(self, comm: Communicator, axis: str, parts: Sequence[Part]) -> None:
        super().__init__(comm, axis)
        self.parts = parts if any(part.fp8 is not None for part in parts) else []

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        if self.parts:
            return gather_codes(self.comm, self.axis, self.parts, output_tensor, input_tensor)
        return self.comm.all_gather_into(output_tensor, input_tensor, self.axis, async_op=async_op)


class _Reduce(_Door):
    def __init__(self, comm: Communicator, axis: str, wire: torch.dtype) -> None:
        super().__init__(comm, axis)
        self.wire = wire

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        assert op == dist.ReduceOp.SUM, f"gradients are sums, not {op}"
        where = output_tensor, input_tensor, self.axis
        return self.comm.reduce_scatter_into(*where, async_op=async_op, wire=self.wire)
