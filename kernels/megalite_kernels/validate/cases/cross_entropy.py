"""Cross-entropy: rows alone with hostile logits, the head with its products, and shards merged to the whole."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalite_kernels import loss, reference
from megalite_kernels.gpu import cross_entropy
from megalite_kernels.gpu.chips import Chip
from megalite_kernels.reference.wide import widen
from megalite_kernels.validate.case import Case, Far, Outputs, Sweep, Traffic, random

IGNORED = -100
WEIGHTS = torch.tensor([1.0, 1e-2])
"""Of nll and of lse²."""


def _rows(
    logits: Tensor, targets: Tensor, *, backend: str, softcap: float = 0.0, cuts: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, lse, gradient of the logits) a row; by Triton in shards of `cuts` columns, where given."""
    logits, weights = logits.detach().clone(), WEIGHTS.to(logits.device)
    if backend == "reference":
        return _formula(logits, targets, softcap)
    if cuts is None:
        nll, lse = cross_entropy.whole(logits, targets, weights, softcap, IGNORED)
        return nll, lse, logits
    firsts = [sum(cuts[:i]) for i in range(len(cuts))]
    shards = [logits[:, first : first + cut].clone() for first, cut in zip(firsts, cuts, strict=True)]
    sums = [
        cross_entropy.shard_sums(shard, targets, first, logits.shape[1], softcap, IGNORED)
        for shard, first in zip(shards, firsts, strict=True)
    ]
    counted = targets != IGNORED
    lse = torch.where(counted, torch.logsumexp(torch.stack([part for part, _ in sums]), 0), 0.0)
    chosen = torch.stack([part for _, part in sums]).sum(0)
    for shard, first in zip(shards, firsts, strict=True):
        cross_entropy.shard_gradient(shard, targets, weights, lse, first, softcap, IGNORED)
    return lse - chosen, lse, torch.cat(shards, dim=1)


def _formula(logits: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    counted = targets != IGNORED
    with torch.enable_grad():
        leaf = logits.requires_grad_()
        x = widen(leaf).masked_fill(~counted[:, None], 0.0)  # what is ignored may be NaN
        x = softcap * torch.tanh(x / softcap) if softcap else x
        lse = torch.logsumexp(x, -1)
        nll = lse - x.gather(-1, torch.where(counted, targets, 0)[:, None])[:, 0]
        total = torch.where(counted, WEIGHTS[0].item() * nll + WEIGHTS[1].item() * lse.square(), 0.0).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return torch.where(counted, nll, 0.0).detach(), torch.where(counted, lse, 0.0).detach(), gradient


def _problem(rows: int, vocab: int, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which every third is ignored."""
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1))
    targets[1::3] = IGNORED
    return random(rows, vocab, scale=scale), targets


def _hostile() -> tuple[Tensor, Tensor]:
    """A row with one −inf, one of which only the target is finite, one ignored full of NaN, one with a NaN."""
    logits = random(4, 20)
    logits[0, 3] = logits[1, :7] = logits[1, 8:] = -torch.inf
    logits[2] = logits[3, 5] = torch.nan
    return logits, torch.tensor([4, 7, IGNORED, 5])


def _traffic(rows: int, counted: int, vocab: int) -> Traffic:
    """Logits of counted rows twice, their target's once more, the gradient of all once; targets, weights, nll, lse."""
    return Traffic(4 * counted * (2 * vocab + 1) + rows * (8 + 8), 4 * rows * (vocab + 2))


def _head(*inputs: Any, backend: str, softcap: float | None = None) -> Outputs:
    """As a model differentiates it, scaled by what is no power of two."""
    nll_sum, z_sum = loss.linear_cross_entropy(*inputs, z_loss=1e-2, softcap=softcap, backend=backend)
    return (nll_sum + 1e-2 * z_sum) / 7


def _sums(*inputs: Any, backend: str) -> Outputs:
    """Both sums, whose upstream gradients are not in proportion."""
    return loss.linear_cross_entropy(*inputs, z_loss=None, backend=backend)


def _by_logits(combine: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
    """The yardstick: logits rounded to the model's dtype, as models usually compute them."""
    identity = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
    nll_sum, z_sum = reference.linear_cross_entropy(hidden @ weight.T, identity, targets)
    return (nll_sum + 1e-2 * z_sum) / 7 if combine else (nll_sum, z_sum)


def _weights(rows: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    return random(rows, width), random(vocab, width, seed=1, scale=0.3), _problem(rows, vocab)[1]


CASES = (
    Case("cross_entropy", "9 rows of 50", lambda: _problem(9, 50), _rows, traffic=_traffic(9, 6, 50)),
    Case("cross_entropy", "two blocks and a rest", lambda: _problem(2, 17_000), _rows, traffic=_traffic(2, 1, 17_000)),
    Case("cross_entropy", "softcap", lambda: _problem(9, 50), partial(_rows, softcap=3.0)),
    Case("cross_entropy", "one row of one", lambda: (random(1, 1), torch.tensor([0])), _rows),
    Case("cross_entropy", "all ignored", lambda: (random(3, 20), torch.full((3,), IGNORED)), _rows),
    Case("cross_entropy", "no rows", lambda: (random(0, 8), torch.zeros(0, dtype=torch.int64)), _rows),
    Case("cross_entropy", "−inf and NaN", _hostile, _rows),
    Case("cross_entropy", "−inf and NaN under a softcap", _hostile, partial(_rows, softcap=3.0)),
    Case("cross_entropy", "logits of 1e4", lambda: _problem(5, 33, scale=1e4), _rows),
    Case("cross_entropy", "shards of 1, 30 and 19", lambda: _problem(9, 50), partial(_rows, cuts=(1, 30, 19))),
    Case(
        "cross_entropy", "shards under a softcap", lambda: _problem(9, 50),
        partial(_rows, softcap=3.0, cuts=(26, 24)),
    ),
    Case("cross_entropy", "shards with −inf and NaN", _hostile, partial(_rows, cuts=(10, 10))),
    Case("linear_cross_entropy", "40 rows, 24 × 50", lambda: _weights(40, 24, 50), _head, partial(_by_logits, True)),
    Case(
        "linear_cross_entropy", "softcap", lambda: _weights(13, 8, 30), partial(_head, softcap=2.0),
        dtypes=(torch.float32,),
    ),
    Case("linear_cross_entropy", "no proportion", lambda: _weights(11, 8, 33), _sums, partial(_by_logits, False)),
)  # fmt: skip


def _launches(rows: int, vocab: int, softcap: float, dtype: torch.dtype, chip: Chip) -> None:
    logits = torch.empty(rows, vocab, dtype=dtype, device="meta")
    targets = torch.empty(rows, dtype=torch.int64, device="meta")
    weights, sums = (torch.empty(size, device="meta") for size in (2, rows))
    cross_entropy.whole(logits, targets, weights, softcap, IGNORED, chip)
    cross_entropy.shard_sums(logits, targets, vocab, 8 * vocab, softcap, IGNORED, chip)
    cross_entropy.shard_gradient(logits, targets, weights, sums, vocab, softcap, IGNORED, chip)


def _sweep(rows: int, vocab: int, softcap: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> Sweep:
    name = f"{rows} × {vocab} {str(dtype).removeprefix('torch.')}{', softcap' if softcap else ''}"
    moves = Traffic(rows * vocab * dtype.itemsize, rows * vocab * dtype.itemsize)
    return Sweep("cross_entropy", name, partial(_launches, rows, vocab, softcap, dtype), moves=moves, dtype=dtype)


SWEEPS = (
    _sweep(2093, 128_256),
    _sweep(1766, 151_936),
    _sweep(5336, 50_304),
    _sweep(8356, 128_256 // 4),
    _sweep(1024, 256_000, softcap=30.0),
    _sweep(2093, 128_256, dtype=torch.float32),
    _sweep(4096, 4096),
)


def _far() -> None:
    """The last of 17,000 rows of Llama 3's vocabulary in bf16."""
    logits, targets = torch.empty(17_000, 128_256, dtype=torch.bfloat16), torch.zeros(17_000, dtype=torch.int64)
    cross_entropy.whole(logits, targets, WEIGHTS, 0.0, IGNORED)
    cross_entropy.shard_sums(logits, targets, 0, 128_256, 0.0, IGNORED)
    cross_entropy.shard_gradient(logits, targets, WEIGHTS, torch.zeros(17_000), 0, 0.0, IGNORED)


FAR = (Far("cross_entropy", _far),)
