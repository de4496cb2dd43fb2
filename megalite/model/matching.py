"""Ways of matching tokens and experts that look at a whole microbatch, and noise that depends on no layout.

Each function gets all T tokens of the microbatch in order and gives every rank the same answer.
"""

import math

import torch
from torch import Tensor

from megalite.config.schema import MoEConfig
from megalite.parallel.tokens import Tokens

SINKHORN_ROUNDS, TINY = 50, 1e-20
"""A fixed number: looking whether it is over would make a GPU wait."""


def capacity_rows(moe: MoEConfig, tokens: int) -> int:
    """Slots that an expert takes of a microbatch of `tokens`."""
    return math.ceil((moe.capacity or 1.0) * moe.top_k * tokens / moe.experts)


def over_capacity(indices_TK: Tensor, probs_TK: Tensor, moe: MoEConfig, total: int) -> Tensor:
    """Which slots [T, K] find their expert full: it takes ceil(capacity · K · T / E), those with the highest
    probability or those of the first tokens; of equals the earlier."""
    room = capacity_rows(moe, total)
    expert = indices_TK.flatten()
    order = torch.arange(len(expert), device=expert.device)
    if moe.drop == "probability":
        order = rounded(probs_TK).flatten().argsort(descending=True, stable=True)
    order = order[expert[order].argsort(stable=True)]  # by expert, the best first
    sorted_expert = expert[order].contiguous()
    begins = torch.searchsorted(sorted_expert, sorted_expert)
    place = torch.arange(len(expert), device=expert.device) - begins
    return torch.empty_like(expert, dtype=torch.bool).index_copy_(0, order, place >= room).view(indices_TK.shape)


def sinkhorn(logits_TE: Tensor) -> Tensor:
    """Scores scaled by rows and columns so that every token and every expert weighs the same (BASE layers,
    arXiv:2103.16716, with Sinkhorn's iteration as arXiv:2204.08396)."""
    cost = (logits_TE - logits_TE.amax(-1, keepdim=True)).exp()  # a token's own factor changes nothing
    rows, columns = (torch.ones(n, dtype=cost.dtype, device=cost.device) for n in cost.shape)
    for _ in range(SINKHORN_ROUNDS):
        rows = 1.0 / (len(rows) * (cost @ columns) + TINY)
        columns = 1.0 / (len(columns) * (rows @ cost) + TINY)
    return cost * rows[:, None] * columns


def chosen_by_experts(scores_TE: Tensor, moe: MoEConfig) -> Tensor:
    """Each expert's best ceil(capacity · K · T / E) tokens (arXiv:2202.09368), as the experts of each token [T, E],
    rising, then -1. Of equal tokens the earlier is chosen."""
    tokens, experts = scores_TE.shape
    room = min(tokens, capacity_rows(moe, tokens))
    best = rounded(scores_TE).sort(dim=0, descending=True, stable=True).indices[:room]
    taken = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(0, best, True)
    number = torch.arange(experts, device=scores_TE.device).expand_as(scores_TE)
    listed = torch.where(taken, number, experts).sort(dim=1).values
    return torch.where(listed < experts, listed, -1)


def rounded(x: Tensor) -> Tensor:
    """What tokens are compared by: float32 without its last 8 bits. Tokens that are equal in mathematics (the same word
    at the start of two documents) stay so whatever the last bits of their scores are."""
    bits: Tensor = x.float().view(torch.int32) & ~0xFF
    return bits.view(torch.float32)


def noise(text_BL: Tensor, tokens: Tokens, like_ND: Tensor, jitter: float, seed: int, layer: int) -> Tensor:
    """Factors in 1 ± jitter [N, D], as if drawn anew for every row of text: hashed from the row's token ids, the
    position, the column, the layer and the seed."""
    where = torch.arange(1, text_BL.shape[1] + 1, device=text_BL.device)
    rows_B = _mixed(_mixed(text_BL * 2654435761 + where).sum(1) + seed * 1_000_003 + layer)
    token_N = _mixed(rows_B[tokens.rows_N] + tokens.numbers_N % tokens.length)
    column_D = torch.arange(like_ND.shape[1], device=like_ND.device)
    hashed = _mixed(token_N[:, None] + column_D * 40503)
    uniform = (hashed & 0xFFFFFF).to(like_ND.dtype) / 0x1000000
    return 1.0 + jitter * (2.0 * uniform - 1.0)


def _mixed(x: Tensor) -> Tensor:
    """Bits of int64s stirred (the finalizer of MurmurHash3, with arithmetic shifts)."""
    x = (x ^ (x >> 33)) * -49064778989728563
    x = (x ^ (x >> 33)) * -4265267296055464877
    return x ^ (x >> 33)
