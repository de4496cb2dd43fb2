"""Muon: momentum whose update is orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from collections.abc import Sequence

import torch

from megalite.optim.exchange import MatrixExchange
from megalite.parallel.buckets import Slot
from megalite.parallel.data import Gradients, Piece


class Muon(torch.optim.Optimizer):
    """For matrices of hidden layers: m = momentum*m + g; p -= lr * 0.2*sqrt(max(shape)) * orth(g + momentum*m).

    The factor gives the update the RMS of an AdamW step (Liu et al. 2025, arXiv:2502.16982), so one lr serves both.
    `params` are this rank's `pieces`, in main precision; `slots` all matrices, of which it may hold nothing. Whole
    logical matrices are orthogonalised, shared out over the ranks that hold parts of them.
    """

    def __init__(
        self,
        params: list[dict[str, object]],
        lr: float,
        momentum: float,
        weight_decay: float,
        gradients: Gradients,
        slots: Sequence[Slot],
        pieces: Sequence[Piece],
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.pieces = pieces
        held = {piece.slot: piece for piece in pieces}
        together: dict[tuple[str, ...], list[Slot]] = {}
        for slot in slots:
            axes = tuple(dict.fromkeys((*slot.placed.replicas, *slot.declared.shard)))
            together.setdefault(axes, []).append(slot)
        self.exchanges = [
            MatrixExchange(slots, held, gradients.comm, axes, gradients.dtype) for axes, slots in together.items()
        ]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        weights: list[torch.Tensor] = group["params"]
        momenta = {}
        for piece, weight in zip(self.pieces, weights, strict=True):
            assert weight.grad is not None
            buffer = self.state[weight]["momentum_buffer"]
            buffer.mul_(group["momentum"]).add_(weight.grad)
            momenta[piece.slot] = weight.grad.add(buffer, alpha=group["momentum"])
        updates: dict[Slot, torch.Tensor] = {}
        for exchange in self.exchanges:
            updates |= exchange.orthogonalized(momenta)
        for piece, weight in zip(self.pieces, weights, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            scale = group["lr"] * 0.2 * max(piece.slot.declared.shape[-2:]) ** 0.5
            weight.add_(updates[piece.slot].view_as(weight), alpha=-scale)
