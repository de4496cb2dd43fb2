"""Muon: momentum whose update is orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

import torch

from megalite.comm import Communicator

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton-Schulz iteration chosen for its slope at zero, from the same source."""


def orthogonalize(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrix [rows, columns], roughly: singular values end at about 0.7..1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def share_out(shapes: list[torch.Size], ranks: int) -> list[int]:
    """Which rank orthogonalises each matrix: the costliest first, each to the rank with least to do so far."""
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    owners, load = [0] * len(shapes), [0] * ranks
    for index in sorted(range(len(shapes)), key=lambda i: (-costs[i], i)):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners


class Muon(torch.optim.Optimizer):
    """For matrices of hidden layers: m = momentum*m + g; p -= lr * 0.2*sqrt(max(shape)) * orth(g + momentum*m).

    The factor gives the update the RMS of an AdamW step (Liu et al. 2025, arXiv:2502.16982), so one lr serves both.
    Computes in the parameters' dtype (float32 main weights), whole logical matrices only. Replicas share the work: each
    orthogonalises some matrices and one all-reduce over `axes` hands them round (adding zeros changes no bit).
    """

    def __init__(
        self,
        params: list[dict[str, object]],
        lr: float,
        momentum: float,
        weight_decay: float,
        comm: Communicator,
        axes: tuple[str, ...],
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.comm, self.axes = comm, axes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights: list[torch.Tensor] = group["params"]
            updates = self._updates(weights, group["momentum"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for weight, update in zip(weights, updates, strict=True):
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)

    def _updates(self, weights: list[torch.Tensor], momentum: float) -> list[torch.Tensor]:
        """Orthogonalised momentum of every weight, equal on all replicas."""
        owners = share_out([weight.shape for weight in weights], self.comm.mesh.size(*self.axes))
        mine = self.comm.mesh.index(*self.axes)
        flat = torch.zeros(sum(weight.numel() for weight in weights), dtype=weights[0].dtype, device=weights[0].device)
        updates = [
            part.view_as(weight) for part, weight in zip(flat.split([w.numel() for w in weights]), weights, strict=True)
        ]
        for weight, update, owner in zip(weights, updates, owners, strict=True):
            assert weight.grad is not None
            buffer = self.state[weight]["momentum_buffer"]
            buffer.mul_(momentum).add_(weight.grad)
            if owner == mine:
                update.copy_(orthogonalize(weight.grad.add(buffer, alpha=momentum)))
        self.comm.all_reduce(flat, *self.axes)
        return updates
