"""The head's product and cross-entropy in one op: the logits exist for a chunk of rows at a time, and only once.

Going forward, each chunk's logits are turned in place into their gradient and multiplied out at once into the
gradients of hidden and weight, so nothing of the size rows × vocabulary survives the chunk (as in Liger-Kernel,
arXiv:2410.10989). Backward only scales them by the gradient that arrives.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite_kernels import native
from megalite_kernels.capability import compiled_kernels, emulate_bf16_on_cpu
from megalite_kernels.reference import IGNORE_INDEX, accumulation_dtype

CHUNK_LOGITS = 1 << 21
"""Logits of a chunk (8 MiB in float32): large enough for the product to run at full speed, small enough for caches."""
CHUNK_ROWS = 16
"""Rows of the smallest chunk, however large the vocabulary."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """(nll_sum, z_sum) over rows whose target counts; never divided. See `reference.linear_cross_entropy`.

    `z_loss` is the weight w of the loss (nll_sum + w · z_sum) · anything that the caller will differentiate; it does
    not change the two values. Gradients of any other combination are right too, at the price of a second forward.

    Raises ValueError for tensors that do not belong together and, on the CPU, IndexError for a counted target outside
    0 … V-1; an accelerator's own indexing kernels stop at such a target.
    """
    _check(hidden_ND, weight_VD, targets_N)
    nll_sum, z_sum, _, _ = torch.ops.megalite.linear_cross_entropy(
        hidden_ND, weight_VD, targets_N, 1.0, float(z_loss), softcap or 0.0, ignore_index,
        torch.is_grad_enabled() and hidden_ND.requires_grad, torch.is_grad_enabled() and weight_VD.requires_grad,
    )  # fmt: skip
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


def vocabulary_parallel_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    first: int,
    vocab: int,
    shards: int,
    combine: Combine,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
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
    result: tuple[Tensor, Tensor] = _VocabularyParallel.apply(
        hidden_ND, weight_VD, targets_N, first, vocab, shards, combine, float(z_loss), softcap or 0.0, ignore_index,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return result


class _VocabularyParallel(torch.autograd.Function):
    """No custom op: `combine` is Python and communicates."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first: int, vocab: int, shards: int,
        combine: Combine, z_weight: float, softcap: float, ignore_index: int, differentiated: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        _check_range(targets, vocab, ignore_index)
        ctx.constants, ctx.z_weight = (softcap, ignore_index), z_weight
        ctx.shard = (first, combine, -(-vocab // shards))
        wanted = [differentiated and needed for needed in ctx.needs_input_grad[:2]]
        nll_sum, z_sum, grad_hidden, grad_weight = _pass(
            hidden, weight, targets, 1.0, z_weight, softcap, ignore_index, wanted[0], wanted[1], *ctx.shard
        )
        if any(wanted):
            ctx.save_for_backward(hidden, weight, targets, grad_hidden, grad_weight)
        return nll_sum, z_sum

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, grad_hidden, grad_weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        factor = grad_nll
        if not _in_proportion(grad_nll, grad_z, ctx.z_weight):
            factor, upstream = torch.ones_like(grad_nll), (float(grad_nll), float(grad_z))
            _, _, grad_hidden, grad_weight = _pass(
                hidden, weight, targets, *upstream, *ctx.constants, *wanted, *ctx.shard
            )
        grads = ((grad_hidden * factor).to(hidden.dtype), (grad_weight * factor).to(weight.dtype))
        return grads[0] if wanted[0] else None, grads[1] if wanted[1] else None, *([None] * 9)


def _check_range(targets_N: Tensor, vocab: int, ignore_index: int) -> None:
    """Only where the values lie in this processor's memory: elsewhere reading them would stall the device."""
    if targets_N.device.type == "cpu":
        wrong_N = ((targets_N < 0) | (targets_N >= vocab)) & (targets_N != ignore_index)
        if bool(wrong_N.any()):
            first = targets_N[wrong_N][0].item()
            raise IndexError(f"linear_cross_entropy: target {first} is outside 0 … {vocab - 1} and not {ignore_index}")


@torch.library.custom_op("megalite::linear_cross_entropy", mutates_args=())
def chunked(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, nll_weight: float, z_weight: float, softcap: float,
    ignore_index: int, hidden_grad: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(nll_sum, z_sum, grad hidden, grad weight) of nll_weight · nll_sum + z_weight · z_sum; empty where not asked."""
    _check_range(targets_N, weight_VD.shape[0], ignore_index)
    return _pass(hidden_ND, weight_VD, targets_N, nll_weight, z_weight, softcap, ignore_index, hidden_grad, weight_grad)


def _pass(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, nll_weight: float, z_weight: float, softcap: float,
    ignore_index: int, hidden_grad: bool, weight_grad: bool, first: int = 0, combine: Combine | None = None,
    widest: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`chunked`, for a whole weight or, with `combine`, for the shard that begins at row `first`; the `widest`
    of all shards decides the chunks."""
    rows, width = hidden_ND.shape
    vocab = weight_VD.shape[0]
    wide = accumulation_dtype(hidden_ND.dtype)
    # Hardware that multiplies half precision keeps it; everything else multiplies in the accumulation dtype.
    product = wide if hidden_ND.device.type == "cpu" and emulate_bf16_on_cpu() else hidden_ND.dtype
    weight = weight_VD.to(product)
    grad_hidden = hidden_ND.new_empty((rows if hidden_grad else 0, width), dtype=wide)
    grad_weight = hidden_ND.new_zeros((vocab if weight_grad else 0, width), dtype=wide)
    size = min(rows, max(CHUNK_ROWS, CHUNK_LOGITS // (widest or vocab)))
    buffer = hidden_ND.new_empty((size, vocab), dtype=product)
    nll_sum, z_sum = (hidden_ND.new_zeros((), dtype=wide) for _ in range(2))
    for start in range(0, rows, max(size, 1)):
        chosen = slice(start, min(start + size, rows))
        hidden = hidden_ND[chosen].to(product)
        logits = torch.mm(hidden, weight.T, out=buffer[: hidden.shape[0]])
        gradient, nll, lse = _rows(
            logits.to(wide), targets_N[chosen], nll_weight, z_weight, softcap, ignore_index,
            hidden_grad or weight_grad, first, combine,
        )  # fmt: skip
        nll_sum += nll.sum()
        z_sum += lse.square().sum()
        if gradient is None:
            continue
        if hidden_grad:
            grad_hidden[chosen] = gradient.to(product) @ weight
        if weight_grad and product == wide:
            grad_weight.addmm_(gradient.T, hidden)
        elif weight_grad:
            grad_weight += gradient.to(product).T @ hidden
    return nll_sum, z_sum, grad_hidden, grad_weight


def _rows(
    logits: Tensor, targets: Tensor, nll_weight: float, z_weight: float, softcap: float, ignore_index: int,
    wanted: bool, first: int, combine: Combine | None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(gradient by the bare product or None, nll, lse) of a chunk's rows, 0 where ignored; may overwrite logits."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32 and compiled_kernels():
        targets = targets.contiguous()
        if combine is None and nll_weight == 1.0:
            nll, lse = native.cross_entropy(logits, targets, ignore_index, softcap, z_weight, wanted)
            return logits if wanted else None, nll, lse
        lse, chosen = native.shard_sums(logits, targets, first, ignore_index, softcap)
        lse, chosen = _of_all(lse, chosen, targets != ignore_index, combine)
        if wanted:
            native.shard_gradient(logits, targets, first, ignore_index, softcap, nll_weight, z_weight, lse)
        return logits if wanted else None, lse - chosen, lse
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    counted = targets != ignore_index
    held = counted & (targets >= first) & (targets < first + logits.shape[1])
    index = torch.where(held, targets - first, 0)[:, None]
    lse = torch.logsumexp(logits, dim=-1)
    chosen = torch.where(held, logits.gather(-1, index)[:, 0], 0.0)
    lse, chosen = _of_all(lse, chosen, counted, combine)
    if not wanted:
        return None, lse - chosen, lse
    gradient = torch.exp(logits - lse[:, None]) * (nll_weight + 2.0 * z_weight * lse)[:, None]
    gradient.scatter_add_(-1, index, held.to(gradient.dtype)[:, None] * -nll_weight)
    if softcap > 0:
        gradient *= 1.0 - (logits / softcap).square()
    return gradient.masked_fill_(~counted[:, None], 0.0), lse - chosen, lse


def _of_all(lse: Tensor, chosen: Tensor, counted: Tensor, combine: Combine | None) -> tuple[Tensor, Tensor]:
    """Both of the whole vocabulary, 0 where ignored."""
    if combine is not None:
        lse, chosen = combine(lse, chosen)
    return torch.where(counted, lse, 0.0), torch.where(counted, chosen, 0.0)


@chunked.register_fake
def _(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, nll_weight: float, z_weight: float, softcap: float,
    ignore_index: int, hidden_grad: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = accumulation_dtype(hidden_ND.dtype)
    rows, width = hidden_ND.shape
    shapes = (), (), (rows if hidden_grad else 0, width), (weight_VD.shape[0] if weight_grad else 0, width)
    nll_sum, z_sum, grad_hidden, grad_weight = (hidden_ND.new_empty(shape, dtype=wide) for shape in shapes)
    return nll_sum, z_sum, grad_hidden, grad_weight


@torch.library.custom_op("megalite::linear_cross_entropy_backward", mutates_args=())
def chunked_backward(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, grad_hidden: Tensor, grad_weight: Tensor,
    grad_nll: Tensor, grad_z: Tensor, z_weight: float, softcap: float, ignore_index: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients made going forward, scaled; made anew when the upstream pair is not in the promised proportion."""
    if _in_proportion(grad_nll, grad_z, z_weight):
        factor = grad_nll
    else:
        factor = torch.ones_like(grad_nll)
        wanted = (bool(grad_hidden.shape[0]), bool(grad_weight.shape[0]))
        upstream = (float(grad_nll), float(grad_z))
        _, _, grad_hidden, grad_weight = chunked(
            hidden_ND, weight_VD, targets_N, *upstream, softcap, ignore_index, *wanted
        )
    return (grad_hidden * factor).to(hidden_ND.dtype), (grad_weight * factor).to(weight_VD.dtype)


def _in_proportion(grad_nll: Tensor, grad_z: Tensor, z_weight: float) -> bool:
    """Equal up to rounding: the caller's own product with z_loss may round differently from this one."""
    rtol = 4 * torch.finfo(grad_z.dtype).eps
    return torch.allclose(grad_z, grad_nll * z_weight, rtol=rtol, atol=0.0, equal_nan=True)


@chunked_backward.register_fake
def _(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, grad_hidden: Tensor, grad_weight: Tensor,
    grad_nll: Tensor, grad_z: Tensor, z_weight: float, softcap: float, ignore_index: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return grad_hidden.to(hidden_ND.dtype, copy=True), grad_weight.to(weight_VD.dtype, copy=True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_ND, weight_VD, targets_N, _, ctx.z_weight, ctx.softcap, ctx.ignore_index, ctx.hidden, ctx.weight = inputs
    ctx.save_for_backward(hidden_ND, weight_VD, targets_N, *output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_nll: Tensor | None, grad_z: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    zero = ctx.saved_tensors[-1].new_zeros(())
    upstream = [zero if grad is None else grad for grad in (grad_nll, grad_z)]
    constants = (ctx.z_weight, ctx.softcap, ctx.ignore_index)
    grads = torch.ops.megalite.linear_cross_entropy_backward(*ctx.saved_tensors, *upstream, *constants)
    return grads[0] if ctx.hidden else None, grads[1] if ctx.weight else None, *([None] * 7)


chunked.register_autograd(_differentiate, setup_context=_save)
