"""AdamW, and the norm of gradients, over many tensors in one launch.

An optimizer's tensors are many and lie anywhere: weights and moments each in memory of their own, gradients in views of
flat buckets. A table of their addresses goes to the device once, when a set of tensors is first seen, and not again
while they stay where they are. The count of steps, the factor on gradients and the decision to skip are read on the
device, so a step needs no word from it.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch
from megalite_kernels.reference.optim import bias_corrections

BLOCK = 2048
"""Elements of a program."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def config(chip: Chip) -> dict[str, int]:
    """8 elements a thread."""
    return {"BLOCK": BLOCK, "num_warps": BLOCK // (8 * chip.warp)}


class Table(NamedTuple):
    """Where the tensors of several lists are that run in parallel."""

    addresses: Tensor
    """int64 [lists, tensors]."""
    sizes: Tensor
    """int64 [tensors]: elements."""
    owners: Tensor
    """int32 [programs]: the tensor that a program works on."""
    firsts: Tensor
    """int32 [tensors]: the first program of each."""
    aligned: bool
    """All addresses and sizes are multiples of 16: then 16 bytes move at once."""


def table(*lists: Sequence[Tensor]) -> Table:
    """The table of lists of contiguous tensors, kept for the next time."""
    addresses = tuple(tuple(x.data_ptr() if x.numel() else 0 for x in one) for one in lists)
    return _table(addresses, tuple(x.numel() for x in lists[0]), lists[0][0].device)


@functools.lru_cache(maxsize=64)
def _table(addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device) -> Table:
    owners: list[int] = []
    firsts = []
    for number, size in enumerate(sizes):
        firsts.append(len(owners))
        owners += [number] * triton.cdiv(size, BLOCK)
    return Table(
        torch.tensor(addresses, dtype=torch.int64).to(device),
        torch.tensor(sizes, dtype=torch.int64).to(device),
        torch.tensor(owners, dtype=torch.int32).to(device),
        torch.tensor(firsts, dtype=torch.int32).to(device),
        all(number % 16 == 0 for numbers in (*addresses, sizes) for number in numbers),
    )


@triton.jit
def _place(sizes_ptr, owners_ptr, firsts_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """(the tensor of this program, the elements here, how many the tensor has)."""
    owner = tl.load(owners_ptr + tl.program_id(0))
    chunk = tl.program_id(0) - tl.load(firsts_ptr + owner)
    place = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.load(sizes_ptr + owner)
    if ALIGNED:
        size = size // 16 * 16  # as it is, but now the compiler knows
    return owner, place, size


@triton.jit
def _pointer(addresses_ptr, number, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(addresses_ptr + number).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _adamw(
    addresses_ptr, sizes_ptr, owners_ptr, firsts_ptr, corrections_ptr, scale_ptr, skip_ptr, tensors, lr, kept, beta2,
    rest1, rest2, eps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, COPY: tl.constexpr, SCALE: tl.constexpr,
    SKIP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    owner, place, size = _place(sizes_ptr, owners_ptr, firsts_ptr, ALIGNED, BLOCK)
    if SKIP:
        size = tl.where(tl.load(skip_ptr) == 0, size, 0)
    inside = place < size
    p_ptr = _pointer(addresses_ptr, owner, PARAM, ALIGNED) + place
    g_ptr = _pointer(addresses_ptr, owner + tensors, GRAD, ALIGNED) + place
    m_ptr = _pointer(addresses_ptr, owner + 2 * tensors, MOMENT, ALIGNED) + place
    v_ptr = _pointer(addresses_ptr, owner + 3 * tensors, MOMENT, ALIGNED) + place
    p = tl.load(p_ptr, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        g *= tl.load(scale_ptr)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    spread = tl.div_rn(tl.sqrt_rn(v), tl.load(corrections_ptr + 1)) + eps
    p = p * kept - tl.div_rn(lr, tl.load(corrections_ptr)) * tl.div_rn(m, spread)
    tl.store(p_ptr, p.to(PARAM), mask=inside)
    tl.store(m_ptr, m.to(MOMENT), mask=inside)
    tl.store(v_ptr, v.to(MOMENT), mask=inside)
    if COPY is not None:
        copy_ptr = _pointer(addresses_ptr, owner + 4 * tensors, COPY, ALIGNED) + place
        tl.store(copy_ptr, p.to(COPY), mask=inside)


@triton.jit
def _squares(
    addresses_ptr, sizes_ptr, owners_ptr, firsts_ptr, sums_ptr, TYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    owner, place, size = _place(sizes_ptr, owners_ptr, firsts_ptr, ALIGNED, BLOCK)
    inside = place < size
    x_ptr = _pointer(addresses_ptr, owner, TYPE, ALIGNED) + place
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(x * x, axis=0))


def step(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor], steps: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    grad_scale: Tensor | None, skip: Tensor | None, chip: Chip | None = None,
) -> None:  # fmt: skip
    """One step in place; the tensors of a list are of one dtype, and contiguous."""
    if not params:
        return
    steps += 1 if skip is None else 1 - skip.to(steps.dtype)
    corrections = torch.stack(bias_corrections(steps, (beta1, beta2))).float()
    lists = (params, grads, exp_avgs, exp_avg_sqs, copies) if copies else (params, grads, exp_avgs, exp_avg_sqs)
    where = table(*lists)
    scale = corrections if grad_scale is None else grad_scale.float()
    launch(
        _adamw, (where.owners.numel(),), *where[:4], corrections, scale,
        corrections if skip is None else skip.float(), len(params), lr, 1 - lr * weight_decay, beta2, 1 - beta1,
        1 - beta2, eps, PARAM=TYPES[params[0].dtype], GRAD=TYPES[grads[0].dtype], MOMENT=TYPES[exp_avgs[0].dtype],
        COPY=TYPES[copies[0].dtype] if copies else None, SCALE=grad_scale is not None, SKIP=skip is not None,
        ALIGNED=where.aligned, reaches=[x for one in lists for x in one], **config(chip or chip_of(steps.device)),
    )  # fmt: skip


def norm(tensors: Sequence[Tensor], chip: Chip | None = None) -> Tensor:
    """√ Σ x² in float64: every program's sum in float32, those in float64."""
    where = table(tensors)
    sums = tensors[0].new_empty(where.owners.numel(), dtype=torch.float32)
    launch(
        _squares, (where.owners.numel(),), *where[:4], sums, TYPE=TYPES[tensors[0].dtype], ALIGNED=where.aligned,
        reaches=tensors, **config(chip or chip_of(sums.device)),
    )  # fmt: skip
    return sums.double().sum().sqrt()


@custom_op("megalite::triton_adamw", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies", "steps"))
def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor], steps: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    grad_scale: Tensor | None, skip: Tensor | None,
) -> None:  # fmt: skip
    step(
        params, grads, exp_avgs, exp_avg_sqs, copies, steps, lr, beta1, beta2, eps, weight_decay, grad_scale, skip
    )  # fmt: skip


@custom_op("megalite::triton_gradient_norm", mutates_args=())
def gradient_norm(tensors: Sequence[Tensor]) -> Tensor:
    return norm([x.contiguous() for x in tensors])


@gradient_norm.register_fake
def _(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)
