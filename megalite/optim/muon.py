"""Muon: momentum whose update is orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalite.optim.compact import Compact, Groups
from megalite.optim.exchange import MatrixExchange
from megalite.optim.moments import Chunk, Moments
from megalite.parallel.buckets import Slot
from megalite.parallel.data import Gradients


class Muon(Compact):
    """For matrices of hidden layers: m = momentum*m + g; p -= lr * 0.2*sqrt(max(shape)) * orth(g + momentum*m).

    The factor gives the update the RMS of an AdamW step (Liu et al. 2025, arXiv:2502.16982), so one lr serves both.
    `params` are the weights of the moments' pieces; `slots` all matrices, of which this rank may hold nothing. Whole
    logical matrices are orthogonalised, shared out over the ranks that hold parts of them.
    """

    def __init__(
        self,
        params: Groups,
        lr: float,
        momentum: float,
        weight_decay: float,
        gradients: Gradients,
        slots: Sequence[Slot],
        moments: Moments,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, moments)
        held = {piece.slot: piece for piece in moments.pieces}
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
        momentum, kept = group["momentum"], 1 - group["lr"] * group["weight_decay"]
        momenta = {piece.slot: torch.empty_like(piece.gradient) for piece in self.weights}

        def after(gradient: Tensor, old: list[Tensor]) -> Sequence[Tensor]:
            return [old[0] * momentum + gradient]

        def use(chunk: Chunk, new: Sequence[Tensor]) -> None:
            torch.add(chunk.of(chunk.piece.gradient), new[0], alpha=momentum, out=chunk.of(momenta[chunk.piece.slot]))

        self.moments.update(group["number"], after, use)
        updates: dict[Slot, Tensor] = {}
        for exchange in self.exchanges:
            updates |= exchange.orthogonalized(momenta)
        for chunk in self.moments.chunks():
            slot = chunk.piece.slot
            scale = group["lr"] * 0.2 * max(slot.declared.shape[-2:]) ** 0.5
            update = chunk.of(updates[slot].reshape(-1))
            self.change(chunk, lambda weight, by=update, scale=scale: weight * kept - scale * by)  # type: ignore[misc]
