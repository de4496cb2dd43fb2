"""The one declaration a parameter makes of itself: logical shape, role, initial values, and how mesh axes split it.

Initialisation, checkpoints, Hugging Face exchange, gradient norms and optimizers read the declaration; none of them
matches parameter names. Initial values depend on the seed and the logical name alone, never on layout, rank or device.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

Role = Literal["matrix", "embedding", "head", "position", "norm", "bias"]
BLOCK_ROWS = 1024
"""Rows drawn from one random stream: a rank that holds some rows only draws the blocks it needs."""


@dataclass(frozen=True)
class Declaration:
    """`shape`: logical (unsharded). `std`: of normal initial values; 0: `constant`. `shard`: mesh axis -> dim."""

    shape: tuple[int, ...]
    role: Role
    std: float = 0.0
    constant: float = 0.0
    shard: Mapping[str, int] = field(default_factory=dict)


def declare(
    *shape: int, role: Role, std: float = 0.0, constant: float = 0.0, shard: Mapping[str, int] | None = None
) -> nn.Parameter:
    """A parameter on torch's current default device and dtype (meta while a model is built), with its declaration."""
    parameter = nn.Parameter(torch.empty(*shape))
    parameter.declaration = Declaration(tuple(shape), role, std, constant, dict(shard or {}))  # type: ignore[attr-defined]
    return parameter


def declaration(parameter: nn.Parameter) -> Declaration:
    return parameter.declaration  # type: ignore[attr-defined]


def declared_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Declaration]]:
    """(logical name, parameter, declaration) in definition order; a tied parameter once, under its first name."""
    for name, parameter in module.named_parameters():
        yield name, parameter, declaration(parameter)


def initial_values(declared: Declaration, name: str, seed: int) -> torch.Tensor:
    """The logical tensor's initial values, float32 on the CPU."""
    if declared.std == 0.0:
        return torch.full(declared.shape, declared.constant)
    values = torch.empty(declared.shape)
    for start in range(0, declared.shape[0], BLOCK_ROWS):
        digest = hashlib.blake2b(f"{seed}/{name}/{start // BLOCK_ROWS}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        values[start : start + BLOCK_ROWS].normal_(0.0, declared.std, generator=generator)
    return values


@torch.no_grad()
def materialize(module: nn.Module, device: torch.device, seed: int, dtype: torch.dtype) -> None:
    """Move a module built on the meta device to `device`, each parameter in `dtype` with its initial values."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_meta:
                empty = nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype))
                empty.declaration = declaration(parameter)  # type: ignore[attr-defined]
                owner._parameters[name] = empty
    for name, parameter, declared in declared_parameters(module):
        parameter.copy_(initial_values(declared, name, seed))
