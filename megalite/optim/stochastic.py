"""Weights and moments kept in bfloat16 without wider copies: updates are computed in float32 and rounded up or down at
random, with the chance that makes the mean right (Gupta et al. 2015, arXiv:1502.02551). Rounded to nearest instead, an
update below half a step of the weight would be lost every time.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from megalite_kernels import reference
from torch import Tensor

from megalite.parallel.data import Piece

CHUNK = 2**20
"""Elements updated at once, which bounds what is held in float32."""
_WORD = 2**64


def _signed(word: int) -> int:
    return (word % _WORD) - _WORD * (word % _WORD >= _WORD // 2)


def _mixed(z: Tensor, shift: int, factor: int) -> Tensor:
    """(z ⊕ z >> shift) · factor of unsigned 64-bit numbers, which torch only has as signed ones."""
    low = (z >> shift) & ((1 << (64 - shift)) - 1)
    return (z ^ low) * _signed(factor)


def random_bits(key: str, index: Tensor) -> Tensor:
    """16 random bits for each int64 `index`, int32: SplitMix64 (Steele et al. 2014) of a counter that starts where the
    digest of `key` says. They depend on key and index alone, so on no layout and on no call before."""
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    z = index * _signed(0x9E3779B97F4A7C15) + start
    z = _mixed(z, 30, 0xBF58476D1CE4E5B9)
    z = _mixed(z, 27, 0x94D049BB133111EB)
    return ((z >> 48) & 0xFFFF).int()


def round_stochastically(wide: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16, away from zero with the chance of the fraction that is cut off; `bits`: 16 a number. inf and
    NaN stay."""
    moved = (wide.contiguous().view(torch.int32) + bits) & -0x10000
    return torch.where(wide.isfinite(), moved.view(torch.float32), wide).bfloat16()


def logical_index(piece: Piece) -> Tensor:
    """Where each element of a piece is in the flattened logical tensor, int64."""
    placed, shape = piece.slot.placed, piece.slot.declared.shape
    flat = torch.arange(piece.start, piece.stop, device=piece.gradient.device)
    index, stride = torch.zeros_like(flat), 1
    for size, offset, whole in zip(placed.shape[::-1], placed.offsets[::-1], shape[::-1], strict=True):
        index += (flat % size + offset) * stride
        flat, stride = flat // size, stride * whole
    return index


class StochasticAdamW(torch.optim.AdamW):
    """AdamW (arXiv:1711.05101) on bfloat16 weights and moments, each rounded stochastically, from float32 gradients.

    `params` are those of `pieces`. A group's "number" is the step's, which the rounding is drawn from.
    """

    def __init__(
        self,
        params: list[dict[str, object]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        pieces: Sequence[Piece],
        seed: int,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay=weight_decay)
        self.pieces, self.seed = pieces, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        rule = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        for piece, weight in zip(self.pieces, group["params"], strict=True):
            state = self.state[weight]
            kept = {"model": weight, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            index, count = logical_index(piece), state["step"]
            for gradient, chosen, *narrow in _chunks(piece.gradient, index, *kept.values()):
                wide = [values.float() for values in narrow]
                after = count.clone()
                new, mean, square = wide
                reference.adamw_step([new], [gradient], [mean], [square], after, **rule)
                for name, values, moved in zip(kept, narrow, wide, strict=True):
                    key = f"{self.seed}/{group['number']}/{name}.{piece.slot.name}"
                    values.copy_(round_stochastically(moved, random_bits(key, chosen)))
            count += 1


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.reshape(-1).split(CHUNK) for tensor in tensors), strict=True)
