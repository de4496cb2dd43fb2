"""FP8 quantisers, to the bit, and scaled products: ragged edges, blocks of nothing, of zeros, of tiny numbers."""

from collections.abc import Callable

import torch
from torch import Tensor

from megalite_kernels.fp8 import quantize_fp8, scaled_mm
from megalite_kernels.gpu import quantize
from megalite_kernels.gpu import scaled_mm as product
from megalite_kernels.gpu.chips import Chip
from megalite_kernels.reference.fp8 import BLOCKS, scale_shape
from megalite_kernels.validate.case import Case, Sweep, Traffic, random

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _bits(x: Tensor) -> Tensor:
    """Integers are compared exactly."""
    return x.view(torch.uint8 if x.element_size() == 1 else torch.int32)


def _quantized(
    recipe: str, dtype: torch.dtype = E4M3, transpose_too: bool = False, power_of_two: bool = False,
    scale: float | None = None,
) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    def call(x: Tensor, backend: str) -> tuple[Tensor, ...]:
        given = None if scale is None else torch.full((1, 1), scale, device=x.device)
        options = {"transpose_too": transpose_too, "power_of_two": power_of_two, "scale": given}
        return tuple(_bits(y) for y in quantize_fp8(x, recipe=recipe, dtype=dtype, backend=backend, **options))  # type: ignore[arg-type]

    return call


def _wild(m: int, k: int) -> Tensor:
    """Heavy tails over thirty powers of ten, some zeros."""
    x = random(m, k) * torch.exp(8 * random(m, k, seed=1))
    return x * (random(m, k, seed=2) > -1.5)


def _holes(m: int, k: int) -> Tensor:
    """Rows of zeros, of float32's smallest numbers, and one element each inf, -inf and NaN."""
    x = random(m, k)
    x[1], x[2] = 0.0, random(k, seed=3) * 1e-42
    x[4, 1], x[5, -1], x[6, 2] = float("inf"), float("-inf"), float("nan")
    return x


def _quantizer_traffic(recipe: str, m: int, k: int, both: bool) -> Traffic:
    """x once and codes once in each direction; scales once; whole rows and the matrix are read twice, and their tiles'
    amax is left to sum up."""
    rows, columns = BLOCKS[recipe]
    down, across = scale_shape((m, k), recipe)
    scale = 1 if recipe == "mxfp8" else 4
    if rows and columns:
        return Traffic(
            4 * m * k,
            (1 + both) * m * k
            + scale * (down * across + both * scale_shape((k, m), recipe)[0] * scale_shape((k, m), recipe)[1]),
        )
    assert not both
    tile = quantize.config(quantize.chip_of(torch.device("cpu")), recipe, False)
    tiles_m, tiles_k = -(-m // tile["TILE_M"]), -(-k // tile["TILE_K"])
    found = (m if rows else tiles_m) * tiles_k
    read = m * tiles_k if rows else tiles_m * tiles_k
    return Traffic(2 * 4 * m * k + 4 * read, m * k + 4 * found)


def _quantize_case(
    name: str, inputs: Callable[[], Tensor], call: Callable[..., object], traffic: Traffic | None = None
) -> Case:
    return Case("quantize_fp8", name, lambda: (inputs(),), call, traffic=traffic)


QUANTIZERS = (
    *(
        _quantize_case(f"{recipe}, 70 × 200{', and the transpose' * both}", lambda: _wild(70, 200),
                       _quantized(recipe, transpose_too=both))
        for recipe in BLOCKS for both in (False, True)
    ),
    *(
        _quantize_case(f"{recipe}, zeros, subnormals, inf and NaN", lambda: _holes(9, 40),
                       _quantized(recipe, transpose_too=True))
        for recipe in BLOCKS
    ),
    *(
        _quantize_case(f"{recipe} to e5m2", lambda: _wild(33, 65), _quantized(recipe, E5M2, transpose_too=True))
        for recipe in BLOCKS
    ),
    _quantize_case("powers of two", lambda: _wild(20, 150), _quantized("blockwise_1x128", power_of_two=True)),
    _quantize_case("powers of two, inf", lambda: _holes(9, 40), _quantized("rowwise", power_of_two=True)),
    _quantize_case("a delayed scale, saturating", lambda: 40 * random(20, 40),
                   _quantized("tensorwise", scale=0.125, transpose_too=True)),
    _quantize_case("a delayed scale of e5m2, inf", lambda: _holes(9, 40), _quantized("tensorwise", E5M2, scale=0.125)),
    _quantize_case("one number", lambda: random(1, 1), _quantized("blockwise_128x128", transpose_too=True)),
    *(
        _quantize_case(f"{recipe}, no rows", lambda: random(0, 40), _quantized(recipe, transpose_too=True))
        for recipe in BLOCKS
    ),
    _quantize_case("rows of nothing", lambda: random(5, 0), _quantized("rowwise", transpose_too=True)),
    _quantize_case("strided input", lambda: random(300, 35).T, _quantized("blockwise_1x128", transpose_too=True)),
    *(
        _quantize_case(f"{recipe}, 40 × 136", lambda: random(40, 136), _quantized(recipe),
                       _quantizer_traffic(recipe, 40, 136, False))
        for recipe in BLOCKS
    ),
    _quantize_case("mxfp8, 40 × 70 both ways", lambda: random(40, 70), _quantized("mxfp8", transpose_too=True),
                   _quantizer_traffic("mxfp8", 40, 70, True)),
)  # fmt: skip


def _product(
    recipe_a: str, recipe_b: str, dtype_a: torch.dtype = E4M3, dtype_b: torch.dtype = E4M3
) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor, backend: str) -> Tensor:
        a, scale_a = quantize_fp8(x, recipe=recipe_a, dtype=dtype_a, backend="reference")
        b, scale_b = quantize_fp8(w, recipe=recipe_b, dtype=dtype_b, backend="reference")
        return scaled_mm(
            a, scale_a, b, scale_b, recipe_a=recipe_a, recipe_b=recipe_b, out_dtype=x.dtype, backend=backend
        )

    return call


def _mm_case(name: str, m: int, n: int, k: int, call: Callable[..., Tensor], traffic: Traffic | None = None) -> Case:
    return Case("scaled_mm", name, lambda: (_tailed(m, k), _tailed(n, k, 5)), call, traffic=traffic)


def _tailed(m: int, k: int, seed: int = 0) -> Tensor:
    return random(m, k, seed=seed) * torch.exp(random(m, k, seed=seed + 1))


def _mm_traffic(m: int, n: int, k: int) -> Traffic:
    """Every tile reads its rows of both, and their scales a block, and computes whole blocks; c once."""
    options = product.config(quantize.chip_of(torch.device("cpu")), False)
    down, across, blocks = -(-m // options["TILE_M"]), -(-n // options["TILE_N"]), -(-k // options["BLOCK_K"])
    loaded = across * m * (k + 4 * blocks) + down * n * (k + 4 * blocks)
    flops = 2 * down * options["TILE_M"] * across * options["TILE_N"] * blocks * options["BLOCK_K"]
    return Traffic(loaded, 4 * m * n, flops)


PRODUCTS = (
    _mm_case("1×128 by 128×128", 70, 150, 200, _product("blockwise_1x128", "blockwise_128x128"),
             _mm_traffic(70, 150, 200)),
    _mm_case("1×128 by 1×128", 70, 20, 300, _product("blockwise_1x128", "blockwise_1x128")),
    _mm_case("128×128 by 1×128, e5m2 by e4m3", 33, 40, 130,
             _product("blockwise_128x128", "blockwise_1x128", E5M2, E4M3)),
    _mm_case("rowwise", 65, 33, 130, _product("rowwise", "rowwise")),
    _mm_case("tensorwise by rowwise, e4m3 by e5m2", 65, 33, 130, _product("tensorwise", "rowwise", E4M3, E5M2)),
    _mm_case("tensorwise by 128×128", 20, 140, 260, _product("tensorwise", "blockwise_128x128")),
    _mm_case("tensorwise, e5m2", 20, 140, 40, _product("tensorwise", "tensorwise", E5M2, E5M2)),
    _mm_case("mxfp8", 40, 50, 100, _product("mxfp8", "mxfp8")),
    _mm_case("mxfp8, e5m2", 10, 12, 33, _product("mxfp8", "mxfp8", E5M2, E5M2)),
    _mm_case("one by one", 1, 1, 1, _product("blockwise_1x128", "blockwise_128x128")),
    _mm_case("nothing to sum", 3, 4, 0, _product("rowwise", "rowwise")),
    _mm_case("no rows", 0, 4, 10, _product("mxfp8", "mxfp8")),
    Case("scaled_mm", "inf and NaN", lambda: (_holes(9, 40), random(12, 40)), _product("blockwise_1x128", "rowwise")),
)  # fmt: skip
CASES = (*QUANTIZERS, *PRODUCTS)


def _quantize_launches(m: int, k: int, recipe: str, both: bool, dtype: torch.dtype, chip: Chip) -> None:
    x = torch.empty((m, k), dtype=torch.bfloat16, device="meta")
    quantize.forward(x, recipe, dtype, both, None, False, chip)
    if recipe == "tensorwise":
        quantize.forward(x, recipe, dtype, both, x.new_empty((1, 1), dtype=torch.float32), False, chip)


def _product_launches(
    m: int, n: int, k: int, recipes: tuple[str, str], dtypes: tuple[torch.dtype, ...], chip: Chip
) -> None:
    (a, scale_a), (b, scale_b) = (
        (
            torch.empty((rows, k), dtype=dtype, device="meta"),
            torch.empty(
                scale_shape((rows, k), recipe),
                dtype=torch.uint8 if recipe == "mxfp8" else torch.float32,
                device="meta",
            ),
        )
        for rows, recipe, dtype in zip((m, n), recipes, dtypes, strict=True)
    )
    product.forward(a, scale_a, b, scale_b, *recipes, torch.bfloat16, chip)


def _quantize_sweep(recipe: str, both: bool, m: int = 8192, k: int = 4096, dtype: torch.dtype = E4M3) -> Sweep:
    stored = (1 + both) * m * k + (1 if recipe == "mxfp8" else 4) * (1 + both) * m * k // max(
        1, BLOCKS[recipe][0] * BLOCKS[recipe][1] or k
    )
    name = f"{recipe}{' and transpose' * both}, {m} × {k}{' e5m2' * (dtype == E5M2)}"
    return Sweep(
        "quantize_fp8",
        name,
        lambda chip: _quantize_launches(m, k, recipe, both, dtype, chip),
        moves=Traffic(2 * m * k, stored),
    )


def _product_sweep(m: int, n: int, k: int, a: str, b: str, dtype_a: torch.dtype = E4M3) -> Sweep:
    name = f"{a} by {b}, {m} × {n} × {k}{' e5m2 by e4m3' * (dtype_a == E5M2)}"
    moves = Traffic((m + n) * k, 2 * m * n, 2 * m * n * k)
    return Sweep(
        "scaled_mm", name, lambda chip: _product_launches(m, n, k, (a, b), (dtype_a, E4M3), chip), products=True,
        moves=moves, dtype=dtype_a,
    )  # fmt: skip


SWEEPS = (
    *(_quantize_sweep(recipe, both) for recipe in BLOCKS for both in (False, True)),
    _quantize_sweep("blockwise_1x128", True, dtype=E5M2),
    _product_sweep(8192, 4096, 4096, "blockwise_1x128", "blockwise_128x128"),
    _product_sweep(8192, 4096, 14336, "blockwise_1x128", "blockwise_128x128", E5M2),
    _product_sweep(4096, 14336, 8192, "blockwise_1x128", "blockwise_1x128"),
    _product_sweep(8192, 4096, 4096, "rowwise", "rowwise"),
    _product_sweep(8192, 4096, 4096, "tensorwise", "tensorwise"),
    _product_sweep(8192, 4096, 4096, "mxfp8", "mxfp8"),
)
