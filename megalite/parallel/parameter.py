"""The one declaration a parameter makes of itself: logical shape, role, initial values, and how mesh axes split it.

Initialisation, checkpoints, Hugging Face exchange, gradient norms and optimizers read the declaration; none of them
matches parameter names. Initial values depend on the seed and the logical name alone, never on layout, rank or device.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from megalite.mesh import Mesh

Role = Literal["matrix", "embedding", "head", "position", "norm", "bias", "router", "expert", "state"]
"""expert: [experts, rows, columns]. state: moved by rules of its own after a step, not by a gradient."""
Sees = Literal["tokens", "heads", "own"]
BLOCK_ROWS = 1024
"""Rows drawn from one random stream: a rank that holds some rows only draws the blocks it needs."""


@dataclass(frozen=True)
class Declaration:
    """`shape`: logical (unsharded). `std`: of normal initial values; 0: `constant`. `shard`: mesh axis -> dim.

    `sees`: what one rank of a tp group applies a parameter to that is not sharded over tp: "tokens" of the residual
    stream (all of them, or its part under sequence parallelism), or its own "heads", or its "own" part of the tokens in
    any case (then its gradient is always a term of a sum over tp). Of an expert's parameter: over etp.
    """

    shape: tuple[int, ...]
    role: Role
    std: float = 0.0
    constant: float = 0.0
    shard: Mapping[str, int] = field(default_factory=dict)
    sees: Sees = "tokens"


@dataclass(frozen=True)
class Placement:
    """This rank's part of a logical tensor, and who else has what of it.

    The part is the box `offsets`, `shape` of the logical tensor. `replicas`: mesh axes whose ranks hold the same part
    but see other samples or positions, so that gradients are summed over them. `partial`: further axes to sum over.
    `tied`: places along pp of all stages that hold a copy; their gradients are summed too. `counted`: this rank's copy
    is the one that a norm counts and a checkpoint stores (leaving the replicas aside).
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    replicas: tuple[str, ...] = ("dp", "cp")
    partial: tuple[str, ...] = ()
    tied: tuple[int, ...] = ()
    counted: bool = True


def declare(
    *shape: int,
    role: Role,
    std: float = 0.0,
    constant: float = 0.0,
    shard: Mapping[str, int] | None = None,
    sees: Sees = "tokens",
) -> nn.Parameter:
    """A parameter on torch's current default device and dtype (meta while a model is built), with its declaration."""
    declared = Declaration(tuple(shape), role, std, constant, dict(shard or {}), sees)
    return attach(torch.empty(*shape), declared, Placement((0,) * len(shape), tuple(shape)))


def attach(values: torch.Tensor, declared: Declaration, placed: Placement) -> nn.Parameter:
    """The values as a parameter, with what it declares and where it lies; for parameters made outside of `declare`."""
    trained = declared.role != "state"
    parameter = values if isinstance(values, nn.Parameter) else nn.Parameter(values, requires_grad=trained)
    parameter.declaration, parameter.placement = declared, placed  # type: ignore[attr-defined]
    return parameter


def declaration(parameter: nn.Parameter) -> Declaration:
    return parameter.declaration  # type: ignore[attr-defined]


def placement(parameter: nn.Parameter) -> Placement:
    return parameter.placement  # type: ignore[attr-defined]


def local(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter that are here, live: its rows where FSDP2 shards it, else all."""
    values = parameter.detach()
    return values.to_local() if hasattr(values, "to_local") else values


def part(size: int, ranks: int, index: int) -> tuple[int, int]:
    """[start, stop) of the `index`-th of `ranks` nearly equal parts of `size`; equal where `ranks` divides it."""
    return size * index // ranks, size * (index + 1) // ranks


def place(declared: Declaration, mesh: Mesh, sp: bool, tied: Sequence[int] = ()) -> Placement:
    """Where this rank's part lies. `sp`: the residual stream is spread over tp. `tied`: pp places with a copy."""
    offsets, shape = [0] * len(declared.shape), list(declared.shape)
    for axis, dim in declared.shard.items():
        start, stop = part(declared.shape[dim], mesh.size(axis), mesh.index(axis))
        offsets[dim], shape[dim] = start, stop - start
    # Experts see the ranks of a stage folded anew.
    split, replicas = ("etp", ("edp",)) if "ep" in declared.shard else ("tp", ("dp", "cp"))
    whole = split not in declared.shard and mesh.size(split) > 1
    partial = (split,) if whole and (sp or declared.sees != "tokens") else ()
    counted = not (whole and mesh.index(split) > 0) and (not tied or mesh.index("pp") == tied[0])
    return Placement(tuple(offsets), tuple(shape), replicas, partial, tuple(tied), counted)


def shard_parameters(
    modules: Iterable[nn.Module], mesh: Mesh, sp: bool, tied: Mapping[nn.Parameter, Sequence[int]]
) -> None:
    """Cut every parameter of modules on the meta device down to this rank's part."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in {owner: None for module in modules for owner in module.modules()}:  # once, also where stages share it
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            if parameter not in made:
                declared = declaration(parameter)
                placed = place(declared, mesh, sp, tied.get(parameter, ()))
                made[parameter] = attach(parameter.new_empty(placed.shape), declared, placed)
            owner._parameters[name] = made[parameter]


def declared_parameters(
    modules: nn.Module | Iterable[nn.Module],
) -> Iterator[tuple[str, nn.Parameter, Declaration]]:
    """(logical name, parameter, declaration) in definition order; a tied parameter once, under its first name."""
    seen: set[nn.Parameter] = set()
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        for name, parameter in module.named_parameters():
            if parameter not in seen:
                seen.add(parameter)
                yield name, parameter, declaration(parameter)


def initial_values(declared: Declaration, name: str, seed: int, placed: Placement | None = None) -> torch.Tensor:
    """Initial values of this rank's part (default: of the whole logical tensor), float32 on the CPU."""
    box = placed or Placement((0,) * len(declared.shape), declared.shape)
    if declared.std == 0.0:
        return torch.full(box.shape, declared.constant)
    values = torch.empty(box.shape)
    first, rows = box.offsets[0], box.shape[0]
    columns = tuple(slice(o, o + n) for o, n in zip(box.offsets[1:], box.shape[1:], strict=True))
    each = BLOCK_ROWS if len(declared.shape) < 3 else 1  # one expert
    for block in range(first // each, -(-(first + rows) // each)):
        start, stop = block * each, min((block + 1) * each, declared.shape[0])
        digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        drawn = torch.empty(stop - start, *declared.shape[1:]).normal_(0.0, declared.std, generator=generator)
        low, high = max(start, first), min(stop, first + rows)
        values[low - first : high - first] = drawn[low - start : high - start][(slice(None), *columns)]
    return values


def dtype_of(declared: Declaration, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter of a model in `dtype`: what adds up small steps without main weights stays wide."""
    return torch.promote_types(dtype, torch.float32) if declared.role == "state" else dtype


@torch.no_grad()
def materialize(modules: nn.Module | Sequence[nn.Module], device: torch.device, seed: int, dtype: torch.dtype) -> None:
    """Move modules built on the meta device to `device`, each parameter in `dtype` with its initial values."""
    modules = [modules] if isinstance(modules, nn.Module) else modules
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in (owner for module in modules for owner in module.modules()):
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_meta:
                if parameter not in made:
                    declared = declaration(parameter)
                    empty = torch.empty(parameter.shape, device=device, dtype=dtype_of(declared, dtype))
                    made[parameter] = attach(empty.detach(), declared, placement(parameter))
                owner._parameters[name] = made[parameter]
    for name, parameter, declared in declared_parameters(modules):
        parameter.copy_(initial_values(declared, name, seed, placement(parameter)))
