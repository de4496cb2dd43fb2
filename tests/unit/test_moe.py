"""Mixture-of-experts layers on one process: against a plain loop in float64, and what every router promises."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalite.comm import Communicator
from megalite.config.schema import ModelConfig, MoEConfig
from megalite.errors import UserError
from megalite.mesh import AXES, Mesh
from megalite.model.attention import Context
from megalite.model.matching import chosen_by_experts, noise, over_capacity, rounded, sinkhorn
from megalite.model.moe import MoE
from megalite.model.router import Router, Seen
from megalite.model.transformer import Transformer
from megalite.parallel.experts import Work
from megalite.parallel.parameter import materialize
from megalite.parallel.tensor import ALONE
from megalite.parallel.tokens import Tokens, own_tokens
from megalite.train.balance import Balance

BATCH, LENGTH, HIDDEN = 3, 10, 8
MESH = Mesh(dict.fromkeys(AXES, 1))
BASE = MoEConfig(experts=6, top_k=2, ffn=12)


def layer(moe: MoEConfig, **model: Any) -> MoE:
    config = ModelConfig(hidden=HIDDEN, heads=2, ffn=16, layers=2, init_std=0.5, moe=moe, **model)
    with torch.device("meta"):
        made = MoE(config, 0, 0.5)
    materialize(made, torch.device("cpu"), 1, torch.float64)
    return made


def inputs(seed: int = 0) -> tuple[Tensor, Context, Tokens]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, generator=generator)
    text = torch.randint(50, (BATCH, LENGTH), generator=generator)
    context = Context(BATCH, text, None, None, None, None)
    return x, context, own_tokens(ALONE, None, BATCH, BATCH * LENGTH, x.device)


def plain(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, balancing loss of the microbatch, z-loss) of softmax top-k, token by token, expert by expert."""
    rows, config = x.flatten(0, 1), moe.config
    logits = rows @ moe.router.weight.T
    if moe.router.bias is not None:
        logits = logits + moe.router.bias
    out, load = [], torch.zeros(config.experts, dtype=torch.float64)
    for row, scores in zip(rows, logits.softmax(-1), strict=True):
        best = scores.argsort(descending=True)[: config.top_k]
        weights = scores[best] / scores[best].sum() if config.normalize else scores[best]
        load[best] += 1
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert, weight in zip(best, weights * config.scale, strict=True):
            gate, up = moe.experts.gate[expert] @ row, moe.experts.up[expert] @ row
            total = total + weight * (moe.experts.down[expert] @ (torch.nn.functional.silu(gate) * up))
        out.append(total)
    share = load / load.sum()
    balance = config.experts * (share * logits.softmax(-1).mean(0)).sum()
    return torch.stack(out).view(x.shape), balance, logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize(
    "options", [{}, {"normalize": False, "scale": 1.5}, {"router_bias": True, "top_k": 3}], ids=str
)
def test_layer_and_its_losses_are_those_of_a_plain_loop(options: dict[str, Any]) -> None:
    moe = layer(replace(BASE, aux_loss=0.3, z_loss=0.02, **options))
    moe.router.share = 0.25
    x, context, _ = inputs()
    x.requires_grad_()
    ours = moe(x, context)
    grad = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    parameters = [x, *moe.parameters()]
    mine = torch.autograd.grad(ours, parameters, grad)
    theirs, balance, z = plain(moe, x)
    loss = (theirs * grad).sum() + 0.25 * (0.3 * balance + 0.02 * z)
    expected = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours_, theirs_ in zip(mine, expected, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-10, atol=1e-12)
    seen = dict(zip(Seen.NAMES, moe.router.seen.take(6)[6:].tolist(), strict=True))
    assert seen["balance_loss"] == pytest.approx(0.25 * balance.item())
    assert seen["z_loss"] == pytest.approx(0.25 * z.item())


def test_balancing_loss_of_sequences_is_the_mean_of_each() -> None:
    """And of even load it is 1, its smallest value."""
    moe = layer(replace(BASE, aux_loss=1.0, aux_scope="sequence"))
    x, context, _ = inputs()
    moe(x, context)
    found = moe.router.seen.take(6)[6 + Seen.NAMES.index("balance_loss")].item()
    expected = sum(plain(moe, row[None])[1].item() for row in x) / BATCH
    assert found == pytest.approx(expected)


def test_balancing_loss_of_the_global_batch_uses_the_last_step() -> None:
    moe = layer(replace(BASE, aux_loss=1.0, aux_scope="global"))
    x, context, _ = inputs()
    at = 6 + Seen.NAMES.index("balance_loss")
    moe(x, context)
    assert moe.router.seen.take(6)[at].item() == pytest.approx(1.0), "before the first step all experts are alike"
    load = torch.tensor([5.0, 0, 0, 0, 0, 1], dtype=torch.float64)
    assert moe.router.last_load is not None
    moe.router.last_load.copy_(load)
    moe(x, context)
    scores = (x.flatten(0, 1) @ moe.router.weight.T).softmax(-1).mean(0)
    assert moe.router.seen.take(6)[at].item() == pytest.approx((6 * load / 6 * scores).sum().item())


def test_shared_expert_and_its_gate() -> None:
    moe = layer(replace(BASE, shared_ffn=4, shared_gate=True))
    x, context, _ = inputs()
    routed, _, _ = plain(moe, x)
    assert moe.shared is not None and moe.shared_gate is not None
    expected = routed + moe.shared(x) * (x @ moe.shared_gate.T).sigmoid()
    torch.testing.assert_close(moe(x, context), expected, rtol=1e-12, atol=1e-12)


ROUTERS = [
    {}, {"router": "sigmoid", "scale": 2.5}, {"router": "sigmoid", "bias_rate": 0.1, "groups": 3, "top_groups": 2},
    {"router": "sinkhorn"}, {"force_balance": True}, {"jitter": 0.1}, {"top_k": 1, "router": "sinkhorn"},
]  # fmt: skip


@pytest.mark.parametrize("options", ROUTERS, ids=str)
def test_each_token_is_computed_top_k_times(options: dict[str, Any]) -> None:
    moe = layer(replace(BASE, **options))
    x, context, tokens = inputs()
    indices, probs = moe.router(x.flatten(0, 1), tokens, context.tokens_BS)
    assert indices.shape == probs.shape == (BATCH * LENGTH, moe.config.top_k)
    assert ((indices >= 0) & (indices < 6)).all()
    assert all(len(set(row)) == len(row) for row in indices.tolist()), "an expert computes a token once"
    load = moe.router.seen.take(6)
    assert load[:6].sum() == BATCH * LENGTH * moe.config.top_k
    if options.get("force_balance"):
        assert load[:6].tolist() == [10.0] * 6
    if moe.config.normalize and moe.config.top_k > 1:
        torch.testing.assert_close(probs.sum(-1), torch.full((30,), moe.config.scale, dtype=torch.float64))


@pytest.mark.parametrize("options", [*ROUTERS, {"router": "expert_choice"}], ids=str)
@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("drop", ["probability", "position"])
def test_capacity_is_never_exceeded(options: dict[str, Any], capacity: float, drop: str) -> None:
    moe = layer(replace(BASE, capacity=capacity, drop=drop, **options))
    x, context, tokens = inputs()
    indices, _ = moe.router(x.flatten(0, 1), tokens, context.tokens_BS)
    kept = torch.bincount(indices[indices >= 0], minlength=6)
    room = -(-int(capacity * moe.config.top_k * 30 * 1000) // (6 * 1000))
    assert kept.max() <= room
    if options.get("router") == "expert_choice":
        assert kept.tolist() == [room] * 6
    padded = layer(replace(moe.config, pad=True))
    torch.testing.assert_close(padded(x, context), moe(x, context), rtol=1e-12, atol=1e-12)


def test_who_is_dropped() -> None:
    indices = torch.tensor([[0], [0], [1], [0], [0]])
    probs = torch.tensor([[0.2], [0.9], [0.1], [0.5], [0.9]])
    moe = replace(BASE, experts=2, top_k=1, capacity=0.8)  # 2 of 5
    assert over_capacity(indices, probs, moe, 5).flatten().tolist() == [True, False, False, True, False]
    first = replace(moe, drop="position")
    assert over_capacity(indices, probs, first, 5).flatten().tolist() == [False, False, False, True, True]
    equal = torch.full((5, 1), 0.5)
    assert over_capacity(indices, equal, moe, 5).flatten().tolist() == [False, False, False, True, True]


def test_sinkhorn_evens_out_tokens_and_experts() -> None:
    logits = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    even = sinkhorn(logits)
    torch.testing.assert_close(even.sum(0), torch.full((5,), 1 / 5, dtype=torch.float64), rtol=0.02, atol=0)
    torch.testing.assert_close(even.sum(1), torch.full((40,), 1 / 40, dtype=torch.float64), rtol=0.02, atol=0)
    # It divides rows and columns by numbers, and nothing else.
    ratio = even.log() - logits
    torch.testing.assert_close(ratio, ratio[:, :1] + ratio[:1] - ratio[:1, :1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("gap", [40.0, 120.0])
def test_sinkhorn_bears_a_token_far_from_the_others(gap: float) -> None:
    logits = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[0, 0] += gap
    even = sinkhorn(logits)
    torch.testing.assert_close(even.sum(0), torch.full((4,), 1 / 4, dtype=torch.float64), rtol=0.02, atol=0)
    assert (even.sum(1) > 0).all()


def test_what_routers_do_with_one_token_at_a_time() -> None:
    """As in generation: Sinkhorn has nothing to even out and takes the best; expert choice says that it cannot."""
    x = torch.randn(1, 1, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one = own_tokens(ALONE, None, 1, 1, x.device)
    moe = layer(replace(BASE, router="sinkhorn"))
    with torch.no_grad():
        indices, _ = moe.router(x.flatten(0, 1), one, torch.zeros(1, 1, dtype=torch.int64))
    assert indices.tolist() == (x.flatten(0, 1) @ moe.router.weight.T).topk(2).indices.tolist()
    cache: Any = object()
    with pytest.raises(UserError, match="expert_choice: looks at later tokens"):
        layer(replace(BASE, router="expert_choice"))(x, Context(1, torch.zeros(1, 1), None, None, None, cache))


def test_experts_choose_the_best_tokens_and_of_equal_ones_the_first() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.2], [0.1, 0.2], [0.9, 0.1]])
    moe = replace(BASE, experts=2, top_k=1)
    assert chosen_by_experts(scores, moe).tolist() == [[0, -1], [0, 1], [1, -1], [-1, -1]]


@given(st.floats(2**-20, 1, width=32), st.integers(-3, 3))
def test_what_tokens_are_compared_by_ignores_the_last_bits(value: float, off: int) -> None:
    exact = torch.tensor([value], dtype=torch.float64) * (1 + 2**-9)
    bits = rounded(exact).view(torch.int32) + 128  # the middle of an interval, so that no border is near
    middle = bits.view(torch.float32).double()
    assert torch.equal(rounded(middle), rounded(middle * (1 + off * 2**-52)))
    assert rounded(middle).item() == pytest.approx(middle.item(), rel=2**-14)


def test_noise_is_even_and_depends_on_text_position_layer_and_seed() -> None:
    x, context, tokens = inputs()
    like = x.flatten(0, 1).repeat(1, 100)
    factors = noise(context.tokens_BS, tokens, like, 0.1, 3, 0)
    assert factors.min() >= 0.9 and factors.max() <= 1.1
    assert factors.mean().item() == pytest.approx(1.0, abs=2e-3)
    assert ((factors - 1) / 0.1).square().mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert abs(torch.corrcoef(torch.stack([factors[0], factors[1]]))[0, 1]) < 0.15
    assert torch.equal(factors, noise(context.tokens_BS, tokens, like, 0.1, 3, 0))
    for other in (
        noise(context.tokens_BS + 1, tokens, like, 0.1, 3, 0),
        noise(context.tokens_BS, tokens, like, 0.1, 4, 0),
        noise(context.tokens_BS, tokens, like, 0.1, 3, 1),
    ):
        assert (factors == other).double().mean() < 0.01
    with torch.no_grad():
        quiet, plain_router = layer(replace(BASE, jitter=0.3)), layer(BASE)
        a, b = (moe.router(x.flatten(0, 1), tokens, context.tokens_BS) for moe in (quiet, plain_router))
    assert torch.equal(a.probs_NK, b.probs_NK), "no noise outside of training"


def test_identity_experts_give_back_what_they_get() -> None:
    """Dispatch and combine with normalised probabilities are the identity where experts are."""
    moe = layer(BASE)

    class Identity(torch.nn.Module):
        def forward(self, work: Work, _: int | None) -> Tensor:
            present = (work.indices_RK >= 0).to(work.probs_RK)
            return work.rows_RD * (work.probs_RK * present).sum(-1, keepdim=True)

    moe.experts = Identity()  # type: ignore[assignment]
    x, context, _ = inputs()
    torch.testing.assert_close(moe(x, context), x, rtol=1e-14, atol=1e-14)


def test_bias_moves_towards_the_less_loaded() -> None:
    config = ModelConfig(layers=3, hidden=HIDDEN, heads=2, ffn=16, moe=replace(BASE, bias_rate=0.5, dense_layers=1))
    with torch.device("meta"):
        model = Transformer(config, 50, LENGTH)
    materialize(model, torch.device("cpu"), 0, torch.float32)
    balance = Balance([model], Communicator(MESH), config)
    assert balance.layers == [1, 2]
    total = torch.zeros(2, 6 + len(Seen.NAMES) + 2, dtype=torch.float64)
    total[0, :6] = torch.tensor([4.0, 4, 4, 4, 4, 4])
    total[1, :6] = torch.tensor([9.0, 3, 3, 3, 3, 3])
    balance.update(total)
    routers: list[Router] = [model.blocks[name].mlp.router for name in ("1", "2")]
    assert routers[0].expert_bias is not None and routers[1].expert_bias is not None
    assert routers[0].expert_bias.tolist() == [0.0] * 6
    assert routers[1].expert_bias.tolist() == [-0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    described = balance.described(total)
    assert described is not None
    assert described["layers"]["2"]["imbalance"] == pytest.approx(9 / 4)
    assert described["layers"]["2"]["load"][0] == pytest.approx(9 / 24, abs=1e-5)
    now = balance.described(balance.measure())
    assert now is not None
    assert now["layers"]["2"]["bias"] == [-0.5, 0.5]
    assert now["layers"]["1"]["bias"] == [0.0, 0.0]


def test_a_recomputed_layer_counts_its_tokens_once() -> None:
    moe = layer(BASE)
    x, context, _ = inputs()
    x.requires_grad_()
    out = torch.utils.checkpoint.checkpoint(moe, x, context, use_reentrant=False)
    out.sum().backward()
    assert moe.router.seen.take(6)[:6].sum() == BATCH * LENGTH * 2
