"""The router of an MoE layer: which experts compute a token, with what weight, and what keeps the experts evenly busy.

Everything is decided by a token's own scores or, where it takes the whole microbatch (capacity, Sinkhorn, expert
choice), alike on all ranks that share it; so routing depends on no layout. Dimensions: N tokens of this rank, T of the
microbatch, E experts, K experts a token.
"""

from typing import Any, NamedTuple

import torch
from megalite_kernels import linear, moe_route
from torch import Tensor, nn

from megalite.config.schema import ModelConfig, MoEConfig
from megalite.model.matching import TINY, chosen_by_experts, noise, over_capacity, sinkhorn
from megalite.parallel.parameter import declare
from megalite.parallel.tokens import Tokens


class Routing(NamedTuple):
    """`indices_NK`: int64, -1: no expert. `probs_NK`: float32 or float64; the losses that balance hang on them."""

    indices_NK: Tensor
    probs_NK: Tensor


class Router(nn.Module):
    """`share`: of the global batch that a microbatch is; a balancing loss is a mean over microbatches. `loss_scale`:
    what the model's loss is multiplied by before backward, and so must be those of this layer. `seed`: of the jitter.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        moe = self.moe = config.moe
        self.layer, self.share, self.loss_scale, self.seed, self.backend = layer, 1.0, 1.0, 0, "auto"
        self.weight = declare(moe.experts, config.hidden, role="router", std=config.init_std, sees="own")
        self.bias = declare(moe.experts, role="bias", sees="own") if moe.router_bias else None
        self.expert_bias = declare(moe.experts, role="state") if moe.bias_rate is not None else None
        self.last_load = declare(moe.experts, role="state") if moe.aux_scope == "global" and moe.aux_loss else None
        self.seen = Seen()

    def forward(self, x_ND: Tensor, tokens: Tokens, text_BL: Tensor) -> Routing:
        """`text_BL`: the microbatch's token ids, which the jitter is drawn from."""
        moe, wide = self.moe, torch.float64 if self.moe.router_dtype == "fp64" else torch.float32
        wide = torch.promote_types(wide, x_ND.dtype)
        x_ND = x_ND.to(wide)
        if moe.jitter and torch.is_grad_enabled():
            x_ND = x_ND * noise(text_BL, tokens, x_ND, moe.jitter, self.seed, self.layer)
        bias = None if self.bias is None else self.bias.to(wide)
        logits_NE = linear(x_ND, self.weight.to(wide), bias)
        indices, probs = self._match(logits_NE, tokens)
        kept = indices
        if moe.capacity is not None and moe.router != "expert_choice":
            dropped = over_capacity(tokens.everyone(indices), tokens.everyone(probs.detach()), moe, tokens.total)
            kept = indices.masked_fill(tokens.mine(dropped), -1)
        if torch.is_grad_enabled():
            probs = self._balanced(probs, logits_NE, indices, kept, tokens)
        return Routing(kept, probs)

    def bias_range(self) -> Tensor:
        """[2] float64: the smallest and the largest expert bias; zeros where there is none."""
        if self.expert_bias is None:
            return torch.zeros(2, dtype=torch.float64, device=self.weight.device)
        return torch.stack(self.expert_bias.aminmax()).double()

    def _match(self, logits_NE: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(experts [N, K], their weights [N, K])."""
        moe = self.moe
        if moe.force_balance:
            slots = tokens.numbers_N[:, None] * moe.top_k + torch.arange(moe.top_k, device=logits_NE.device)
            return self._weights(logits_NE, slots % moe.experts)
        if moe.router == "sinkhorn":
            if not torch.is_grad_enabled():  # one token, say, has nothing to be balanced with
                return self._weights(logits_NE, logits_NE.topk(moe.top_k, dim=-1).indices)
            even = sinkhorn(tokens.everyone(logits_NE.detach()))
            return self._weights(logits_NE, tokens.mine(even.topk(moe.top_k, dim=-1).indices))
        if moe.router == "expert_choice":
            scores = logits_NE.softmax(-1)
            indices = tokens.mine(chosen_by_experts(tokens.everyone(scores.detach()), moe))
            return indices, scores.gather(-1, indices.clamp(min=0)) * moe.scale
        indices, probs, _ = moe_route(
            logits_NE, moe.top_k, score=moe.router, normalize=moe.normalize, bias_E=self.expert_bias,
            groups=moe.groups, top_groups=moe.top_groups if moe.groups > 1 else None, scale=moe.scale,
            backend=self.backend,
        )  # fmt: skip
        return indices, probs

    def _weights(self, logits_NE: Tensor, indices_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Of experts that something else than their scores has chosen."""
        scores = logits_NE.sigmoid() if self.moe.router == "sigmoid" else logits_NE.softmax(-1)
        probs = scores.gather(-1, indices_NK)
        if self.moe.normalize and self.moe.top_k > 1:
            probs = probs / (probs.sum(-1, keepdim=True) + TINY)
        return indices_NK, probs * self.moe.scale

    def _balanced(
        self, probs_NK: Tensor, logits_NE: Tensor, indices_NK: Tensor, kept_NK: Tensor, tokens: Tokens
    ) -> Tensor:
        """The probabilities with the gradients of the layer's own losses behind them; notes what was seen."""
        moe, zero = self.moe, logits_NE.new_zeros(())
        balance, z = zero, zero
        if moe.aux_loss:
            balance = balancing_loss(self._scores(logits_NE), indices_NK, moe, tokens, self.last_load)
        if moe.z_loss:
            z = logits_NE.logsumexp(-1).square().sum() / tokens.total
        if moe.aux_loss or moe.z_loss:
            own = (moe.aux_loss * balance + moe.z_loss * z) * self.share
            probs_NK = _Attached.apply(probs_NK, own * self.loss_scale)
        self.seen.note(self._scores(logits_NE.detach()), indices_NK, kept_NK, balance, z, self.share)
        return probs_NK

    def _scores(self, logits_NE: Tensor) -> Tensor:
        """A distribution over the experts."""
        if self.moe.router != "sigmoid":
            return logits_NE.softmax(-1)
        scores = logits_NE.sigmoid()
        return scores / (scores.sum(-1, keepdim=True) + TINY)


def balancing_loss(
    scores_NE: Tensor, indices_NK: Tensor, moe: MoEConfig, tokens: Tokens, last_load_E: Tensor | None
) -> Tensor:
    """This rank's term of E · Σ_e f_e · P_e (arXiv:2101.03961): f an expert's share of the slots, P its mean score.

    Of a microbatch; of each sequence, averaged (DeepSeek-V3, arXiv:2412.19437 eq. 17-20); or f is that of the last
    step's global batch (all experts alike before the first), which needs no communication and depends on no layout.
    """
    experts = moe.experts
    if moe.aux_scope == "global":
        assert last_load_E is not None
        load_E = last_load_E.to(scores_NE.dtype)
        return (scores_NE @ torch.where(load_E.sum() > 0, experts * load_E / load_E.sum().clamp(min=1), 1.0)).sum() / (
            tokens.total
        )
    rows, length = (tokens.batch, tokens.length) if moe.aux_scope == "sequence" else (1, tokens.total)
    row_N = tokens.numbers_N // length
    place = (row_N[:, None] * experts + indices_NK).masked_fill(indices_NK < 0, rows * experts)
    counts = scores_NE.new_zeros(rows * experts + 1, dtype=torch.float64)
    counts.scatter_add_(0, place.flatten(), torch.ones_like(place, dtype=torch.float64).flatten())
    load_RE = tokens.summed(counts[:-1]).view(rows, experts)
    weight_RE = (experts * load_RE / load_RE.sum(-1, keepdim=True).clamp(min=1)).to(scores_NE.dtype)
    return (scores_NE * weight_RE[row_N]).sum() / (length * rows)


class _Attached(torch.autograd.Function):
    """x as it is; in backward `loss` counts as a term of what is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.like, device=grad.device)


class Seen:
    """What a layer has routed since the last `take`: the load of each expert, and sums over its tokens."""

    NAMES = ("tokens", "dropped", "entropy", "balance_loss", "z_loss")

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def note(
        self, scores_NE: Tensor, indices_NK: Tensor, kept_NK: Tensor, balance: Tensor, z: Tensor, share: float
    ) -> None:
        """Adds a forward pass, unless it runs a second time, in backward."""
        if torch._C._current_graph_task_id() != -1:
            return
        experts = scores_NE.shape[1]
        chosen = indices_NK.masked_fill(indices_NK < 0, experts).flatten()
        ones = torch.ones_like(chosen, dtype=torch.float64)
        load = ones.new_zeros(experts + 1).scatter_add_(0, chosen, ones)[:experts]
        entropy = -(scores_NE * (scores_NE + TINY).log()).sum()
        dropped = ((kept_NK < 0) & (indices_NK >= 0)).sum()
        sums = [float(len(scores_NE)), dropped, entropy, balance.detach() * share, z.detach() * share]
        noted = torch.cat([load, torch.stack([torch.as_tensor(s, device=load.device).double() for s in sums])])
        self.total = noted if self.total is None else self.total + noted

    def take(self, experts: int) -> Tensor:
        """[E loads, one number for each of NAMES], float64; starts anew."""
        total, self.total = self.total, None
        return torch.zeros(experts + len(self.NAMES), dtype=torch.float64) if total is None else total
