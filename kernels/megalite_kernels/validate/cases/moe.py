"""Mixture of experts: ties, NaN and −inf logits, empty experts, all tokens to one, dropped slots, ragged widths."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.gpu import grouped_gemm as gpu_gemm
from megalite_kernels.gpu import moe_permute as gpu_permute
from megalite_kernels.gpu import moe_route as gpu_route
from megalite_kernels.gpu.chips import Chip
from megalite_kernels.moe import grouped_gemm, moe_permute, moe_route, moe_unpermute
from megalite_kernels.reference.moe import sorted_rows
from megalite_kernels.validate.case import Case, Sweep, Traffic, random

INF, NAN = float("inf"), float("nan")


def _route(logits: Tensor, bias: Tensor | None = None, *, backend: str, k: int = 2, **options: Any) -> object:
    return moe_route(logits, k, bias_E=bias, backend=backend, **options)


def _bias(experts: int) -> Tensor:
    return random(experts, seed=5, scale=0.3).float()


def _choices(tokens: int, k: int, experts: int, seed: int = 0) -> Tensor:
    """k different experts for each token."""
    return random(tokens, experts, seed=seed).argsort(-1)[:, :k]


def _same(number: int, tokens: int, k: int = 1) -> Tensor:
    return torch.full((tokens, k), number)


def _permute(x: Tensor, indices: Tensor, *, backend: str, experts: int, pad_to: int | None = None) -> object:
    return moe_permute(x, indices, experts, pad_to=pad_to, backend=backend)


def _unpermute(y: Tensor, inverse: Tensor, probs: Tensor | None = None, *, backend: str) -> object:
    return moe_unpermute(y, inverse, probs, backend=backend)


def _inverse(tokens: int, k: int, rows: int) -> Tensor:
    """Places of slots among more rows than there are slots, some slots dropped."""
    places = torch.randperm(rows, generator=torch.Generator().manual_seed(3))[: tokens * k].view(tokens, k)
    places[::3, 0] = -1
    return places.int()


def _offsets(*counts: int) -> Tensor:
    return torch.tensor((0, *counts)).cumsum(0).int()


def _transposed(x: Tensor, w: Tensor, offsets: Tensor, *, backend: str) -> object:
    return grouped_gemm(x, w.transpose(1, 2), offsets, backend=backend)


def _gemm(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None = None, *, backend: str) -> object:
    return grouped_gemm(x, w, offsets, bias, backend=backend)


def _gemm_traffic(counts: tuple[int, ...], depth: int, width: int) -> Traffic:
    """Three float32 products in tiles of 64³/2: forward, dX, dW.

    A program that has a tile of rows loads them and a slice of its expert's weight; every program finds its expert in
    the offsets. dW's load an expert's rows once for each tile across the other side.
    """
    tile, step, rows, experts = 64, 32, sum(counts), len(counts)
    tiles = sum(-(-count // tile) for count in counts)
    launched = rows // tile + experts + 1

    def product(inner: int, outer: int) -> tuple[int, int, int]:
        across = -(-outer // tile)
        found = launched * across * (experts + 1 + 2) - across  # the group after the last expert has no end to load
        loaded = rows * inner * across + tiles * inner * outer + found
        return 4 * loaded, 4 * rows * outer, 2 * tiles * tile * across * tile * -(-inner // step) * step

    deep, across = -(-depth // tile), -(-width // tile)
    steps = sum(-(-count // step) for count in counts)
    weights = rows * (depth * across + width * deep) + 2 * experts * deep * across
    there, back = product(depth, width), product(width, depth)
    flops = 2 * deep * across * tile * tile * steps * step
    stored = there[1] + back[1] + 4 * experts * depth * width
    return Traffic(there[0] + back[0] + 4 * weights, stored, there[2] + back[2] + flops)


def _route_traffic(tokens: int, experts: int, k: int) -> Traffic:
    """Logits once each way; probabilities and int64 indices written, and read back; counts of one program."""
    logits, slots = 4 * tokens * experts, tokens * k
    return Traffic(2 * logits + 12 * slots, logits + 12 * slots + 4 * experts)


def _permute_traffic(tokens: int, k: int, experts: int, width: int) -> Traffic:
    """A row is read once and written k times, and k times and once on the way back. The sort reads indices three
    times, and four bytes a slot say where its expert begins, and twice where it lies; a byte, that its row is used."""
    slots, blocks, row = tokens * k, -(-tokens * k // gpu_permute.SLOTS), 4 * width
    loaded = 8 * slots * 3 + 4 * slots * 3 + slots + (tokens + slots) * row
    return Traffic(loaded, 4 * blocks * experts + 4 * slots + slots + (tokens + slots) * row)


SPECIAL = torch.tensor(
    [[0.0, -0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [-INF, 1.0, -INF, -INF], [NAN, 1.0, 2.0, 3.0], [1.0, -INF, 0.0, NAN]],
    dtype=torch.float64,
)
DEEPSEEK: dict[str, Any] = {"k": 4, "score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5}

ROUTES = (
    Case("moe_route", "21 tokens, 2 of 8", lambda: (random(21, 8),), _route, traffic=_route_traffic(21, 8, 2)),
    Case("moe_route", "not normalised, 3 of 60", lambda: (random(19, 60),), partial(_route, k=3, normalize=False)),
    Case("moe_route", "sigmoid, groups, bias", lambda: (random(35, 24), _bias(24)), partial(_route, **DEEPSEEK)),
    Case(
        "moe_route", "groups of one", lambda: (random(9, 6),), partial(_route, k=2, groups=6, top_groups=3),
    ),
    Case(
        "moe_route", "sigmoid as it is", lambda: (random(9, 40),),
        partial(_route, k=5, score="sigmoid", normalize=False, scale=0.5),
    ),
    Case("moe_route", "softmax with bias", lambda: (random(11, 10), _bias(10)), partial(_route, k=3)),
    Case("moe_route", "ties, −inf, NaN", lambda: (SPECIAL,), _route),
    Case("moe_route", "ties, −inf, NaN, sigmoid", lambda: (SPECIAL,), partial(_route, score="sigmoid", k=3)),
    Case(
        "moe_route", "ties, −inf, NaN, groups", lambda: (SPECIAL,),
        partial(_route, normalize=False, groups=2, top_groups=1, k=1),
    ),
    Case("moe_route", "all −inf", lambda: (torch.full((2, 5), -INF, dtype=torch.float64),), _route),
    Case("moe_route", "one expert", lambda: (random(5, 1),), partial(_route, k=1)),
    Case("moe_route", "all experts", lambda: (random(5, 12),), partial(_route, k=12)),
    Case("moe_route", "one token, 16 of 300", lambda: (random(1, 300),), partial(_route, k=16)),
    Case("moe_route", "no tokens", lambda: (random(0, 8),), _route),
    Case("moe_route", "strided", lambda: (random(8, 13).T,), _route),
)  # fmt: skip
PERMUTES = (
    Case(
        "moe_permute", "13 tokens, 3 of 7", lambda: (random(13, 33), _choices(13, 3, 7)), partial(_permute, experts=7)
    ),
    Case(
        "moe_permute", "padded to 8", lambda: (random(11, 40), _choices(11, 2, 5)),
        partial(_permute, experts=5, pad_to=8),
    ),
    Case(
        "moe_permute", "slots elsewhere", lambda: (random(9, 24), _choices(9, 4, 12) - 3),
        partial(_permute, experts=6, pad_to=4),
    ),
    Case(
        "moe_permute", "two blocks of slots", lambda: (random(23, 8), _choices(23, 6, 7)),
        partial(_permute, experts=7), traffic=_permute_traffic(23, 6, 7, 8),
    ),
    Case("moe_permute", "all to one of 9", lambda: (random(9, 16), _same(8, 9)), partial(_permute, experts=9)),
    Case("moe_permute", "none here", lambda: (random(6, 8), _same(-1, 6, 2)), partial(_permute, experts=2)),
    Case("moe_permute", "one token, one expert", lambda: (random(1, 1), _same(0, 1)), partial(_permute, experts=1)),
    Case("moe_permute", "no tokens", lambda: (random(0, 8), _same(0, 0, 2)), partial(_permute, experts=4, pad_to=16)),
    Case(
        "moe_permute", "wide and strided", lambda: (random(2100, 5).T, _choices(5, 2, 4)), partial(_permute, experts=4)
    ),
    Case("moe_unpermute", "sum of 3", lambda: (random(40, 33), _inverse(9, 3, 40)), _unpermute),
    Case("moe_unpermute", "weighted", lambda: (random(40, 40), _inverse(11, 2, 40), random(11, 2, seed=2)), _unpermute),
    Case("moe_unpermute", "wide", lambda: (random(13, 2100), _inverse(4, 3, 13), random(4, 3, seed=2)), _unpermute),
    Case("moe_unpermute", "one slot", lambda: (random(1, 3), _same(0, 1).int(), random(1, 1, seed=2)), _unpermute),
    Case("moe_unpermute", "no tokens", lambda: (random(4, 8), _same(0, 0, 2).int(), random(0, 2)), _unpermute),
)  # fmt: skip
GEMMS = (
    Case(
        "grouped_gemm", "empty experts, ragged",
        lambda: (random(140, 40), random(5, 40, 72), _offsets(66, 0, 1, 73, 0)), _gemm,
        traffic=_gemm_traffic((66, 0, 1, 73, 0), 40, 72),
    ),
    Case("grouped_gemm", "rows of nobody", lambda: (random(140, 24), random(3, 24, 16), _offsets(3, 5, 2)), _gemm),
    Case("grouped_gemm", "all to one", lambda: (random(70, 32), random(4, 32, 48), _offsets(0, 0, 70, 0)), _gemm),
    Case("grouped_gemm", "one row", lambda: (random(1, 17), random(3, 17, 5), _offsets(0, 1, 0)), _gemm),
    Case("grouped_gemm", "one expert", lambda: (random(33, 20), random(1, 20, 8), _offsets(33)), _gemm),
    Case("grouped_gemm", "no rows", lambda: (random(0, 16), random(3, 16, 8), _offsets(0, 0, 0)), _gemm),
    Case(
        "grouped_gemm", "weights transposed", lambda: (random(80, 48), random(3, 36, 48), _offsets(10, 40, 30)),
        _transposed,
    ),
    Case(
        "grouped_gemm", "bias",
        lambda: (random(75, 16), random(4, 16, 20), _offsets(3, 0, 60, 7), random(4, 20, seed=2)), _gemm,
    ),
    Case("grouped_gemm", "strided", lambda: (random(64, 50).T, random(2, 64, 24), _offsets(13, 30)), _gemm),
)  # fmt: skip
CASES = (*ROUTES, *PERMUTES, *GEMMS)

LAYERS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "Mixtral 8x7B": (8, 2, 4096, 14336, {}),
    "Qwen3-30B-A3B": (128, 8, 2048, 768, {}),
    "DeepSeek-V3": (256, 8, 7168, 2048, {"sigmoid": True, "groups": 8, "top_groups": 4, "scale": 2.5}),
    "gpt-oss-20b": (32, 4, 2880, 2880, {}),
}
"""(experts, experts of a token, width, width of an expert, router) of a layer."""


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _route_both_ways(
    tokens: int, experts: int, k: int, chip: Chip, *, sigmoid: bool = False, groups: int = 1, top_groups: int = 1,
    scale: float = 1.0,
) -> None:  # fmt: skip
    logits, bias = _meta(tokens, experts, dtype=torch.float32), _meta(experts, dtype=torch.float32)
    route = logits, bias if sigmoid else None, k, sigmoid, True, groups, top_groups, scale, chip
    indices, probs, _ = gpu_route.forward(*route)
    gpu_route.backward(logits, indices, probs, sigmoid, True, scale, chip)


def _permute_both_ways(tokens: int, experts: int, k: int, width: int, dtype: torch.dtype, chip: Chip) -> None:
    x, indices, probs = _meta(tokens, width, dtype=dtype), _meta(tokens, k, dtype=torch.int64), _meta(tokens, k)
    rows = sorted_rows(tokens * k, experts, None)
    _, inverse = gpu_permute.places(indices, experts, 1)
    gathered, _ = gpu_permute.spread(x, inverse, rows, chip=chip)
    gpu_permute.collect(gathered, inverse, None, chip)
    gpu_permute.collect(gathered, inverse, probs.float(), chip)
    gpu_permute.spread(x, inverse, rows, probs.float(), gathered, chip)


def _gemm_both_ways(
    rows: int, experts: int, depth: int, width: int, dtype: torch.dtype, chip: Chip, bias: bool = False
) -> None:
    x, w = _meta(rows, depth, dtype=dtype), _meta(experts, width, depth, dtype=dtype).transpose(1, 2)
    offsets = _meta(experts + 1, dtype=torch.int32)
    y = gpu_gemm.rows(x, w, offsets, None, chip)
    gpu_gemm.rows(y, w.transpose(1, 2), offsets, None, chip)
    gpu_gemm.weights(x, y, offsets, w, chip)
    if bias:
        gpu_gemm.rows(x, w, offsets, _meta(experts, width, dtype=dtype), chip)
        gpu_gemm.sums(y, offsets, dtype)


def _gemm_moves(rows: int, experts: int, depth: int, width: int, size: int = 2) -> Traffic:
    """Forward, dX and dW: x, y and their gradients, and the weights, once each time that they are a factor."""
    x, y, w = rows * depth, rows * width, experts * depth * width
    return Traffic(size * 2 * (x + y + w), size * (x + y + w), 3 * 2 * rows * depth * width)


def _sweeps() -> list[Sweep]:
    found: list[Sweep] = []
    for name, (experts, k, width, hidden, router) in LAYERS.items():
        tokens = 8192
        route = partial(_route_both_ways, tokens, experts, k, **router)
        found.append(Sweep("moe_route", f"{name}, {tokens} tokens", route))
        permute = partial(_permute_both_ways, tokens, experts, k, width, torch.bfloat16)
        found.append(Sweep("moe_permute", f"{name}, {tokens} tokens", permute))
        for what, depth, out in (("in", width, 2 * hidden), ("out", hidden, width)):
            shape = tokens * k, experts, depth, out
            run = partial(_gemm_both_ways, *shape, torch.bfloat16, bias=name.startswith("gpt-oss"))
            found.append(Sweep("grouped_gemm", f"{name}, {what}", run, products=True, moves=_gemm_moves(*shape)))
    return found


SWEEPS = (
    *_sweeps(),
    Sweep("moe_route", "16 of 512", lambda chip: _route_both_ways(8192, 512, 16, chip)),
    Sweep("moe_permute", "16 of 512, float32", partial(_permute_both_ways, 8192, 512, 16, 1024, torch.float32)),
    Sweep(
        "grouped_gemm", "few rows an expert, bf16",
        partial(_gemm_both_ways, 4096, 128, 2048, 1536, torch.bfloat16), products=True,
    ),
    Sweep("grouped_gemm", "float16", partial(_gemm_both_ways, 16384, 8, 1024, 1024, torch.float16), products=True),
    Sweep(
        "grouped_gemm", "float32", partial(_gemm_both_ways, 16384, 8, 1024, 1024, torch.float32), dtype=torch.float32
    ),
)  # fmt: skip
