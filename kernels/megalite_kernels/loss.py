"""The head's product and cross-entropy in one op: the logits exist for a chunk of rows at a time, and only once.

Going forward, each chunk's logits are turned in place into their gradient and multiplied out at once into the
gradients of hidden and weight, so nothing of the size rows × vocabulary survives the chunk (as in Liger-Kernel,
arXiv:2410.10989). Backward only scales them by the gradient that arrives. The rows of a chunk are Triton's on a GPU,
C's on a CPU. On a GPU no value is read: nothing here waits for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite_kernels import native, reference
from megalite_kernels.capability import compiled_kernels, emulate_bf16_on_cpu
from megalite_kernels.custom_op import custom_op
from megalite_kernels.dispatch import choose
from megalite_kernels.mixed import accumulate, scaled
from megalite_kernels.reference import IGNORE_INDEX, accumulation_dtype

CHUNK_LOGITS = 1 << 21
"""Logits of a chunk (8 MiB in float32): large enough for the product to run at full speed, small enough for caches."""
CHUNK_ROWS = 16
"""Rows of the smallest chunk, however large the vocabulary."""
GPU_CHUNK_LOGITS = 1 << 28
"""CHUNK_LOGITS of a GPU (512 MiB in bf16): 2,093 rows of Llama 3's vocabulary; not yet timed on one."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    z_loss: float | None = 0.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(nll_sum, z_sum) over rows whose target counts; never divided. See `reference.linear_cross_entropy`.

    `z_loss` is the weight w of the loss (nll_sum + w · z_sum) · anything that the caller will differentiate; it does
    not change the two values. None: any combination; then gradients are made going back, in a second forward. On a CPU
    a combination that was not declared takes that second forward too; on a GPU, where looking at the gradients that
    arrive would stall it, they come out NaN.

    Raises ValueError for tensors that do not belong together and, on the CPU, IndexError for a counted target outside
    0 … V-1; on a GPU such a target makes nll_sum NaN.
    """
    _check(hidden_ND, weight_VD, targets_N)
    rows = choose("linear_cross_entropy", backend, hidden_ND.device.type, hidden_ND.dtype)
    if rows == "reference":
        return reference.linear_cross_entropy(
            hidden_ND, weight_VD, targets_N, softcap=softcap, ignore_index=ignore_index
        )
    grads = (torch.is_grad_enabled() and x.requires_grad for x in (hidden_ND, weight_VD))
    nll_sum, z_sum, _, _ = torch.ops.megalite.linear_cross_entropy(
        hidden_ND, weight_VD, targets_N, z_loss, softcap or 0.0, ignore_index, *grads, rows
    )
    return nll_sum, z_sum


def _check(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    if targets_N.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: targets are {targets_N.dtype}; give torch.int64")
    if not hidden_ND.device == weight_VD.device == targets_N.device:
        raise ValueError("linear_cross_entropy: hidden, weight and targets are on different devices")
    fitting = hidden_ND.dim() == weight_VD.dim() == 2 and hidden_ND.shape[1] == weight_VD.shape[1]
    if not fitting or targets_N.shape != hidden_ND.shape[:1] or not weight_VD.shape[0]:
        shapes = ", ".join(str(list(x.shape)) for x in (hidden_ND, weight_VD, targets_N))
        raise ValueError(f"linear_cross_entropy: needs hidden [N, D], weight [V, D], targets [N], not {shapes}")


Combine = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From one shard's (log-sum-exp [N], logit of the target or 0 [N]) to those of the whole vocabulary."""


@dataclass(frozen=True)
class _Shard:
    """The rows `first` … of a weight of `vocab` rows; `widest`: rows of the largest shard, which decides the chunks."""

    first: int
    vocab: int
    widest: int
    combine: Combine


def vocabulary_parallel_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    first: int,
    vocab: int,
    shards: int,
    combine: Combine,
    z_loss: float | None = 0.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` where this process holds the rows first … of a weight of `vocab` rows: both sums are those
    of the whole vocabulary, the same on every rank. The gradient of hidden is this shard's term of a sum over ranks.

    `combine` is called for every chunk of rows and communicates two numbers a row; the logits stay where they are. The
    `shards` processes take the same chunks, also where a vocabulary that does not divide gives some a row more.
    Raises ValueError when the weight is not a shard: replicated logits would be off by the log of the ranks.
    """
    _check(hidden_ND, weight_VD, targets_N)
    if not 0 <= first <= first + weight_VD.shape[0] <= vocab or weight_VD.shape[0] == vocab:
        raise ValueError(
            f"vocabulary_parallel_cross_entropy: weight has rows {first} to {first + weight_VD.shape[0]} of {vocab},"
            " which is no shard of it; give this rank's rows, or use linear_cross_entropy for a whole weight"
        )
    wanted = "torch" if backend == "reference" else backend  # no one process could run a reference of this
    rows = choose("vocabulary_parallel_cross_entropy", wanted, hidden_ND.device.type, hidden_ND.dtype)
    shard = _Shard(first, vocab, -(-vocab // shards), combine)
    result: tuple[Tensor, Tensor] = _VocabularyParallel.apply(
        hidden_ND, weight_VD, targets_N, z_loss, softcap or 0.0, ignore_index, torch.is_grad_enabled(), rows, shard
    )
    return result


class _VocabularyParallel(torch.autograd.Function):
    """No custom op: `combine` is Python and communicates."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float | None, softcap: float,
        ignore_index: int, differentiated: bool, rows: str, shard: _Shard,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        _check_range(targets, shard.vocab, ignore_index)
        ctx.wanted = [differentiated and needed for needed in ctx.needs_input_grad[:2]]
        ctx.z_weight, ctx.how = z_weight, (softcap, ignore_index, *ctx.wanted, rows, shard)
        ctx.set_materialize_grads(False)
        nll_sum, z_sum, *grads = _forward(hidden, weight, targets, z_weight, *ctx.how)
        if any(ctx.wanted):
            ctx.save_for_backward(hidden, weight, targets, *grads)
        return nll_sum, z_sum

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream: Any = _upstream(ctx.saved_tensors[-1], grad_nll, grad_z, ctx.z_weight)
        grads = _backward(*ctx.saved_tensors, *upstream, *ctx.how)
        return *(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True)), *([None] * 7)


def _check_range(targets_N: Tensor, vocab: int, ignore_index: int) -> None:
    """Only where the values lie in this processor's memory: elsewhere reading them would stall the device."""
    if targets_N.device.type == "cpu":
        wrong_N = ((targets_N < 0) | (targets_N >= vocab)) & (targets_N != ignore_index)
        if bool(wrong_N.any()):
            first = targets_N[wrong_N][0].item()
            raise IndexError(f"linear_cross_entropy: target {first} is outside 0 … {vocab - 1} and not {ignore_index}")


def _forward(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_weight: float | None, softcap: float,
    ignore_index: int, hidden_grad: bool, weight_grad: bool, rows: str, shard: _Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(nll_sum, z_sum, grad hidden, grad weight) of nll_sum + z_weight · z_sum; gradients empty where not wanted or
    not known yet."""
    known = z_weight is not None
    one = hidden_ND.new_ones((), dtype=accumulation_dtype(hidden_ND.dtype))
    weights = torch.stack([one, torch.full_like(one, z_weight or 0.0)])
    return _pass(
        hidden_ND, weight_VD, targets_N, weights, softcap, ignore_index, hidden_grad and known,
        weight_grad and known, rows, shard,
    )  # fmt: skip


def _pass(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights: Tensor, softcap: float, ignore_index: int,
    hidden_grad: bool, weight_grad: bool, rows: str, shard: _Shard | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Both sums and the gradients of weights[0] · nll_sum + weights[1] · z_sum, empty where not wanted."""
    count, width = hidden_ND.shape
    vocab = weight_VD.shape[0]
    wide, on_cpu = accumulation_dtype(hidden_ND.dtype), hidden_ND.device.type == "cpu"
    # Hardware that multiplies half precision keeps it; everything else multiplies in the accumulation dtype.
    product = wide if on_cpu and emulate_bf16_on_cpu() else hidden_ND.dtype
    weight = weight_VD.to(product)
    grad_hidden = hidden_ND.new_empty((count if hidden_grad else 0, width), dtype=wide)
    grad_weight = hidden_ND.new_zeros((vocab if weight_grad else 0, width), dtype=wide)
    chunk = CHUNK_LOGITS if on_cpu else GPU_CHUNK_LOGITS
    size = min(count, max(CHUNK_ROWS, chunk // (shard.widest if shard else vocab)))
    buffer = hidden_ND.new_empty((size, vocab), dtype=product)
    nll_sum, z_sum = (hidden_ND.new_zeros((), dtype=wide) for _ in range(2))
    for start in range(0, count, max(size, 1)):
        chosen = slice(start, min(start + size, count))
        hidden = hidden_ND[chosen].to(product)
        logits = torch.mm(hidden, weight.T, out=buffer[: hidden.shape[0]])
        gradient, nll, lse = _rows(
            logits, targets_N[chosen].contiguous(), weights if hidden_grad or weight_grad else None, softcap,
            ignore_index, rows, shard,
        )  # fmt: skip
        nll_sum += nll.sum()
        z_sum += lse.square().sum()
        if gradient is None:
            continue
        if gradient.dtype != product:  # into the place of the logits it was made of
            gradient = buffer[: len(gradient)].copy_(gradient)
        if hidden_grad:
            grad_hidden[chosen] = gradient @ weight
        if weight_grad and product == wide:
            grad_weight.addmm_(gradient.T, hidden)
        elif weight_grad:
            accumulate(grad_weight, gradient.T @ hidden)
    return nll_sum, z_sum, grad_hidden, grad_weight


Rows = tuple[Tensor | None, Tensor, Tensor]
"""(gradient of a chunk's logits before the cap or None, nll, lse), the last two a row and 0 where ignored."""


def _rows(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float, ignore_index: int, rows: str,
    shard: _Shard | None,
) -> Rows:  # fmt: skip
    """By the backend `rows`; may overwrite the logits. Without `weights` there is no gradient."""
    if rows == "triton":
        return _triton_rows(logits, targets, weights, softcap, ignore_index, shard)
    logits = logits.to(accumulation_dtype(logits.dtype))
    if rows == "native" and compiled_kernels():
        return _native_rows(logits, targets, weights, softcap, ignore_index, shard)
    first, vocab = (shard.first, shard.vocab) if shard else (0, logits.shape[1])
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    counted, exists = targets != ignore_index, (targets >= 0) & (targets < vocab)
    held = counted & exists & (targets >= first) & (targets < first + logits.shape[1])
    index = torch.where(held, targets - first, 0)[:, None]
    lse = torch.logsumexp(logits, dim=-1)
    chosen = torch.where(held, logits.gather(-1, index)[:, 0], torch.where(exists, 0.0, torch.nan))
    lse, chosen = _of_all(lse, chosen.to(lse.dtype), counted, shard)
    if weights is None:
        return None, lse - chosen, lse
    gradient = torch.exp(logits - lse[:, None]) * (weights[0] + 2.0 * weights[1] * lse)[:, None]
    gradient.scatter_add_(-1, index, held.to(gradient.dtype)[:, None] * -weights[0])
    if softcap > 0:
        gradient *= 1.0 - (logits / softcap).square()
    return gradient.masked_fill_(~counted[:, None], 0.0), lse - chosen, lse


def _triton_rows(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float, ignore_index: int, shard: _Shard | None
) -> Rows:
    """In the logits' own dtype, in place."""
    from megalite_kernels.gpu import cross_entropy

    if shard is None:
        nll, lse = cross_entropy.whole(logits, targets, weights, softcap, ignore_index)
        return logits if weights is not None else None, nll, lse
    lse, chosen = cross_entropy.shard_sums(logits, targets, shard.first, shard.vocab, softcap, ignore_index)
    lse, chosen = _of_all(lse, chosen, targets != ignore_index, shard)
    if weights is None:
        return None, lse - chosen, lse
    cross_entropy.shard_gradient(logits, targets, weights, lse, shard.first, softcap, ignore_index)
    return logits, lse - chosen, lse


def _native_rows(
    logits: Tensor, targets: Tensor, weights: Tensor | None, softcap: float, ignore_index: int, shard: _Shard | None
) -> Rows:
    """In float32, in place."""
    nll_weight, z_weight = (1.0, 0.0) if weights is None else weights.tolist()
    gradient = logits if weights is not None else None
    if shard is None and nll_weight == 1.0:
        return gradient, *native.cross_entropy(logits, targets, ignore_index, softcap, z_weight, gradient is not None)
    first = shard.first if shard else 0
    lse, chosen = native.shard_sums(logits, targets, first, ignore_index, softcap)
    lse, chosen = _of_all(lse, chosen, targets != ignore_index, shard)
    if gradient is not None:
        native.shard_gradient(logits, targets, first, ignore_index, softcap, nll_weight, z_weight, lse)
    return gradient, lse - chosen, lse


def _of_all(lse: Tensor, chosen: Tensor, counted: Tensor, shard: _Shard | None) -> tuple[Tensor, Tensor]:
    """Both of the whole vocabulary, 0 where ignored."""
    if shard is not None:
        lse, chosen = shard.combine(lse, chosen)
    return torch.where(counted, lse, 0.0), torch.where(counted, chosen, 0.0)


def _upstream(
    like: Tensor, grad_nll: Tensor | None, grad_z: Tensor | None, z_weight: float | None
) -> tuple[Tensor, Tensor, float | None]:
    """Both gradients that arrive, and z_weight, or None where one that was declared does not come at all."""
    zero = like.new_zeros(())
    if grad_nll is None or (grad_z is None and z_weight):
        z_weight = None
    return zero if grad_nll is None else grad_nll, zero if grad_z is None else grad_z, z_weight


def _factor(grad_nll: Tensor, grad_z: Tensor, z_weight: float | None, read: bool) -> Tensor | None:
    """What to multiply the gradients made going forward with; None where they are not of this combination.

    In proportion means up to rounding: the caller's own product with z_loss may round differently from this one.
    Where nothing may be `read`, a combination that was not declared makes NaN.
    """
    if z_weight is None:
        return None
    rtol = 4 * torch.finfo(grad_z.dtype).eps
    kept = torch.isclose(grad_z, grad_nll * z_weight, rtol=rtol, atol=0.0, equal_nan=True)
    if read:
        return grad_nll if bool(kept) else None
    return torch.where(kept, grad_nll, torch.nan)


def _backward(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, grad_hidden: Tensor, grad_weight: Tensor,
    grad_nll: Tensor, grad_z: Tensor, z_weight: float | None, softcap: float, ignore_index: int,
    hidden_grad: bool, weight_grad: bool, rows: str, shard: _Shard | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients made going forward, scaled; made anew where the upstream pair is not what was declared."""
    factor = _factor(grad_nll, grad_z, z_weight, read=hidden_ND.device.type == "cpu")
    if factor is None:
        factor, weights = torch.ones_like(grad_nll), torch.stack([grad_nll, grad_z])
        _, _, grad_hidden, grad_weight = _pass(
            hidden_ND, weight_VD, targets_N, weights, softcap, ignore_index, hidden_grad, weight_grad, rows, shard
        )
    return scaled(grad_hidden, factor, hidden_ND.dtype), scaled(grad_weight, factor, weight_VD.dtype)


@custom_op("megalite::linear_cross_entropy", mutates_args=())
def chunked(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_weight: float | None, softcap: float,
    ignore_index: int, hidden_grad: bool, weight_grad: bool, rows: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check_range(targets_N, weight_VD.shape[0], ignore_index)
    return _forward(hidden_ND, weight_VD, targets_N, z_weight, softcap, ignore_index, hidden_grad, weight_grad, rows)


@chunked.register_fake
def _(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_weight: float | None, softcap: float,
    ignore_index: int, hidden_grad: bool, weight_grad: bool, rows: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide, known = accumulation_dtype(hidden_ND.dtype), z_weight is not None
    sizes = (hidden_ND.shape[0] if hidden_grad and known else 0, weight_VD.shape[0] if weight_grad and known else 0)
    shapes = (), (), *((size, hidden_ND.shape[1]) for size in sizes)
    nll_sum, z_sum, grad_hidden, grad_weight = (hidden_ND.new_empty(shape, dtype=wide) for shape in shapes)
    return nll_sum, z_sum, grad_hidden, grad_weight


@custom_op("megalite::linear_cross_entropy_backward", mutates_args=())
def chunked_backward(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, grad_hidden: Tensor, grad_weight: Tensor,
    grad_nll: Tensor, grad_z: Tensor, z_weight: float | None, softcap: float, ignore_index: int,
    hidden_grad: bool, weight_grad: bool, rows: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _backward(
        hidden_ND, weight_VD, targets_N, grad_hidden, grad_weight, grad_nll, grad_z, z_weight, softcap, ignore_index,
        hidden_grad, weight_grad, rows,
    )  # fmt: skip


@chunked_backward.register_fake
def _(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, grad_hidden: Tensor, grad_weight: Tensor,
    grad_nll: Tensor, grad_z: Tensor, z_weight: float | None, softcap: float, ignore_index: int,
    hidden_grad: bool, weight_grad: bool, rows: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = (hidden_ND.shape[0] if hidden_grad else 0, weight_VD.shape[0] if weight_grad else 0)
    return hidden_ND.new_empty((sizes[0], hidden_ND.shape[1])), weight_VD.new_empty((sizes[1], weight_VD.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.z_weight, *ctx.constants = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_nll: Tensor | None, grad_z: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    upstream = _upstream(ctx.saved_tensors[-1], grad_nll, grad_z, ctx.z_weight)
    grads = torch.ops.megalite.linear_cross_entropy_backward(*ctx.saved_tensors, *upstream, *ctx.constants)
    wanted = ctx.constants[2:4]
    return *(grad if needed else None for grad, needed in zip(grads, wanted, strict=True)), *([None] * 7)


chunked.register_autograd(_differentiate, setup_context=_save)
