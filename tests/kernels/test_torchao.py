"""Our quantisers beside torchao (the extra of that name), where it has the same recipe."""

import megalite_kernels as kernels
import pytest
import torch
from megalite_kernels.reference import MOMENT_BLOCK, moment_amax, quantize_moment
from megalite_kernels.reference.fp4 import quantize_nvfp4
from megalite_kernels.reference.moments import dynamic_code
from torch import Tensor

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def heavy(rows: int = 256, columns: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * torch.exp(
        2 * torch.randn(rows, columns, generator=generator)
    )


def with_exact_scales(blocks: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Every block's largest number is the format's, times a power of two: then amax / largest and largest / amax, of
    which each rounds one, both are exact, and no code may differ."""
    rows, columns = blocks
    x = heavy()
    parts = x.view(256 // rows, rows, 512 // columns, columns)
    amax = parts.abs().amax((1, 3), keepdim=True)
    power = torch.exp2(torch.floor(torch.log2(amax)))
    parts *= power / amax * 0.999
    parts[:, 0, :, 0] = power[:, 0, :, 0]
    return x * torch.finfo(dtype).max


def same(codes: Tensor, theirs: Tensor) -> bool:
    return torch.equal(codes.view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_tensors_and_rows(recipe: str, dtype: torch.dtype) -> None:
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    granularity = ScalingGranularity.TENSORWISE if recipe == "tensorwise" else ScalingGranularity.AXISWISE
    axis = {} if recipe == "tensorwise" else {"axiswise_dim": -1}
    for power_of_two, x in ((True, heavy()), (False, with_exact_scales((1, 512), dtype))):
        share = tensor_to_scale(
            x, dtype, scaling_granularity=granularity, round_scales_to_power_of_2=power_of_two, **axis
        )
        codes, scales = kernels.quantize_fp8(x, recipe=recipe, dtype=dtype, power_of_two=power_of_two)
        assert same(codes, to_fp8_saturated(x * share, dtype))
        assert torch.equal(scales.view_as(share), 1 / share)


def test_blocks_as_deepseek_trains() -> None:
    from torchao.prototype.blockwise_fp8_training import kernels as theirs

    for recipe, blocks, quantize in (
        ("blockwise_1x128", (1, 128), theirs.torch_blockwise_scale_act_quant_lhs),
        ("blockwise_128x128", (128, 128), theirs.torch_blockwise_scale_weight_quant),
    ):
        x = with_exact_scales(blocks, E4M3)
        codes, scales = kernels.quantize_fp8(x, recipe=recipe)
        expected, inverse = quantize(x)
        assert same(codes, expected) and torch.equal(scales, inverse)
        x = heavy()  # scales then differ by a rounding, and so does what lies that near to a tie
        codes, scales = kernels.quantize_fp8(x, recipe=recipe)
        expected, inverse = quantize(x)
        torch.testing.assert_close(scales, inverse, rtol=2.0**-22, atol=0)
        assert (codes.view(torch.uint8) != expected.view(torch.uint8)).float().mean() < 1e-4


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_mxfp8(dtype: torch.dtype) -> None:
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    x = heavy()
    x[3, :32], x[4, 5], x[5, 40] = 0, float("nan"), 1e-42
    scales, expected = to_mx(x, dtype, 32)
    codes, ours = kernels.quantize_fp8(x, recipe="mxfp8", dtype=dtype)
    assert torch.equal(ours.view(torch.uint8), scales.view(torch.uint8).view(ours.shape))
    broken = ours.float().isnan().repeat_interleave(32, 1)  # the scale says so; torchao leaves such codes as they are
    a, b = (c.view(torch.uint8) for c in (codes, expected.view(codes.shape)))
    assert torch.equal(a[~broken], b[~broken]) and broken.sum() == 32


def test_nvfp4() -> None:
    from torchao.prototype.mx_formats.kernels import unpack_uint4
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    x = heavy()
    codes, blocks, scale = quantize_nvfp4(x)
    theirs, packed = nvfp4_quantize(x, per_tensor_scale=scale)
    small = blocks.float() < 2.0**-6  # whose scale torchao does not let fall below a normal number
    assert torch.equal(blocks.float()[~small], theirs.float()[~small]) and small.float().mean() < 0.2
    differ = (codes != unpack_uint4(packed)) & ~small.repeat_interleave(16, 1)
    assert differ.float().mean() < 1e-4, "they multiply by an inverse, which moves what is that near to a tie"


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_codes_of_moments(signed: bool) -> None:
    from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap, scale_tensor

    values = torch.tensor(create_dynamic_map(signed))
    torch.testing.assert_close(dynamic_code(signed), values, rtol=1e-6, atol=0)
    x = heavy() if signed else heavy().square()
    shares, scales = scale_tensor(x, MOMENT_BLOCK)
    codes, ours = quantize_moment(x, moment_amax(x), "dynamic" if signed else "dynamic_unsigned")
    assert torch.equal(ours.flatten(), scales)
    expected = quantize_8bit_with_qmap(shares, values).view(codes.shape)
    off = codes != expected
    kept_from_zero = torch.zeros_like(off) if signed else (expected == 0) & (codes == 1) & (x > 0)
    assert (off & ~kept_from_zero).float().mean() < 1e-4


def test_moments_in_fp8() -> None:
    from torchao.optim.subclass_fp8 import quantize_fp8

    x = heavy()
    codes, scales = quantize_moment(x, moment_amax(x), "e4m3")
    expected, theirs = quantize_fp8(x, MOMENT_BLOCK)
    assert same(codes, expected) and torch.equal(scales.flatten(), theirs)
