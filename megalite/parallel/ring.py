"""Ring attention (arXiv:2310.01889): queries stay, keys and values go around the mesh axis ring, partial results merge.

The positions of a row lie in zigzag (2 chunks a rank, one from either end), so that under a causal mask every rank has
the same work. Whatever the mask, a query sees an interval of the row; each rank's positions rise, so of the keys of any
rank it sees an interval too: one step of the ring is one call of the attention kernel.
"""

import math
from typing import Any

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


def merge(out: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor], seeing_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: (out [B, S, H, D], log-sum-exp [B, H, S]).

    `out` and the result are in the accumulation dtype, and -inf where nothing was seen yet. `seeing_BS`: queries that
    see any key of `part`; of the others the kernel says (0, 0).
    """
    (whole, lse), (added, added_lse) = out, part
    added_lse = added_lse.masked_fill(~seeing_BS[:, None], -math.inf)
    total = torch.logaddexp(lse, added_lse)
    finite = total.masked_fill(total == -math.inf, 0.0)
    kept, new = (torch.exp(x - finite).transpose(1, 2).unsqueeze(-1) for x in (lse, added_lse))
    return whole * kept + added * new, total


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor, k: Tensor, v: Tensor,
        low_BS: Tensor, high_BS: Tensor,
        comm: Communicator, scale: float, softcap: float,
    ) -> Tensor:  # fmt: skip
        ranks, place = comm.mesh.size("ring"), comm.mesh.index("ring")
        # By step: the block of the rank `step` places before this one.
        pieces = [zigzag(ranks * k.shape[1], ranks, (place - step) % ranks) for step in range(ranks)]
        spans = [spans_among(low_BS, high_BS, held) for held in pieces]
        seen = torch.stack([(low < high).any() for low, high in spans]).tolist()
        wide = accumulation_dtype(q.dtype)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=wide, device=q.device)
        own = block = torch.stack((k, v))
        for step, (low, high) in enumerate(spans):
            if step + 1 < ranks:
                (next_block,), arriving = comm.rotate([block], "ring")
            if seen[step]:
                part = attention_forward(q, block[0], block[1], low, high, scale, softcap)
                out, lse = merge((out, lse), part, low < high)
            if step + 1 < ranks:
                arriving.wait()
                block = next_block
        out = out.to(q.dtype)
        # 0 instead of -inf for a query that sees nothing, as the kernel has it.
        lse = lse.masked_fill(lse == -math.inf, 0.0)
        ctx.save_for_backward(q, own, low_BS, high_BS, out, lse)
        ctx.comm, ctx.pieces, ctx.seen, ctx.scale, ctx.softcap = comm, pieces, seen, scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """A block's gradients follow it around, one step behind, and need one turn more to be home."""
        q, block, low_BS, high_BS, out, lse = ctx.saved_tensors
        grad_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        grad_block = torch.zeros(block.shape, dtype=lse.dtype, device=q.device)
        for step, held in enumerate(ctx.pieces):
            first, last = step == 0, step + 1 == len(ctx.pieces)
            if not last:
                (next_block,), arriving = ctx.comm.rotate([block], "ring")
            if not first:
                (grad_block,), returning = ctx.comm.rotate([grad_block], "ring")
            if ctx.seen[step]:
                low, high = spans_among(low_BS, high_BS, held)
                grads = attention_backward(q, block[0], block[1], out, lse, grad_out, low, high, ctx.scale, ctx.softcap)
            if not first:
                returning.wait()
            if ctx.seen[step]:
                grad_q += grads[0]
                grad_block[0] += grads[1]
                grad_block[1] += grads[2]
            if not last:
                arriving.wait()
                block = next_block
        (grad_block,), returning = ctx.comm.rotate([grad_block], "ring")
        returning.wait()
        grad_k, grad_v = grad_block.to(q.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None, None


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
) -> Tensor:
    """Attention [B, S, H, D] of this rank's queries over the keys of all ranks of the axis ring.

    Tensors hold this rank's zigzag positions of the row. `low_BS`, `high_BS`: int32, the interval of the whole row that
    each of its queries sees, neither falling along it; a query that sees nothing gives 0. Partial results merge in
    float32, in float64 for float64. Every rank sends its keys and values ranks-1 times, backward once more with their
    gradients in the accumulation dtype.
    """
    result: Tensor = _RingAttention.apply(q_BSHD, k_BSKD, v_BSKD, low_BS, high_BS, comm, scale, softcap or 0.0)
    return result
