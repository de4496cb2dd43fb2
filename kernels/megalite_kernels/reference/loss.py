"""The head's product and cross-entropy: N rows of hidden [N, D], a vocabulary of V."""

import torch
from torch import Tensor

from megalite_kernels.reference.wide import widen

IGNORE_INDEX = -100


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """(nll_sum, z_sum) over rows whose target is not ignore_index; float32, or float64 for float64 input.

    nll = logsumexp(logits) - logits[target]; z = logsumexp(logits)² (arXiv:2204.02311). Never divided. `z_loss`
    changes neither value: it is the weight the caller gives z_sum in its loss, which faster versions need early.
    """
    logits = widen(hidden_ND) @ widen(weight_VD).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = targets_N != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(-1, torch.where(counted, targets_N, 0)[:, None])[:, 0]
    zero = torch.zeros((), dtype=lse.dtype, device=lse.device)
    return torch.where(counted, lse - chosen, zero).sum(), torch.where(counted, lse.square(), zero).sum()
