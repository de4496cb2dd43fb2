"""Ring attention (arXiv:2310.01889): queries stay, keys and values go around the mesh axis ring, partial results merge.

The positions of a row lie in zigzag (2 chunks a rank, one from either end), so that under a causal mask every rank has
the same work. Whatever the mask, a query sees an interval of the row; each rank's positions rise, so of the keys of any
rank it sees an interval too: one step of the ring is one call of the attention kernel.
"""

import math
from typing import Any, NamedTuple

import torch
from megalite_kernels.attention import attention_backward, attention_forward
from megalite_kernels.reference import accumulation_dtype
from torch import Tensor

from megalite.comm import Communicator

Pieces = list[tuple[int, int]]
"""[start, stop) of the runs of positions that a rank holds, in rising order."""


def zigzag(length: int, ranks: int, place: int) -> Pieces:
    """The chunks `place` and 2·ranks-1-place of 2·ranks equal ones; one rank holds the row as it is.

    Raises ValueError for a length that does not divide.
    """
    if ranks == 1:
        return [(0, length)]
    chunk, rest = divmod(length, 2 * ranks)
    if rest:
        raise ValueError(
            f"context parallelism: a sequence of {length} does not divide into 2 x {ranks} chunks; use {length - rest}"
            f" or {length - rest + 2 * ranks}"
        )
    return [(place * chunk, (place + 1) * chunk), (length - (place + 1) * chunk, length - place * chunk)]


def spans_among(low_BS: Tensor, high_BS: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Intervals [low, high) of a row as intervals of the positions in `pieces`; int32 [B, S], rising as they did."""

    def before(position: Tensor) -> Tensor:
        counts = [(position - start).clamp(0, stop - start) for start, stop in pieces]
        return torch.stack(counts).sum(0, dtype=torch.int32)

    return before(low_BS), before(high_BS)


def merge(out_BSHD: Tensor, lse_BHS: Tensor, part: tuple[Tensor, Tensor], seeing_BS: Tensor) -> None:
    """Take attention over further keys, `part`, into out and its log-sum-exp, in place and in their dtype.

    lse is -inf where nothing was seen yet. `seeing_BS`: queries that see any of the further keys; of the others the
    kernel says (0, 0).
    """
    added, added_lse = part[0], part[1].masked_fill(~seeing_BS[:, None], -math.inf)
    total = torch.logaddexp(lse_BHS, added_lse)
    finite = total.masked_fill(total == -math.inf, 0.0)
    kept, new = (torch.exp(x - finite).transpose(1, 2).unsqueeze(-1) for x in (lse_BHS, added_lse))
    out_BSHD.mul_(kept).addcmul_(added.to(out_BSHD.dtype), new)
    lse_BHS.copy_(total)


class _Step(NamedTuple):
    """The work on one block: a run of this rank's queries, and the run of the block's keys that any of them sees."""

    queries: slice
    keys: slice
    low_BS: Tensor  # of these queries, among these keys
    high_BS: Tensor


def _plan(low_BS: Tensor, high_BS: Tensor, blocks: list[Pieces]) -> list[_Step | None]:
    """The work of each step; None where no query sees a key. One copy to the host tells the bounds of all steps."""
    spans = [spans_among(low_BS, high_BS, pieces) for pieces in blocks]
    length = low_BS.shape[1]
    index = torch.arange(length, dtype=torch.int32, device=low_BS.device)
    bounds = []
    for low, high in spans:
        blind = low >= high
        blind_S = blind.all(0)
        bounds += [index.masked_fill(blind_S, length).min(), index.masked_fill(blind_S, -1).max() + 1]
        bounds += [low.masked_fill(blind, length).min(), high.masked_fill(blind, 0).max()]
    steps: list[_Step | None] = []
    for (low, high), (first, last, start, stop) in zip(spans, torch.stack(bounds).view(-1, 4).tolist(), strict=True):
        if first >= last:
            steps.append(None)
            continue
        among = [(x[:, first:last].clamp(start, stop) - start).contiguous() for x in (low, high)]
        steps.append(_Step(slice(first, last), slice(start, stop), *among))
    return steps


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor, k: Tensor, v: Tensor,
        low_BS: Tensor, high_BS: Tensor,
        comm: Communicator, scale: float, softcap: float, route: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ranks, place = comm.mesh.size("ring"), comm.mesh.index("ring")
        # By step: the block of the rank `step` places before this one.
        blocks = [zigzag(ranks * k.shape[1], ranks, (place - step) % ranks) for step in range(ranks)]
        steps = _plan(low_BS, high_BS, blocks)
        wide = accumulation_dtype(q.dtype)
        out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=wide, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=wide, device=q.device)
        own = block = torch.cat((k.flatten(), v.flatten()))  # in one piece: one message a step
        for number, step in enumerate(steps):
            last = number + 1 == ranks
            if not last:
                (next_block,), arriving = comm.rotate([block], "ring")
            if step is not None:
                rows, (keys, values) = step.queries, _of_keys(block, (k.shape, v.shape), step.keys)
                part = attention_forward(q[:, rows], keys, values, step.low_BS, step.high_BS, scale, softcap, route)
                merge(out[:, rows], lse[:, :, rows], part, step.low_BS < step.high_BS)
            if not last:
                arriving.wait()
                block = next_block
        out = out.to(q.dtype)
        # 0 instead of -inf for a query that sees nothing, as the kernel has it.
        lse.masked_fill_(lse == -math.inf, 0.0)
        ctx.save_for_backward(q, own, out, lse)
        ctx.comm, ctx.steps, ctx.shapes = comm, steps, (k.shape, v.shape)
        ctx.scale, ctx.softcap, ctx.route = scale, softcap, route
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """A block's gradients follow it around, one step behind, and need one turn more to be home."""
        q, block, out, lse = ctx.saved_tensors
        grad_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        grad_block = torch.zeros(block.shape, dtype=lse.dtype, device=q.device)
        for number, step in enumerate(ctx.steps):
            first, last = number == 0, number + 1 == len(ctx.steps)
            if not last:
                (next_block,), arriving = ctx.comm.rotate([block], "ring")
            if not first:
                (grad_block,), returning = ctx.comm.rotate([grad_block], "ring")
            if step is not None:
                rows, (keys, values) = step.queries, _of_keys(block, ctx.shapes, step.keys)
                done = out[:, rows], lse[:, :, rows].contiguous(), grad_out[:, rows]
                how = ctx.scale, ctx.softcap, None if grad_lse is None else grad_lse[:, :, rows], ctx.route
                grads = attention_backward(q[:, rows], keys, values, *done, step.low_BS, step.high_BS, *how)
            if not first:
                returning.wait()
            if step is not None:
                grad_q[:, rows] += grads[0]
                for total, grad in zip(_of_keys(grad_block, ctx.shapes, step.keys), grads[1:], strict=True):
                    total += grad
            if not last:
                arriving.wait()
                block = next_block
        (grad_block,), returning = ctx.comm.rotate([grad_block], "ring")
        returning.wait()
        grad_k, grad_v = _of_keys(grad_block.to(q.dtype), ctx.shapes, slice(None))
        return grad_q.to(q.dtype), grad_k, grad_v, *([None] * 6)


def _of_keys(block: Tensor, shapes: tuple[torch.Size, torch.Size], keys: slice) -> tuple[Tensor, Tensor]:
    """Views of a run of the keys and of the values that lie one after the other in a flat block."""
    of_k, of_v = shapes
    count = of_k.numel()
    return block[:count].view(of_k)[:, keys], block[count:].view(of_v)[:, keys]


def ring_attention(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    low_BS: Tensor,
    high_BS: Tensor,
    comm: Communicator,
    *,
    scale: float,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention [B, S, H, E] of this rank's queries over the keys of all ranks of the axis ring, and its log-sum-exp
    [B, H, S], through which gradients flow too.

    Tensors hold this rank's zigzag positions of the row; values may have heads of another size E. `low_BS`, `high_BS`:
    int32, the interval of the whole row that each of its queries sees, neither falling along it; a query that sees
    nothing gives 0 and 0. Partial results merge in float32, in float64 for float64. Every rank sends its keys and
    values ranks-1 times, backward once more with their gradients in the accumulation dtype.
    """
    route = "blocks" if backend == "reference" else backend  # the plain formulas for parts of a row
    out, lse = _RingAttention.apply(q_BSHD, k_BSKD, v_BSKD, low_BS, high_BS, comm, scale, softcap or 0.0, route)
    return out, lse
