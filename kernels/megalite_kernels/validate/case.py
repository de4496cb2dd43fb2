"""What an op must do, as data: the cases that tests run here, and validation on a GPU too."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.gpu.chips import Chip

Outputs = Any
"""A tensor, or a tuple of them."""
NARROW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Traffic:
    """Bytes and floating-point operations of products, forward and backward together."""

    loaded: int
    stored: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One op on one set of inputs.

    `inputs()`: float64 tensors, which are rounded to each dtype and differentiated, and tensors of other dtypes, which
    pass as they are. `call(*inputs, backend=…)` runs the op. `plain`: the formula as PyTorch computes it in
    its inputs' dtype, the yardstick of errors; None: the reference. `traffic`: what a float32 run must move and
    multiply, by a formula over the shapes.
    """

    op: str
    name: str
    inputs: Callable[[], Sequence[Tensor | None]]
    call: Callable[..., Outputs]
    plain: Callable[..., Outputs] | None = None
    dtypes: tuple[torch.dtype, ...] = NARROW
    traffic: Traffic | None = None

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


@dataclass(frozen=True)
class Sweep:
    """Launches of one op at a shape that people train with: `run(chip)` calls its wrappers on meta tensors."""

    op: str
    name: str
    run: Callable[[Chip], object]
    products: bool = False
    """Whether the op multiplies tiles, and so must use tensor cores."""
    spills: dict[str, int] = field(default_factory=dict)
    """Chip -> bytes of registers that a kernel may spill there all the same: listed, not hidden."""
    moves: Traffic | None = None
    """Bytes and operations that the op needs at least at this shape, for its roofline."""
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


@dataclass(frozen=True)
class Far:
    """An op on tensors of more than 2³¹ elements, whose memory is asked for and hardly touched."""

    op: str
    run: Callable[[], object]

    def __str__(self) -> str:
        return self.op


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal float64 numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
