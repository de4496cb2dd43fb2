"""Mixture of experts against transformers' own routers and layers, and what holds for every choice."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalite_kernels import (
    grouped_gemm,
    moe_cpu,
    moe_permute,
    moe_route,
    moe_unpermute,
    multiple_of_rows,
    reference,
    swiglu,
)
from megalite_kernels.dispatch import OPS, Decision, Machine, Request, decide
from torch import Tensor
from torch.autograd import gradcheck

from tests.kernels.support import random

BACKENDS = ("reference", "cpu", "triton")


def has(backend: str) -> str:
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is for Linux")
    return backend


def sizes(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 16, "num_experts_per_tok": 3, "num_hidden_layers": 1, "vocab_size": 8} | more


def mixtral() -> Any:
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, MixtralTopKRouter

    config = MixtralConfig(**sizes(num_local_experts=8, intermediate_size=24))
    return MixtralTopKRouter(config), MixtralSparseMoeBlock(config), {}


def qwen(norm: bool) -> Any:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, Qwen3MoeTopKRouter

    config = Qwen3MoeConfig(**sizes(num_experts=12, moe_intermediate_size=24, norm_topk_prob=norm))
    return Qwen3MoeTopKRouter(config), Qwen3MoeSparseMoeBlock(config), {"normalize": norm}


def deepseek(norm: bool = True) -> Any:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter

    config = DeepseekV3Config(
        **sizes(num_local_experts=16, n_routed_experts=16, n_group=4, topk_group=2, moe_intermediate_size=24),
        n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=norm,
    )  # fmt: skip
    router, layer = DeepseekV3TopkRouter(config), DeepseekV3MoE(config)
    for gate in (router, layer.gate):
        gate.e_score_correction_bias.copy_(random(16, seed=9, scale=0.3))
    bias = router.e_score_correction_bias
    options = {"score": "sigmoid", "bias_E": bias, "groups": 4, "top_groups": 2, "scale": 2.5, "normalize": norm}
    return router, layer, options


def gpt_oss() -> Any:
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    return GptOssTopKRouter(GptOssConfig(**sizes(num_local_experts=8, intermediate_size=24))), None, {}


MODELS = {
    "mixtral": mixtral,
    "qwen3, normalised": lambda: qwen(True),
    "qwen3, as they are": lambda: qwen(False),
    "deepseek-v3": deepseek,
    "deepseek-v3, as they are": lambda: deepseek(False),
    "gpt-oss": gpt_oss,
}


def filled(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=seed + 20, scale=0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODELS)
def test_routes_as_transformers_does(model: str, backend: str) -> None:
    router, _, options = MODELS[model]()
    filled(router)
    _, theirs, chosen = router(random(30, 16).float())
    logits = router(random(30, 16).float())[0].detach().requires_grad_()
    indices, probs, counts = moe_route(logits, 3, backend=has(backend), **options)
    order, their_order = indices.argsort(-1), chosen.argsort(-1)  # DeepSeek's come unsorted
    assert torch.equal(indices.gather(-1, order), chosen.gather(-1, their_order))
    torch.testing.assert_close(probs.gather(-1, order), theirs.gather(-1, their_order), rtol=1e-6, atol=1e-7)
    assert torch.equal(counts, torch.bincount(chosen.flatten(), minlength=logits.shape[1]))


def layer(x_ND: Tensor, gate_EN: Tensor, w_in: Tensor, w_out: Tensor, k: int, backend: str, **options: Any) -> Tensor:
    """Σ over a token's experts of probability · down(silu(gate) · up), with weights as transformers keeps them."""
    indices, probs, _ = moe_route(x_ND.float() @ gate_EN.float().T, k, backend=backend, **options)
    rows, offsets, inverse = moe_permute(x_ND, indices, len(gate_EN), backend=backend)
    gate, up = grouped_gemm(rows, w_in.transpose(1, 2), offsets, backend=backend).chunk(2, -1)
    y = grouped_gemm(swiglu(gate, up), w_out.transpose(1, 2), offsets, backend=backend)
    return moe_unpermute(y, inverse, probs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", ["mixtral", "qwen3, normalised", "deepseek-v3"])
def test_a_layer_equals_transformers(model: str, backend: str) -> None:
    _, block, options = MODELS[model]()
    filled(block)
    if model.startswith("deepseek"):
        for p in block.shared_experts.parameters():
            torch.nn.init.zeros_(p)
    weights = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    x = random(1, 9, 16, seed=1).float().requires_grad_()
    theirs = block(x)
    ours = layer(x[0], *weights, 3, has(backend), **options)
    exact = layer(x[0].double(), *(weight.double() for weight in weights), 3, "reference", **options)
    # Both in float32: neither can be nearer than a few roundings of the largest value, whichever way it sums.
    rounding = 2**-23 * exact.abs().max()
    their_error, our_error = (torch.dist(exact, y.double(), p=torch.inf) for y in (theirs[0], ours))
    assert their_error <= 4 * rounding and our_error <= 2 * their_error + 4 * rounding
    grads = (torch.autograd.grad(y.square().sum(), (x, *weights)) for y in (ours, theirs))
    for our, their in zip(*grads, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5 * float(their.abs().max()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False},
        {"score": "sigmoid"},
        {"score": "sigmoid", "normalize": False, "scale": 0.3},
        {"score": "sigmoid", "groups": 3, "top_groups": 2, "bias_E": torch.linspace(-1, 1, 9), "scale": 2.5},
        {"bias_E": torch.linspace(-1, 1, 9)},
    ],
)
def test_gradients_of_probabilities(options: dict[str, Any]) -> None:
    logits = random(5, 9).requires_grad_()
    assert gradcheck(lambda x: reference.moe_route(x, 3, **options)[1], logits)


def test_gradients_of_rows_and_products() -> None:
    x, probs = random(6, 4).requires_grad_(), random(6, 2, seed=1).requires_grad_()
    indices = torch.tensor([[0, 3], [3, -1], [1, 0], [7, 3], [0, 1], [3, 0]])
    _, offsets, inverse = reference.moe_permute(x, indices, 4, pad_to=3)
    rows = random(20, 4, seed=2).requires_grad_()
    w = random(4, 4, 5, seed=3).requires_grad_()
    assert gradcheck(lambda x: reference.moe_permute(x, indices, 4, pad_to=3)[0], x)
    assert gradcheck(lambda y, p: reference.moe_unpermute(y, inverse, p), (rows, probs))
    bias = random(4, 5, seed=4).requires_grad_()
    assert gradcheck(lambda y, w, b: reference.grouped_gemm(y, w, offsets, b), (rows, w, bias))


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0], [2, 2, 2, 2]])
def test_one_batched_product_is_the_loop(counts: list[int]) -> None:
    """Two ways to write the same products: values and all three gradients."""
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    leaves = [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(10, 6), (4, 6, 5), (4, 5)])]
    found = []
    for backend in ("batched", "reference"):
        y = grouped_gemm(leaves[0], leaves[1], offsets, leaves[2], backend=backend)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for batched, looped in zip(*found, strict=True):
        torch.testing.assert_close(batched, looped, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_without_a_token_have_gradients_of_zero(backend: str) -> None:
    """A rank of experts may have room for rows and get none."""
    y, probs = random(3, 4).requires_grad_(), random(0, 2).requires_grad_()
    inverse = torch.empty(0, 2, dtype=torch.int32)
    out = moe_unpermute(y, inverse, probs, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 4)
    assert torch.equal(y.grad, torch.zeros(3, 4, dtype=y.dtype))
    assert probs.grad is not None and probs.grad.shape == (0, 2)


def drawn(seed: int, tokens: int, k: int, experts: int, elsewhere: bool) -> tuple[Tensor, Tensor]:
    """(x [N, 6], k different experts a token), some of them nobody's."""
    indices = random(tokens, experts, seed=seed).argsort(-1)[:, :k]
    indices = indices if seed % 2 else indices.int()
    return random(tokens, 6, seed=seed + 1).float(), indices - 1 if elsewhere else indices


SHAPES = {
    "seed": st.integers(0, 999),
    "tokens": st.integers(0, 12),
    "k": st.integers(1, 4),
    "experts": st.integers(4, 9),
    "elsewhere": st.booleans(),
    "pad_to": st.sampled_from([None, 1, 2, 8]),
    "known": st.booleans(),
    "dtype": st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
}


def check_permutation(
    backend: str, seed: int, tokens: int, k: int, experts: int, elsewhere: bool, pad_to: int | None, known: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """`known`: how many slots have an expert."""
    x, indices = drawn(seed, tokens, k, experts, elsewhere)
    x, here = x.to(dtype), (indices >= 0) & (indices < experts)
    slots = int(here.sum()) if known else here.numel()
    how: dict[str, Any] = {"pad_to": pad_to, "rows": slots if known else None, "backend": backend}
    rows, offsets, inverse = moe_permute(x, indices, experts, **how)
    ends = offsets.tolist()
    assert ends[0] == 0 and ends == sorted(ends) and ends[-1] <= len(rows)
    assert len(rows) <= slots + min(slots, experts) * ((pad_to or 1) - 1)
    assert torch.equal(inverse >= 0, here)
    taken = inverse[here]
    assert len(taken.unique()) == len(taken)  # each slot its own row: every token computed once by each of its experts
    for expert in range(experts):
        mine = inverse[indices == expert]
        assert mine.tolist() == list(range(ends[expert], ends[expert] + len(mine)))  # stable: in the order of tokens
        assert ends[expert + 1] - ends[expert] == -(-len(mine) // (pad_to or 1)) * (pad_to or 1)
    assert torch.equal(rows[taken], x[:, None].expand(-1, k, -1)[here])
    unused = torch.ones(len(rows), dtype=torch.bool).index_fill(0, taken.long(), False)
    assert not rows[unused].any()
    back = moe_unpermute(rows, inverse, here / here.sum(1, keepdim=True).clamp(min=1), backend=backend)
    rtol = 1e-6 if dtype.itemsize > 2 else 2**-8
    torch.testing.assert_close(back, x * here.any(1, keepdim=True), rtol=rtol, atol=1e-7)
    turned = rows.clone().requires_grad_()  # places that do not lie side by side
    moe_unpermute(turned, inverse.t().contiguous().t(), backend=backend).backward(x)
    assert torch.equal(turned.grad[taken], rows[taken]) and not turned.grad[unused].any()
    again = moe_permute(x, indices, experts, **how)
    assert all(torch.equal(a, b) for a, b in zip(again, (rows, offsets, inverse), strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(**SHAPES)
def test_there_and_back(backend: str, **shape: Any) -> None:
    check_permutation(backend, **shape)


@pytest.mark.law("moe_permute", "moe_unpermute")
@settings(max_examples=5, deadline=None, derandomize=True)
@given(**SHAPES)
def test_there_and_back_in_triton(**shape: Any) -> None:
    wide = torch.float32 if shape["dtype"] == torch.float64 else shape["dtype"]
    check_permutation(has("triton"), **{**shape, "dtype": wide})


@pytest.mark.law("moe_route")
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    size=st.integers(2, 6),
    groups=st.sampled_from([1, 2, 5]),
    coarse=st.booleans(),
    biased=st.booleans(),
    score=st.sampled_from(["softmax", "sigmoid"]),
)
def test_the_same_experts(
    backend: str, seed: int, size: int, groups: int, coarse: bool, biased: bool, score: str
) -> None:
    experts, top = groups * size, max(1, groups - 1)
    logits = random(7, experts, seed=seed).float()
    logits = (logits * 2).round() / 2 if coarse else logits  # many ties
    options: dict[str, Any] = {"score": score, "groups": groups, "top_groups": top}
    options["bias_E"] = (random(experts, seed=seed + 1) * 2).round().float() if biased else None
    indices, probs, counts = moe_route(logits, 2, backend=has(backend), **options)
    theirs, their_probs, their_counts = reference.moe_route(logits, 2, **options)
    assert torch.equal(indices, theirs) and torch.equal(counts, their_counts) and int(counts.sum()) == 14
    torch.testing.assert_close(probs, their_probs, rtol=1e-6, atol=1e-7)
    assert len({int(i) // size for i in indices[0]}) <= top


def test_ranks_share_the_slots() -> None:
    """Two ranks with half the experts each, which both have all tokens, give together what one gives."""
    x, indices = drawn(3, 11, 3, 8, elsewhere=False)
    w, probs = random(8, 6, 5, seed=4).float(), random(11, 3, seed=5).float()

    def part(first: int, count: int) -> Tensor:
        rows, offsets, inverse = moe_permute(x, indices - first, count)
        return moe_unpermute(grouped_gemm(rows, w[first : first + count], offsets), inverse, probs)

    torch.testing.assert_close(part(0, 4) + part(4, 4), part(0, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_probabilities(backend: str) -> None:
    logits = torch.tensor([[0.0, float("nan"), 2.0, -float("inf")], [5.0, 5.0, -0.0, 0.0]])
    for score in ("softmax", "sigmoid"):
        indices, probs, _ = moe_route(logits, 2, score=score, backend=has(backend))
        assert indices.tolist() == [[1, 2], [0, 1]] and bool(probs[0].isnan().all()) and not probs[1].isnan().any()
    assert moe_route(logits[1:, 2:], 1, backend=backend)[0].tolist() == [[0]]  # -0 equals 0


@pytest.mark.parametrize("backend", ["cpu", "triton", "grouped_mm"])
def test_bf16_rows_and_wide_probabilities(backend: str) -> None:
    x, w = random(12, 16).bfloat16().requires_grad_(), random(3, 16, 8, seed=1).bfloat16().requires_grad_()
    probs = random(12, 2, seed=2).float().requires_grad_()
    indices = torch.tensor([[0, 2], [2, -1], [0, -1]]).repeat(4, 1)
    results = []
    for product in (has(backend), "reference"):
        rest = "reference" if product == "grouped_mm" else product
        rows, offsets, inverse = moe_permute(x, indices, 3, backend=rest)
        y = grouped_gemm(rows, w, offsets, backend=product)
        turned = w.transpose(1, 2).contiguous().transpose(1, 2)
        again = grouped_gemm(rows, turned, offsets, backend=product)
        torch.testing.assert_close(again, y, rtol=1e-2, atol=1e-2)
        (grad,) = torch.autograd.grad(again.float().sum(), turned, retain_graph=True)
        torch.testing.assert_close(
            grad, torch.autograd.grad(y.float().sum(), w, retain_graph=True)[0], rtol=1e-2, atol=1e-2
        )
        assert not y[int(offsets[-1]) :].any()
        out = moe_unpermute(y, inverse, probs, backend=rest)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (x, w, probs))))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.detach().abs().max()))


def test_rows_filled_up_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What experts are filled up to where the number of rows is dear: powers of two that waste a sixteenth or less."""
    like = torch.empty(0, dtype=torch.bfloat16)
    monkeypatch.setattr(moe_cpu, "emulate_bf16_on_cpu", lambda: False)
    assert [multiple_of_rows(slots, 4, like) for slots in (0, 60, 124, 128, 4 * 512, 4 * 1023)] == [1, 1, 1, 2, 32, 32]
    assert multiple_of_rows(4096, 4, like.float()) == 1
    monkeypatch.undo()
    x, w = random(300, 16).bfloat16().requires_grad_(), random(4, 16, 8, seed=1).bfloat16().requires_grad_()
    probs, indices = random(300, 2, seed=2).float().requires_grad_(), random(300, 3, seed=3).argsort(-1)[:, :2]
    results = []
    for pad_to in (1, 16):
        rows, offsets, inverse = moe_permute(x, indices, 4, pad_to=pad_to, rows=600)
        assert len(rows) == (600, 656)[pad_to > 1]  # 4 x 15 more, down to a multiple
        out = moe_unpermute(grouped_gemm(rows, w, offsets), inverse, probs)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (x, w, probs))))
    for plain, filled in zip(*results, strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-2, atol=1e-2 * float(plain.detach().abs().max()))
    assert not results[1][2][3].any()  # the expert that got nothing


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_layer_is_one_graph(backend: str) -> None:
    weights = [random(4, 16, seed=1), random(4, 24, 16, seed=2), random(4, 16, 12, seed=3)]
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x, *leaves = (t.float().requires_grad_() for t in (random(10, 16), *weights))
        y = run(x, *leaves, 2, has(backend))
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *leaves))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["cpu", "triton"])
def test_registered_ops_are_sound(kind: str) -> None:
    if has(kind) == "triton":
        from megalite_kernels.gpu import grouped_gemm, moe_permute, moe_route  # noqa: F401

        logits = random(3, 6).float().requires_grad_()
        parts = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others add indices and floats
        route = (logits, None, 2, False, True, 1, 1, 1.0)
        torch.library.opcheck(torch.ops.megalite.triton_moe_route.default, route, test_utils=parts)
    ops = torch.ops.megalite
    x, w = random(4, 8).float().requires_grad_(), random(3, 8, 6, seed=1).float().requires_grad_()
    probs, indices = random(4, 2, seed=2).float().requires_grad_(), torch.tensor([[0, 2], [2, 0], [0, -1], [2, 1]])
    permute, unpermute, gemm = (
        getattr(ops, f"{kind}_{name}").default for name in ("moe_permute", "moe_unpermute", "grouped_gemm")
    )
    torch.library.opcheck(permute, (x, indices, 3, 4))
    rows, offsets, inverse = permute(x, indices, 3, 4)
    rows = rows.detach().requires_grad_()
    torch.library.opcheck(unpermute, (rows, inverse, probs))
    torch.library.opcheck(gemm, (rows, w, offsets, random(3, 6, seed=3).float().requires_grad_()))


def decided(op: str, device: str, chip: str, dtype: torch.dtype, **features: Any) -> Decision:
    machine = Machine((("triton", "3.7.1"),), None)
    return decide(OPS[op], Request(op, device, chip, dtype, tuple(features.items())), machine)


def test_who_multiplies() -> None:
    assert decided("grouped_gemm", "cuda", "sm_90", torch.bfloat16, aligned=True).backend == "grouped_mm"
    ampere = decided("grouped_gemm", "cuda", "sm_80", torch.bfloat16, aligned=True)
    assert ampere.backend == "triton" and "no kernel for sm_80" in str(ampere)
    assert "bf16" in str(decided("grouped_gemm", "cuda", "sm_90", torch.float32, aligned=True))
    assert "no bias" in str(decided("grouped_gemm", "cuda", "sm_90", torch.bfloat16, aligned=True, bias=True))
    assert "8 divides" in str(decided("grouped_gemm", "cuda", "sm_90", torch.bfloat16, aligned=False))
    assert decided("grouped_gemm", "cpu", "", torch.float32).backend == "cpu"
    wide = decided("moe_route", "cuda", "sm_90", torch.float32, columns=1024, k=8)
    assert wide.backend == "reference" and "512 experts" in str(wide) and "a GPU would have to wait" in str(wide)
    assert decided("moe_route", "cpu", "", torch.float64, columns=8, k=2).backend == "reference"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: moe_route(x, 9), "cannot choose 9 of 8"),
        (lambda x: moe_route(x, 0), "cannot choose 0"),
        (lambda x: moe_route(x, 2, score="relu"), "softmax or sigmoid"),
        (lambda x: moe_route(x, 2, groups=3), "3 groups"),
        (lambda x: moe_route(x, 3, groups=4, top_groups=1), "cannot choose 3 of 2"),
        (lambda x: moe_route(x, 2, bias_E=x[0, :3]), "bias is"),
        (lambda x: moe_permute(x, x, 8), "integers"),
        (lambda x: moe_permute(x, x[:2].long(), 8), "integers"),
        (lambda x: moe_permute(x, x.long(), 8, pad_to=0), "at least 1"),
        (lambda x: moe_unpermute(x, x.int(), x[:, :2]), "probabilities like it"),
        (lambda x: grouped_gemm(x, x[None], torch.zeros(2).int()), "w \\[E, D, F\\]"),
        (lambda x: grouped_gemm(x, torch.ones(2, 8, 3), torch.zeros(2).int()), "offsets"),
        (lambda x: grouped_gemm(x, torch.ones(2, 8, 3), torch.zeros(3).int(), torch.ones(2, 8)), "bias is"),
    ],
)
def test_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(torch.ones(4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_place_without_a_row_is_an_error(dtype: torch.dtype) -> None:
    """Never memory of somebody else."""
    x, indices = torch.randn(64, 16).to(dtype), torch.zeros(64, 2, dtype=torch.long)
    with pytest.raises(IndexError):
        moe_permute(x, indices, 4, rows=100)
    with pytest.raises((IndexError, RuntimeError)):
        moe_unpermute(x[:4], torch.tensor([[100_000, 3]], dtype=torch.int32), torch.ones(1, 2))
