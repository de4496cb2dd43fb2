"""FP8 matrices with scales: made, widened again, and multiplied.

x ≈ codes · scale, a scale for every block of the recipe: "tensorwise" [1, 1], "rowwise" [M, 1], "blockwise_1x128"
[M, ⌈K/128⌉] (activations), "blockwise_128x128" [⌈M/128⌉, ⌈K/128⌉] (weights; both as DeepSeek-V3 trained,
arXiv:2412.19437), "mxfp8" [M, ⌈K/32⌉] in float8_e8m0fnu (OCP microscaling formats 1.0). Blocks run along the last dim,
which is the one a product sums over: quantise the transpose for a product over the other.
"""

import torch
from torch import Tensor

from megalite_kernels import fp8_cpu, native, reference
from megalite_kernels.dispatch import choose
from megalite_kernels.reference.fp8 import BLOCKS, EXPONENTS, dequantize_fp8, fp8_scale, scale_shape

__all__ = ["dequantize_fp8", "fp8_amax", "fp8_scale", "quantize_fp8", "scaled_mm"]


def fp8_amax(x_MK: Tensor, *, recipe: str, backend: str = "auto") -> Tensor:
    """Largest |x| of every block, float32 in the shape of the scales: what ranks agree on before they quantise."""
    _check("fp8_amax", x_MK, recipe)
    chosen = choose("fp8_amax", backend, x_MK.device.type, x_MK.dtype)
    if chosen == "triton":
        from megalite_kernels.gpu import quantize

        return quantize.fp8_amax(x_MK.detach(), recipe)
    if chosen == "native" and native.usable(x_MK):
        return fp8_cpu.fp8_amax(x_MK.detach(), recipe)
    return reference.fp8_amax(x_MK, recipe=recipe)


def quantize_fp8(
    x_MK: Tensor,
    *,
    recipe: str,
    dtype: torch.dtype = torch.float8_e4m3fn,
    transpose_too: bool = False,
    scale: Tensor | None = None,
    power_of_two: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """(codes [M, K] of `dtype`, scales), and with `transpose_too` (…, codes [K, M], scales) of the transpose.

    To nearest even, saturating; a block with an inf or NaN becomes NaN throughout; see the reference. `scale`: given
    and not found, of the recipe's shape (delayed scaling, or agreed with other ranks), which cuts an inf off; then
    `transpose_too` needs a recipe whose blocks are the same both ways. `power_of_two`: scales rounded up to one.
    Carries no gradient.
    """
    _check("quantize_fp8", x_MK, recipe)
    if dtype not in EXPONENTS:
        raise ValueError(f"quantize_fp8: codes are float8_e4m3fn or float8_e5m2, not {dtype}")
    if scale is not None:
        expected = scale_shape(tuple(x_MK.shape), recipe), _scale_dtype(recipe)
        if (tuple(scale.shape), scale.dtype) != expected or scale.device != x_MK.device:
            raise ValueError(f"quantize_fp8: {recipe} takes a scale of {expected}, not {scale.shape, scale.dtype}")
        rows, columns = BLOCKS[recipe]
        if transpose_too and rows != columns:
            raise ValueError(f"quantize_fp8: a scale given for {recipe} says nothing of the transpose's blocks")
    chosen = choose("quantize_fp8", backend, x_MK.device.type, x_MK.dtype)
    if chosen == "native" and native.usable(x_MK):
        return fp8_cpu.quantize_fp8(x_MK.detach(), recipe, dtype, transpose_too, scale, power_of_two)
    if chosen != "triton":
        return reference.quantize_fp8(
            x_MK, recipe=recipe, dtype=dtype, transpose_too=transpose_too, scale=scale, power_of_two=power_of_two
        )
    from megalite_kernels.gpu import quantize

    given = None if scale is None else _bytes(scale)
    out = quantize.quantize_fp8(x_MK.detach(), recipe, dtype, transpose_too, given, power_of_two)
    codes, scales, codes_t, scales_t = (x.view(_scale_dtype(recipe)) if x.dtype == torch.uint8 else x for x in out)
    return (codes, scales, codes_t, scales_t) if transpose_too else (codes, scales)


def scaled_mm(
    a_MK: Tensor,
    scale_a: Tensor,
    b_NK: Tensor,
    scale_b: Tensor,
    *,
    recipe_a: str,
    recipe_b: str,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """(a · scales) · (b · scales)ᵀ [M, N], summed in float32; in float64 where `out_dtype` is.

    "mxfp8" goes with itself alone, every other recipe with each other. For a linear layer y = x wᵀ: forward x and w;
    the gradient of x is dy with wᵀ's codes, that of w is dyᵀ with xᵀ.
    """
    for x, scale, recipe in ((a_MK, scale_a, recipe_a), (b_NK, scale_b, recipe_b)):
        _check("scaled_mm", x, recipe)
        expected = scale_shape(tuple(x.shape), recipe), _scale_dtype(recipe)
        if x.dtype not in EXPONENTS or (tuple(scale.shape), scale.dtype) != expected:
            found = f"{x.dtype} and {tuple(scale.shape), scale.dtype}"
            raise ValueError(f"scaled_mm: {recipe} takes FP8 codes and scales of {expected}, not {found}")
    if a_MK.shape[1] != b_NK.shape[1] or (recipe_a == "mxfp8") != (recipe_b == "mxfp8"):
        shapes = f"{list(a_MK.shape)} in {recipe_a} and {list(b_NK.shape)} in {recipe_b}"
        raise ValueError(f"scaled_mm: needs a [M, K] and b [N, K], both or neither in mxfp8, not {shapes}")
    features = (
        ("recipes", (recipe_a, recipe_b)),
        ("aligned", b_NK.shape[0] % 16 == 0 and b_NK.shape[1] % 16 == 0),
        ("e5m2", a_MK.dtype == b_NK.dtype == torch.float8_e5m2),
        ("empty", not a_MK.numel() or not b_NK.numel()),
    )
    chosen = choose("scaled_mm", backend, a_MK.device.type, out_dtype, features)
    if chosen == "torch":
        across = scale_b.t() if recipe_b == "rowwise" else scale_b.expand(1, b_NK.shape[0])
        down = scale_a.expand(a_MK.shape[0], 1)
        if recipe_a == recipe_b == "tensorwise":
            down, across = scale_a, scale_b
        return torch._scaled_mm(
            a_MK.contiguous(), b_NK.contiguous().t(), down.contiguous(), across.contiguous(), out_dtype=out_dtype
        )
    if chosen == "triton":
        from megalite_kernels.gpu import scaled_mm

        return scaled_mm.scaled_mm(a_MK, _bytes(scale_a), b_NK, _bytes(scale_b), recipe_a, recipe_b, out_dtype)
    if chosen == "native" and native.plain(a_MK, scale_a, b_NK, scale_b):
        return fp8_cpu.scaled_mm(a_MK, scale_a, b_NK, scale_b, recipe_a, recipe_b, out_dtype)
    return reference.scaled_mm(a_MK, scale_a, b_NK, scale_b, recipe_a=recipe_a, recipe_b=recipe_b, out_dtype=out_dtype)


def _scale_dtype(recipe: str) -> torch.dtype:
    return torch.float8_e8m0fnu if recipe == "mxfp8" else torch.float32


def _bytes(scale: Tensor) -> Tensor:
    """Triton has no type for E8M0."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def _check(op: str, x: Tensor, recipe: str) -> None:
    if recipe not in BLOCKS:
        raise ValueError(f"{op}: no recipe {recipe!r}; there are {', '.join(BLOCKS)}")
    if x.dim() != 2:
        raise ValueError(f"{op}: needs a matrix, not {list(x.shape)}")
