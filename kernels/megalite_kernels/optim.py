"""What an optimizer computes over all its tensors: AdamW, the gradients' norm, Muon's orthogonalisation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalite_kernels import reference
from megalite_kernels.dispatch import choose
from megalite_kernels.reference.optim import COEFFICIENTS


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    copies: Sequence[Tensor] = (),
    backend: str = "auto",
) -> None:
    """One AdamW step in place, with decoupled decay, as torch.optim.AdamW (arXiv:1711.05101).

    Lists run in parallel; each is of one dtype, all tensors contiguous on one device: `params` float32 (main weights),
    gradients and both moments float32, bf16 or fp16, `copies` what the model computes with, written from `params`.
    Scalars on the device, which is never waited for: `step` float32, counted first; `grad_scale` multiplies the
    gradients, which stay as they are; where `skip` is true nothing changes, not even `step`.
    """
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([copies] if copies else [])]
    if any([x.shape for x in one] != [x.shape for x in params] for one in lists):
        raise ValueError("adamw_step: every list needs tensors of the params' shapes")
    if any(not x.is_contiguous() or x.device != step.device for one in lists for x in one):
        raise ValueError(f"adamw_step: tensors must be contiguous and on {step.device}, where the step is")
    kinds = [{x.dtype for x in one} for one in lists]
    if any(len(kind) > 1 for kind in kinds):
        raise ValueError("adamw_step: the tensors of one list must be of one dtype")
    if not params:
        return
    named: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    features = (("one dtype", len(set().union(*kinds[:4])) == 1),)
    chosen = choose("adamw", backend, step.device.type, params[0].dtype, features)
    if chosen == "triton":
        from megalite_kernels.gpu.adamw import adamw

        adamw(params, grads, exp_avgs, exp_avg_sqs, copies, step, lr, *betas, eps, weight_decay, grad_scale, skip)
    elif chosen == "torch":
        stopped = None if skip is None else skip.to(step.dtype)
        step += 1 if stopped is None else 1 - stopped
        scaled = list(grads) if grad_scale is None else torch._foreach_mul(list(grads), grad_scale)
        torch._fused_adamw_(
            list(params), scaled, list(exp_avgs), list(exp_avg_sqs), [], [step] * len(params), lr=lr, beta1=betas[0],
            beta2=betas[1], eps=eps, weight_decay=weight_decay, amsgrad=False, maximize=False, found_inf=stopped,
        )  # fmt: skip
        if copies:
            torch._foreach_copy_(list(copies), list(params))
    else:
        state = (params, grads, exp_avgs, exp_avg_sqs, step)
        reference.adamw_step(*state, **named, grad_scale=grad_scale, skip=skip, copies=copies)


@torch.no_grad()
def gradient_norm(tensors: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """√ Σ x² over every element of tensors of one dtype on one device, in float64; inf or NaN where one is.

    Squares are summed in float32, a few thousand at a time, and those sums in float64, in one order: the same bits in
    every run. So numbers beyond 10¹⁹ count as inf.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    if len({(x.dtype, x.device) for x in tensors}) > 1:
        raise ValueError("gradient_norm: tensors must be of one dtype and on one device")
    chosen = choose("gradient_norm", backend, tensors[0].device.type, tensors[0].dtype)
    if chosen == "triton":
        from megalite_kernels.gpu.adamw import gradient_norm as norm

        return norm([x.contiguous() for x in tensors])
    if chosen == "torch":
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float32)).double())
    return reference.gradient_norm(tensors)


@torch.no_grad()
def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    *,
    eps: float = 1e-7,
    backend: str = "auto",
) -> Tensor:
    """The nearly semi-orthogonal matrix nearest to x [..., rows, columns], each matrix alone (Jordan et al. 2024).

    X ← aX + (bA + cA²)X with A = XXᵀ from X / (‖X‖ + eps), on the shorter side. The iterates are kept in x's dtype,
    products accumulate in float32.
    """
    if x.dim() < 2:
        raise ValueError(f"newton_schulz: needs matrices, not {list(x.shape)}")
    chosen = choose("newton_schulz", backend, x.device.type, x.dtype)
    if chosen == "triton":
        from megalite_kernels.gpu.newton_schulz import newton_schulz as iterate

        return iterate(x.reshape(-1, *x.shape[-2:]), steps, *coefficients, eps).view(x.shape)
    if chosen == "reference":
        return reference.newton_schulz(x, steps, coefficients, eps)
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / (torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True) + eps)
    plus_product = torch.addmm if y.dim() == 2 else torch.baddbmm
    stack = y if y.dim() == 2 else y.reshape(-1, *y.shape[-2:])
    for _ in range(steps):
        gram = stack @ stack.mT
        stack = plus_product(stack, plus_product(gram, gram, gram, beta=b, alpha=c), stack, beta=a)
    y = stack.view(y.shape)
    return y.mT if tall else y
