"""FP8 quantisers: scales and codes of a tile in one pass, and of its transpose where that is wanted too.

Recipes whose blocks fit a tile (1×128, 128×128, MX) take one launch; for a row's or the whole matrix's amax a launch
finds that of every tile, then a second one rounds. Amax is found on the numbers' bits, whose order is the numbers' own
with inf and NaN above them all. Chips without OCP FP8 in hardware round by integer arithmetic, to the same codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch
from megalite_kernels.reference.fp8 import BLOCKS, EXPONENTS, SMALLEST_SCALE, fp8_scale, scale_shape

INFINITY = tl.constexpr(0x7F800000)
LEAST = tl.constexpr(SMALLEST_SCALE)


def hardware(chip: Chip) -> bool:
    """Whether it converts and multiplies OCP FP8 (gfx942 has other codes)."""
    return chip.fp8 is not None and isinstance(chip.target, int)


def config(chip: Chip, recipe: str, transpose_too: bool) -> dict[str, int]:
    """A tile of whole blocks, both ways where both are wanted; 32 elements a thread."""
    if recipe == "blockwise_128x128" or (transpose_too and recipe == "blockwise_1x128"):
        tile = 128, 128
    elif transpose_too:
        tile = 64, 64
    else:
        tile = 32, 128
    return {"TILE_M": tile[0], "TILE_K": tile[1], "num_warps": tile[0] * tile[1] // (32 * chip.warp)}


@triton.jit
def _encode(x, E5M2: tl.constexpr):
    """uint8 codes of float32 x: to nearest even, saturating, NaN -> 0x7f."""
    SHIFT: tl.constexpr = 21 if E5M2 else 20  # bits of a float32's mantissa that the code lacks
    BIAS: tl.constexpr = 112 << 2 if E5M2 else 120 << 3  # what the exponents' biases differ by
    NORMAL: tl.constexpr = 113 << 23 if E5M2 else 121 << 23  # bits of the smallest normal code
    ALIGN: tl.constexpr = 128.0 if E5M2 else 16384.0  # a float32 near it has the last place of subnormal codes
    ALIGN_BITS: tl.constexpr = 134 << 23 if E5M2 else 141 << 23
    LARGEST: tl.constexpr = 0x7B if E5M2 else 0x7E
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    half = (1 << (SHIFT - 1)) - 1 + ((magnitude >> SHIFT) & 1)  # one less than half a place where the code is even
    normal = ((magnitude + half) >> SHIFT) - BIAS
    subnormal = (magnitude.to(tl.float32, bitcast=True) + ALIGN).to(tl.int32, bitcast=True) - ALIGN_BITS
    code = tl.minimum(tl.where(magnitude < NORMAL, subnormal, normal), LARGEST) | ((bits >> 24) & 0x80)
    return tl.where(magnitude > INFINITY, 0x7F, code).to(tl.uint8)


@triton.jit
def _power(code):
    """2^(code - 127) as float32; NaN for 255 and above."""
    bits = tl.where(code == 0, 0x400000, code << 23)  # 2⁻¹²⁷ is a subnormal float32
    return tl.where(code >= 255, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _tile(columns, TILE_K: tl.constexpr):
    """(tile down, across) of this program, in int64: rows · columns may pass 2³¹; other axes of a grid are short."""
    across = tl.cdiv(columns, TILE_K)
    return (tl.program_id(0) // across).to(tl.int64), (tl.program_id(0) % across).to(tl.int64)


@triton.jit
def _amax_of(x, G_M: tl.constexpr, G_K: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr):
    """Bits of the largest |x| of every group of the tile [TILE_M / G_M, TILE_K / G_K]."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.max(tl.reshape(magnitude, (TILE_M // G_M, G_M, TILE_K // G_K, G_K)), axis=3), axis=1)


@triton.jit
def _write(
    x, tile_m, tile_k, m, k, inside, scale_ptr, codes_ptr, rows, columns, scale_stride_m, scale_stride_k,
    code_stride_m, code_stride_k,
    GIVEN: tl.constexpr, MX: tl.constexpr, POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr, HARDWARE: tl.constexpr,
    LARGEST: tl.constexpr, EXPONENT: tl.constexpr, G_M: tl.constexpr, G_K: tl.constexpr, TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
):  # fmt: skip
    """Store scales, unless they are given, and codes of the tile x."""
    group_m = tile_m * (TILE_M // G_M) + tl.arange(0, TILE_M // G_M)
    group_k = tile_k * (TILE_K // G_K) + tl.arange(0, TILE_K // G_K)
    held = (group_m * G_M < rows)[:, None] & (group_k * G_K < columns)[None, :]
    place = group_m[:, None] * scale_stride_m + group_k[None, :] * scale_stride_k
    if GIVEN:
        scale = tl.load(scale_ptr + place, mask=held, other=1)
        if MX:
            inverse = tl.where(scale == 255, float("nan"), _power(254 - scale.to(tl.int32)))
        else:
            inverse = tl.div_rn(1.0, scale)
    else:
        amax = _amax_of(x, G_M, G_K, TILE_M, TILE_K)
        if MX:
            exponent = amax >> 23
            code = tl.where(exponent == 255, 255, tl.maximum(exponent - EXPONENT, 0))
            tl.store(scale_ptr + place, code.to(tl.uint8), mask=held)
            inverse = tl.where(code == 255, float("nan"), _power(254 - code))
        else:
            scale = tl.maximum(
                tl.div_rn(tl.where(amax < INFINITY, amax, 0).to(tl.float32, bitcast=True), LARGEST), LEAST
            )
            if POWER_OF_TWO:
                scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & INFINITY).to(tl.float32, bitcast=True)
            scale = tl.where(amax < INFINITY, scale, float("nan"))
            tl.store(scale_ptr + place, scale, mask=held)
            inverse = tl.div_rn(1.0, scale)
    blocks = tl.reshape(x, (TILE_M // G_M, G_M, TILE_K // G_K, G_K)) * inverse[:, None, :, None]
    scaled = tl.reshape(blocks, (TILE_M, TILE_K))
    if HARDWARE:
        codes = scaled.to(codes_ptr.dtype.element_ty)
    else:
        codes = _encode(scaled, E5M2)
    tl.store(codes_ptr + m[:, None] * code_stride_m + k[None, :] * code_stride_k, codes, mask=inside)


@triton.jit
def _quantize(
    x_ptr, scale_ptr, codes_ptr, scale_t_ptr, codes_t_ptr, rows, columns, stride_m, stride_k, scale_stride_m,
    scale_stride_k, scale_t_stride_m, scale_t_stride_k,
    TRANSPOSED: tl.constexpr, GIVEN: tl.constexpr, MX: tl.constexpr, POWER_OF_TWO: tl.constexpr, E5M2: tl.constexpr,
    HARDWARE: tl.constexpr, LARGEST: tl.constexpr, EXPONENT: tl.constexpr, G_M: tl.constexpr, G_K: tl.constexpr,
    T_M: tl.constexpr, T_K: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_k = _tile(columns, TILE_K)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    k = tile_k * TILE_K + tl.arange(0, TILE_K)
    inside = (m < rows)[:, None] & (k < columns)[None, :]
    x = tl.load(x_ptr + m[:, None] * stride_m + k[None, :] * stride_k, mask=inside, other=0.0).to(tl.float32)
    _write(
        x, tile_m, tile_k, m, k, inside, scale_ptr, codes_ptr, rows, columns, scale_stride_m, scale_stride_k,
        columns, 1, GIVEN, MX, POWER_OF_TWO, E5M2, HARDWARE, LARGEST, EXPONENT, G_M, G_K, TILE_M, TILE_K,
    )  # fmt: skip
    if TRANSPOSED:
        _write(
            x, tile_m, tile_k, m, k, inside, scale_t_ptr, codes_t_ptr, rows, columns, scale_t_stride_m,
            scale_t_stride_k, 1, rows, GIVEN, MX, POWER_OF_TWO, E5M2, HARDWARE, LARGEST, EXPONENT, T_M, T_K,
            TILE_M, TILE_K,
        )  # fmt: skip


@triton.jit
def _amax(
    x_ptr, amax_ptr, rows, columns, stride_m, stride_k, across,
    G_M: tl.constexpr, G_K: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_k = _tile(columns, TILE_K)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    k = tile_k * TILE_K + tl.arange(0, TILE_K)
    inside = (m < rows)[:, None] & (k < columns)[None, :]
    x = tl.load(x_ptr + m[:, None] * stride_m + k[None, :] * stride_k, mask=inside, other=0.0).to(tl.float32)
    group_m = tile_m * (TILE_M // G_M) + tl.arange(0, TILE_M // G_M)
    group_k = tile_k * (TILE_K // G_K) + tl.arange(0, TILE_K // G_K)
    held = (group_m * G_M < rows)[:, None] & (group_k * G_K < columns)[None, :]
    place = group_m[:, None] * across + group_k[None, :]
    tl.store(amax_ptr + place, _amax_of(x, G_M, G_K, TILE_M, TILE_K), mask=held)


def amax(x_MK: Tensor, recipe: str, transposed: bool = False, chip: Chip | None = None) -> Tensor:
    """Largest |x| of every block in float32, of x's transpose if asked: each tile's own, then the largest of those."""
    (rows, columns), (m, k) = BLOCKS[recipe], x_MK.shape
    tile = (
        {"TILE_M": 64, "TILE_K": 64, "num_warps": 4}
        if transposed
        else config(chip or chip_of(x_MK.device), recipe, False)
    )
    if transposed:
        rows, columns = columns, rows
    group = rows or tile["TILE_M"], columns or tile["TILE_K"]
    found = x_MK.new_empty((triton.cdiv(m, group[0]), triton.cdiv(k, group[1])), dtype=torch.int32)
    grid = triton.cdiv(m, tile["TILE_M"]) * triton.cdiv(k, tile["TILE_K"])
    launch(_amax, (grid,), x_MK, found, m, k, *x_MK.stride(), found.shape[1], G_M=group[0], G_K=group[1], **tile)
    for dim, size in enumerate((rows, columns)):
        if not size:
            shape = [1 if d == dim else n for d, n in enumerate(found.shape)]
            found = found.amax(dim, keepdim=True) if found.shape[dim] else found.new_zeros(shape)
    return (found.t().contiguous() if transposed else found).view(torch.float32)


def forward(
    x_MK: Tensor, recipe: str, dtype: torch.dtype, transpose_too: bool, scale: Tensor | None, power_of_two: bool,
    chip: Chip | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(codes, scales, codes of the transpose or nothing, its scales or nothing); E8M0 scales as uint8."""
    chip = chip or chip_of(x_MK.device)
    (m, k), (rows, columns), mx = x_MK.shape, BLOCKS[recipe], recipe == "mxfp8"
    options = config(chip, recipe, transpose_too)
    given = scale is not None or not rows or not columns
    kind = torch.uint8 if mx else torch.float32
    if scale is not None:
        scale_t = scale.t().clone(memory_format=torch.contiguous_format) if transpose_too else scale.new_empty((0, 0))
    elif given:
        scale = fp8_scale(amax(x_MK, recipe, chip=chip), dtype=dtype, power_of_two=power_of_two)
        if not transpose_too:
            scale_t = scale.new_empty((0, 0))
        elif rows:
            found = amax(x_MK, recipe, transposed=True, chip=chip)
            scale_t = fp8_scale(found, dtype=dtype, power_of_two=power_of_two)
        else:
            scale_t = scale.clone()
    else:
        scale = x_MK.new_empty(scale_shape((m, k), recipe), dtype=kind)
        scale_t = x_MK.new_empty(scale_shape((k, m), recipe) if transpose_too else (0, 0), dtype=kind)
    codes = x_MK.new_empty((m, k), dtype=torch.uint8)
    codes_t = x_MK.new_empty((k, m) if transpose_too else (0, 0), dtype=torch.uint8)
    seen = dtype if hardware(chip) else torch.uint8
    group = rows or options["TILE_M"], columns or options["TILE_K"]
    group_t = columns or options["TILE_M"], rows or options["TILE_K"]
    launch(
        _quantize, (triton.cdiv(m, options["TILE_M"]) * triton.cdiv(k, options["TILE_K"]),),
        x_MK, scale, codes.view(seen), scale_t, codes_t.view(seen), m, k, *x_MK.stride(),
        scale.shape[1] if rows else 0, 1 if columns else 0, 1 if columns else 0, scale_t.shape[1] if rows else 0,
        TRANSPOSED=transpose_too, GIVEN=given, MX=mx, POWER_OF_TWO=power_of_two, E5M2=dtype == torch.float8_e5m2,
        HARDWARE=hardware(chip), LARGEST=torch.finfo(dtype).max, EXPONENT=EXPONENTS[dtype], G_M=group[0], G_K=group[1],
        T_M=group_t[0], T_K=group_t[1], **options,
    )  # fmt: skip
    return codes.view(dtype), scale, codes_t.view(dtype), scale_t


@custom_op("megalite::triton_quantize_fp8", mutates_args=())
def quantize_fp8(
    x_MK: Tensor, recipe: str, dtype: torch.dtype, transpose_too: bool, scale: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward`; a given scale comes back as a copy."""
    given = None if scale is None else scale.clone()
    return forward(x_MK, recipe, dtype, transpose_too, given, power_of_two)


@quantize_fp8.register_fake
def _(
    x_MK: Tensor, recipe: str, dtype: torch.dtype, transpose_too: bool, scale: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, k = x_MK.shape
    kind = torch.uint8 if recipe == "mxfp8" else torch.float32
    shape_t, scales_t = ((k, m), scale_shape((k, m), recipe)) if transpose_too else ((0, 0), (0, 0))
    return (
        x_MK.new_empty((m, k), dtype=dtype),
        x_MK.new_empty(scale_shape((m, k), recipe), dtype=kind),
        x_MK.new_empty(shape_t, dtype=dtype),
        x_MK.new_empty(scales_t, dtype=kind),
    )


@custom_op("megalite::triton_fp8_amax", mutates_args=())
def fp8_amax(x_MK: Tensor, recipe: str) -> Tensor:
    return amax(x_MK, recipe)


@fp8_amax.register_fake
def _(x_MK: Tensor, recipe: str) -> Tensor:
    return x_MK.new_empty(scale_shape(tuple(x_MK.shape), recipe), dtype=torch.float32)
