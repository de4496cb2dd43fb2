"""Attention: every mask, ragged and hostile shapes, documents, sinks, gradients through the log-sum-exp."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalite_kernels import reference
from megalite_kernels.attention import attention
from megalite_kernels.gpu import attention as kernels
from megalite_kernels.gpu.chips import PORTABLE, Chip
from megalite_kernels.validate.case import Case, Far, Sweep, Traffic, random


def qkv(
    queries: int, keys: int, heads: int = 1, key_heads: int = 1, dim: int = 16, value_dim: int | None = None,
    batch: int = 1,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = (queries, heads, dim), (keys, key_heads, dim), (keys, key_heads, value_dim or dim)
    return tuple(random(batch, *shape, seed=seed) for seed, shape in enumerate(shapes))


def plain(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, *, scale: float, softcap: float | None = None,
    return_lse: bool = False, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, **mask: Any,
) -> Any:  # fmt: skip
    """The formula with weights from the log-sum-exp, rounded to the inputs' dtype before they multiply values."""
    if cu_seqlens_q is not None:
        cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        parts = [
            plain(q[None, a:b], k[None, c:d], v[None, c:d], sinks, scale=scale, softcap=softcap, **mask)[0]
            for (a, b), (c, d) in zip(cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True)
        ]
        return torch.cat(parts)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    scores = scale * (q.transpose(1, 2).float() @ keys.transpose(-1, -2).float())
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = reference.visible(
        *scores.shape[-2:],
        causal=mask.get("causal", True),
        window=mask.get("window"),
        documents_BS=mask.get("documents"),
    )
    scores = scores.masked_fill(~seen, -math.inf)
    sink = torch.full((q.shape[2],), -math.inf) if sinks is None else sinks.float()
    logits = torch.cat((scores, sink[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    blind = (logits == -math.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(logits.masked_fill(blind, 0.0), -1, keepdim=True)
    weights = torch.exp(scores - lse).masked_fill(~seen, 0.0).to(v.dtype).float()
    out = (weights @ values.float()).transpose(1, 2).to(v.dtype)
    return (out, lse.masked_fill(blind, -math.inf)[..., 0]) if return_lse else out


def _call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, *, backend: str, **options: Any) -> Any:
    return attention(q, k, v, sinks=sinks, backend=backend, **options)


def _case(name: str, inputs: Any, traffic: Traffic | None = None, **options: Any) -> Case:
    options = {"scale": 0.3, **options}
    return Case("attention", name, inputs, partial(_call, **options), partial(plain, **options), traffic=traffic)


def _sinks(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _with_nan(x: Tensor, row: int) -> Tensor:
    x = x.clone()
    x[:, row] = math.nan
    return x


def _traffic(length: int, dim: int) -> Traffic:
    """Causal, one head, a length that all tiles divide: each tile of the triangle once in each of the three walks."""
    sizes = torch.float32, dim, dim
    wide = kernels.padded(dim)
    configs = [choose(PORTABLE, *sizes) for choose in (kernels.config, kernels.config_keys, kernels.config_queries)]
    loaded, stored, flops = 4 * 2 * length * dim, 4 * length, 0  # of the deltas: out and its gradient
    for number, options in enumerate(configs):
        m, n = options["M"], options["N"]
        pairs = sum(-(-(first + m) // n) for first in range(0, length, m))
        if number == 1:
            pairs = sum((length - first // m * m) // m for first in range(0, length, n))
        products = (2, 4, 3)[number]
        flops += pairs * products * 2 * m * n * wide
        own, other = ((1, 2 * n * dim), (2, 2 * m * (dim + 1)), (2, 2 * n * dim))[number]
        loaded += 4 * (own * length * dim + pairs * other)
        stored += 4 * (length * dim * (2 if number == 1 else 1))
    loaded += 4 * 2 * length  # log-sum-exp and delta of every query's tile
    return Traffic(loaded, stored + 4 * length, flops)


NUMBERS = torch.tensor([[0] * 20 + [1] * 45 + [7], [2] * 3 + list(range(3, 40)) + [40] * 26])
CU_Q, CU_K = torch.tensor([0, 0, 7, 8, 8, 40]), torch.tensor([0, 5, 16, 16, 20, 70])
CASES = (
    _case("causal, ragged", lambda: qkv(70, 70, 2, 2, 24)),
    _case("several tiles", lambda: qkv(130, 130)),
    _case("whole tiles", lambda: qkv(128, 128, dim=32), traffic=_traffic(128, 32)),
    _case("full", lambda: qkv(33, 75, 2, 2), causal=False),
    _case("one query", lambda: qkv(1, 70, 2, 1)),
    _case("one key", lambda: qkv(5, 1, 2, 1)),
    _case("more keys than queries", lambda: qkv(20, 90, 1, 1, batch=2)),
    _case("more queries than keys, blind rows", lambda: qkv(75, 12, 2, 1), return_lse=True),
    _case("no keys", lambda: qkv(4, 0)),
    _case("no queries", lambda: qkv(0, 4)),
    _case("grouped heads", lambda: qkv(40, 40, 4, 2)),
    _case("one key head", lambda: qkv(66, 66, 3, 1)),
    _case("heads of 80", lambda: qkv(35, 35, 1, 1, 80)),
    _case("heads of 5", lambda: qkv(17, 17, 2, 2, 5)),
    _case("heads of 192, values of 128", lambda: qkv(20, 20, 2, 2, 192, 128), scale=0.07),
    _case("values wider than keys", lambda: qkv(20, 20, 1, 1, 16, 40)),
    _case("window", lambda: qkv(130, 130), window=9),
    _case("window of 1", lambda: qkv(40, 40, 2, 1), window=1),
    _case("window, not causal", lambda: qkv(40, 90), window=5, causal=False),
    _case("softcap that bites", lambda: qkv(40, 40, 2, 1), softcap=1.5, scale=1.0),
    _case("scores of hundreds", lambda: qkv(40, 40), scale=60.0),
    _case("scores of hundreds, several tiles", lambda: qkv(130, 130), scale=60.0),
    _case("sinks", lambda: (*qkv(40, 40, 3, 1), _sinks(0.5, -30.0, 4.0)), return_lse=True),
    _case("sinks and blind rows", lambda: (*qkv(20, 4, 2, 1), _sinks(1.0, -1.0)), window=3, return_lse=True),
    _case("gradient through lse", lambda: qkv(40, 70, 2, 1), return_lse=True, softcap=3.0),
    _case("documents", lambda: qkv(66, 66, 2, 1, batch=2), documents=NUMBERS),
    _case("documents, window, full", lambda: qkv(66, 66, 1, 1, batch=2), documents=NUMBERS, window=4, causal=False),
    _case("packed, empty documents", lambda: [x[0] for x in qkv(40, 70, 2, 1)], cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K),
    _case("packed, one of one token", lambda: [x[0] for x in qkv(1, 1)], cu_seqlens_q=torch.tensor([0, 1])),
    _case("NaN in a query", lambda: (_with_nan(qkv(20, 20)[0], 7), *qkv(20, 20)[1:])),
    _case("NaN in a key", lambda: (qkv(20, 20)[0], _with_nan(qkv(20, 20)[1], 7), qkv(20, 20)[2])),
    _case("strided", lambda: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(20, 20, 2, 2)]),
)  # fmt: skip


def _both_ways(
    chip: Chip, dtype: torch.dtype, dim: int, value_dim: int, causal: bool = True, window: int | None = None,
    spans: bool = False, sinks: bool = False, softcap: float = 0.0,
) -> None:  # fmt: skip
    length = 8192

    def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    q, k, v = meta(2, length, 32, dim), meta(2, length, 8, dim), meta(2, length, 8, value_dim)
    mask = kernels.band(length, length, causal, window)
    if spans:
        mask = kernels.Mask(0, 0, *(meta(2, length, of=torch.int32) for _ in range(2)))
    logit = meta(32) if sinks else None
    out, lse = kernels.forward(q, k, v, logit, mask, dim**-0.5, softcap, chip)
    kernels.gradients(q, k, v, lse, lse, out, mask, dim**-0.5, softcap, chip)


def _sweep(name: str, dtype: torch.dtype, dim: int, value_dim: int, **options: Any) -> Sweep:
    name = (
        f"{name}, heads of {dim}{f' and {value_dim}' if value_dim != dim else ''} {str(dtype).removeprefix('torch.')}"
    )
    run = partial(_both_ways, dtype=dtype, dim=dim, value_dim=value_dim, **options)
    # float32 is multiplied in float32
    return Sweep(
        "attention", name, run, products=dtype != torch.float32, moves=_moves(dim, value_dim, dtype, **options)
    )


def _moves(
    dim: int, value_dim: int, dtype: torch.dtype, causal: bool = True, window: int | None = None, spans: bool = False,
    **_: Any,
) -> Traffic | None:  # fmt: skip
    """Both ways at least: two products forward, five back; q, k, v and out once each way. None: documents decide."""
    if spans:
        return None
    length, heads, key_heads = 8192, 2 * 32, 2 * 8
    seen = length * (length + 1) // 2 if causal else length * length
    if window is not None:
        seen -= (length - window) * (length - window + 1) // 2
    queries, keys = heads * length * dtype.itemsize, key_heads * length * dtype.itemsize
    once = queries * (dim + value_dim) + keys * (dim + value_dim)
    loaded = once - queries * value_dim + once + queries * value_dim
    stored = queries * value_dim + queries * dim + keys * (dim + value_dim)
    return Traffic(loaded, stored, heads * seen * 2 * ((dim + value_dim) + (3 * dim + 2 * value_dim)))


def _deltas(chip: Chip) -> None:
    out, lse = (
        torch.empty((2, 8192, 32, 128), dtype=torch.bfloat16, device="meta"),
        torch.empty((2, 32, 8192), device="meta"),
    )
    kernels.deltas(out, out, lse, lse, lse[0, :, 0])


SWEEPS = (
    *(_sweep("documents", torch.bfloat16, dim, dim, spans=True) for dim in (64, 80, 128, 256)),
    _sweep("documents", torch.bfloat16, 192, 128, spans=True),
    _sweep("documents", torch.float32, 64, 64, spans=True),
    _sweep("causal", torch.bfloat16, 128, 128),
    _sweep("full", torch.float16, 128, 128, causal=False),
    _sweep("window, sinks", torch.bfloat16, 64, 64, window=128, sinks=True),
    _sweep("softcap", torch.bfloat16, 256, 256, softcap=50.0),
    Sweep("attention", "deltas with sinks", _deltas),
)


def _far() -> None:
    """Five rows of 262,144 tokens of 32 heads of 80, each seeing itself: a row's first element lies past 2³¹."""
    q = torch.empty(5, (1 << 18) + 3, 32, 80, dtype=torch.bfloat16)
    k, v, mask = torch.empty_like(q), torch.empty_like(q), kernels.band(q.shape[1], q.shape[1], True, 1)
    out, lse = kernels.forward(q, k, v, None, mask, 0.1, 0.0)
    kernels.backward(q, k, v, None, out, lse, out, None, mask, 0.1, 0.0)


FAR = (Far("attention", _far),)
