"""Tokens that travel to experts in FP8: the same numbers on every layout and on one process, a byte each, and an error
that the format allows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.comm import Call
from megalite.parallel.collectives import rounded_as_sent
from megalite.parallel.experts import DISPATCHERS
from megalite.parallel.fp8_rows import pack, rounded, unpack
from tests.parity.layouts import MODELS, Layout, Task, alone, configuration, errors, trained, wrong
from tests.parity.test_experts import train_choosing
from tests.unit.test_fp8_linear import heavy_tailed
from tests.unit.test_fp8_linear import rounded as nearest

CASES: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(dp=2, ep=2), {"model": "deepseek"}),
    (Layout(dp=2, ep=2, dispatcher="all_gather"), {"model": "gpt-oss", "fp8": "tensorwise"}),
    (Layout(dp=4, ep=4, dispatcher="node", node_ranks=2), {"model": "experts"}),
    (Layout(tp=2, sp=True, cp=2, ep=2, etp=2), {"model": "gpt-oss"}),
    (Layout(tp=2), {"model": "experts", "fp8": "rowwise"}),
    (Layout(dp=2, pp=2, ep=2, schedule="zb_h1"), {"model": "dropping", "fp8": "blockwise"}),
    (Layout(dp=2, ep=2, zero=2), {"model": "deepseek", "recompute": "full"}),
]


@pytest.mark.parametrize(("layout", "words"), CASES, ids=lambda of: str(of).replace(" ", ","))
def test_layouts_are_one_process(layout: Layout, words: dict[str, Any]) -> None:
    task = Task(steps=2, fp8_dispatch=True, **words)
    assert wrong(trained(layout, task, threads=True), alone(layout, task)) == []


def test_the_cases_meet_every_dispatcher() -> None:
    assert {layout.dispatcher for layout, _ in CASES if layout.ep * layout.etp > 1} == set(DISPATCHERS)


def test_it_rounds_and_no_more() -> None:
    """Two layers' tokens and their gradients are rounded to four bits once each: 2⁻⁴ / √3 · √4."""
    layout, plain = Layout(), Task("experts", steps=1)
    found = errors([alone(layout, Task("experts", steps=1, fp8_dispatch=True))], alone(layout, plain))
    assert 1e-6 < found["losses"] < 0.005 and 1e-4 < found["norms"] < 0.08


def test_a_token_is_a_byte_a_number() -> None:
    """All tokens choose experts of rank 0. It hands in, of each layer: its own tokens in FP8, with a scale each, and
    their two probabilities; the sums of both ranks', wide; then the gradients of its own tokens' sums in FP8, of all
    rows that came and their probabilities, wide."""
    layout, task = Layout(dp=2, ep=2), Task("experts", steps=2, fp8_dispatch=True)
    hidden, tokens = MODELS["experts"].hidden, 8 * 16 // 2
    calls = trained(layout, task, train_choosing, (0, 1))[0]["calls"]
    layers = configuration(Layout(), task).model.layers

    def moved(phase: str, dtype: str) -> int:
        chosen: list[Call] = [c for c in calls if c.op == "all_to_all" and (c.phase, c.dtype) == (phase, dtype)]
        return sum(c.bytes for c in chosen)

    assert moved("forward", "uint8") == moved("backward", "uint8") == layers * tokens * (hidden + 1)
    assert moved("forward", "float64") == layers * 8 * (tokens * 2 + 2 * tokens * hidden)
    assert moved("backward", "float64") == layers * 8 * (2 * tokens * hidden + 2 * tokens * 2)


def test_all_gather_and_nodes_move_bytes_too() -> None:
    for layout in (Layout(dp=2, ep=2, dispatcher="all_gather"), CASES[2][0]):
        calls = trained(layout, Task("experts", steps=2, fp8_dispatch=True), threads=True)[0]["calls"]
        wide = MODELS["experts"].hidden + 1
        for phase in ("forward", "backward"):
            narrow = [c for c in calls if c.dtype == "uint8" and c.phase == phase]
            assert narrow and all(c.bytes % wide == 0 for c in narrow), (layout, phase)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_format(dtype: torch.dtype) -> None:
    """Beside codes found by their definition; packing again changes nothing, and zero, inf and NaN survive."""
    x = heavy_tailed(20, 300, seed=1).to(dtype)
    x[3] = 0
    x[4] *= 2.0**-110 if dtype != torch.float64 else 2.0**-140
    packed = pack(x)
    assert packed.dtype == torch.uint8 and packed.shape == (20, 300 + 3)
    y = unpack(packed, 300, dtype)
    for row, got in zip(x.double(), y.double(), strict=True):
        for block, mine in zip(row.split(128), got.split(128), strict=True):
            amax = max(block.abs().max().item(), 448 * 2.0**-126)
            scale = 2.0 ** int(torch.tensor(amax / 448, dtype=torch.float64).log2().ceil())
            assert torch.equal(mine, torch.from_numpy(nearest((block / scale).numpy(), "e4m3")) * scale)
    assert torch.equal(rounded(y), y) and torch.equal(pack(y[:0]), packed[:0])
    x[5, 200], x[6, 299] = torch.inf, torch.nan
    found = rounded(x).isnan()
    assert found[5].nonzero().flatten().tolist() == list(range(128, 256)) and found[6, 256:].all()
    assert found.sum() == 128 + 44


def test_a_gradient_is_rounded_on_its_way_back() -> None:
    x = heavy_tailed(4, 130, seed=2).requires_grad_()
    grad = heavy_tailed(4, 130, seed=3)

    def gradient(there: bool, back: bool) -> tuple[Tensor, Tensor]:
        y = rounded_as_sent(x, there, back)
        return y.detach(), torch.autograd.grad(y, x, grad)[0]

    for there, back in ((True, False), (False, True)):
        y, dx = gradient(there, back)
        assert torch.equal(y, rounded(x.detach()) if there else x.detach())
        assert torch.equal(dx, rounded(grad) if back else grad)
