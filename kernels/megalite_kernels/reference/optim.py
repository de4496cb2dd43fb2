"""What an optimizer computes: AdamW, the norm of all gradients, and Muon's orthogonalisation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalite_kernels.reference.wide import widen

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton–Schulz iteration chosen for its slope at zero (kellerjordan.github.io/posts/muon)."""


def bias_corrections(step: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(1 - β₁ᵗ, √(1 - β₂ᵗ)) in float64 for the step t."""
    count = step.double()
    return 1 - betas[0] ** count, (1 - betas[1] ** count).sqrt()


def adamw_moments(grad: Tensor, mean: Tensor, square: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Both moments after a gradient."""
    return mean.lerp(grad, 1 - betas[0]), betas[1] * square + (1 - betas[1]) * grad.square()


def adamw_moved(
    p: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tensor:
    """Weights after the step of that number, from the moments after it; all of one dtype."""
    first, second = bias_corrections(step, betas)
    size = square.sqrt() / second.to(p.dtype) + eps
    return p * (1 - lr * weight_decay) - (lr / first).to(p.dtype) * (mean / size)


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    copies: Sequence[Tensor] = (),
) -> None:
    """One step in place (Loshchilov & Hutter 2019, arXiv:1711.05101), `step` counted first, as torch.optim.AdamW does:

    p -= lr · decay · p;  m += (1 - β₁)(g - m);  v = β₂ v + (1 - β₂) g²;  p -= lr / c₁ · m / (√v / c₂ + eps).

    `grad_scale`, a scalar, multiplies the gradients, which stay as they are; where `skip` is true nothing changes.
    """
    going = torch.ones_like(step, dtype=torch.bool) if skip is None else ~skip.bool()
    step += going.to(step.dtype)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        wide = widen(p)
        grad = g.to(wide.dtype) if grad_scale is None else g.to(wide.dtype) * grad_scale.to(wide.dtype)
        mean, square = adamw_moments(grad, m.to(wide.dtype), v.to(wide.dtype), betas)
        moved = adamw_moved(wide, mean, square, step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for old, new in ((p, moved), (m, mean), (v, square)):
            old.copy_(torch.where(going, new.to(old.dtype), old))
    for copy, p in zip(copies, params, strict=bool(copies)):
        copy.copy_(p)


def gradient_norm(tensors: Sequence[Tensor]) -> Tensor:
    """√ Σ x² over all elements, in float64."""
    squares = [x.double().square().sum() for x in tensors]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def newton_schulz(
    x: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """X ← aX + (bA + cA²)X with A = XXᵀ, `steps` times from X / (‖X‖ + eps): [..., rows, columns], each matrix alone.

    With the default coefficients every singular value ends between about 0.7 and 1.2.
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    wide = widen(x).mT if tall else widen(x)
    wide = wide / (torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * (gram @ gram)) @ wide
    return (wide.mT if tall else wide).to(x.dtype)
