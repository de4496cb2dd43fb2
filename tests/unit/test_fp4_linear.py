"""A linear in NVFP4: error beside float64, what is unbiased, and that nothing is drawn twice or by chance."""

import pytest
import torch
from torch import Tensor

from megalite.comm import Communicator
from megalite.mesh import Mesh
from megalite.parallel.fp4 import Fp4, Text

ALONE = Communicator(Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": 1}))
M, N, K = 64, 48, 80


def layer(name: str = "w", seed: int = 1, rows: int = 4) -> Fp4:
    text = Text()
    text.tokens = torch.arange(M).view(rows, -1) * 7 % 31
    return Fp4(ALONE, None, False, seed, name, text)


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((M, K), (N, K), (M, N)))
    x[:, 3] *= 20  # an outlier, as activations have
    return x.to(dtype), w.to(dtype), dy.to(dtype)


def products(fp4: Fp4, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x.clone().requires_grad_(), torch.nn.Parameter(w.clone())
    y = fp4.linear(x, w, None, None)
    y.backward(dy)
    assert x.grad is not None
    assert w.grad is not None
    return y.detach(), x.grad, w.grad


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_err_as_much_as_four_bits_do(dtype: torch.dtype) -> None:
    """A rounding to e2m1 is off by at most a step of 2 beside 4 to 6, a sixth to a quarter; for normal numbers in
    blocks of 16, by a tenth in the root mean square, and the scale's own rounding (2⁻⁴) moves the top. Two factors add
    as squares; random rounding is √2 further off."""
    x, w, dy = tensors(dtype)
    exact = x.double() @ w.double().t(), dy.double() @ w.double(), dy.double().t() @ x.double()
    for found, true in zip(products(layer(), x, w, dy), exact, strict=True):
        assert found.dtype == dtype and 0.02 < off(found, true) < 0.2


def test_gradients_are_right_on_the_average() -> None:
    """Over many draws the rounding of the output's gradient leaves no trace: what is left is the other factor's."""
    x, w, dy = tensors()
    draws = [products(layer(seed=seed), x, w, dy)[1] for seed in range(200)]
    quantised = layer().quantized("weight", w.t(), "KN").t()
    single, mean = off(draws[0], dy @ quantised), off(torch.stack(draws).mean(0), dy @ quantised)
    assert mean < 2 * single / 200**0.5


def test_bits_follow_name_seed_and_text_alone() -> None:
    x, w, dy = tensors()
    same, again = products(layer(), x, w, dy), products(layer(), x, w, dy)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    for other in (layer("v"), layer(seed=2), layer(rows=2)):
        assert not torch.equal(products(other, x, w, dy)[1], same[1])
    half = layer()
    assert half.text.tokens is not None
    half.text.tokens = half.text.tokens[:2]  # the first two rows of text alone: their tokens draw the same
    below = torch.zeros(M // 2)
    bits = layer()
    bits.tokens, half.tokens = bits.text.tokens, half.text.tokens
    values = torch.zeros(M, N)
    assert torch.equal(bits._bits(values, "MN")[: len(below)], half._bits(values[: len(below)], "MN"))


def test_the_transform_cancels_in_the_weights_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is rounded, also for tokens that are no multiple of 16."""
    seen: list[Tensor] = []
    monkeypatch.setattr(Fp4, "quantized", lambda _, kind, values, dims: seen.append(values) or values)
    x, _, dy = (t[:37] for t in tensors())
    torch.testing.assert_close(layer().weight_gradient(x, dy, x.dtype), dy.t() @ x, rtol=1e-12, atol=1e-12)
    assert [tuple(values.shape) for values in seen] == [(N, 48), (K, 48)]
    assert not torch.equal(seen[0][:, :37], dy.t())


def test_what_is_no_number_stays_none() -> None:
    x, w, dy = tensors()
    x[3, 5] = torch.nan
    y, grad_x, grad_w = products(layer(), x, w, dy)
    assert y.isnan().any() and grad_x.isfinite().all() and grad_w.isnan().any()


def test_tokens_that_fill_up_to_16_draw_for_themselves() -> None:
    """After the transform they hold mixtures of tokens, whose rounding must not be the same one every time."""
    drawn = []
    for text in (1, 2):
        fp4 = layer()
        fp4.tokens = torch.arange(37)[None] * text
        drawn.append(fp4._bits(torch.zeros(N, 48), "NM")[:, 37:])
    assert drawn[0].unique(dim=1).shape == drawn[0].shape and (drawn[0] == drawn[1]).float().mean() < 0.01
