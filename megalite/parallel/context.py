"""Context parallelism: a row's positions spread over the mesh axis cp = ring x ulysses.

Ulysses (arXiv:2309.14509) trades positions for heads with an all-to-all around attention; the ring passes keys and
values on. Both together (arXiv:2405.07719): ulysses inside, ring outside. cp rank i holds the chunks i and 2cp-1-i of
2cp; after the exchange a ring rank holds the chunks i and 2·ring-1-i of 2·ring, so causal work is balanced either way.
"""

from math import gcd

import torch
from megalite_kernels import attention
from megalite_kernels.attention import add_sinks, visible_spans
from torch import Tensor

from megalite.comm import Communicator
from megalite.parallel.collectives import exchange
from megalite.parallel.ring import Pieces, ring_attention, zigzag


class ContextParallel:
    """This rank's part of every row, and causal attention across the parts. One cp rank holds rows as they are.

    Dimensions: B batch, S positions of this rank, H query heads, K key and value heads (both of this tp rank), D head
    size, L whole length, divisible by 2·cp when cp > 1 (else ValueError).
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.ring, self.ulysses = comm.mesh.size("ring"), comm.mesh.size("ulysses")

    def positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """The positions [S] of a row that this rank holds, int64, rising."""
        return self.take(torch.arange(length, device=device)[None])[0]

    def take(self, x_BL: Tensor) -> Tensor:
        """This rank's positions (dim 1) of a tensor that every rank has whole."""
        mesh = self.comm.mesh
        return _columns(x_BL, zigzag(x_BL.shape[1], mesh.size("cp"), mesh.index("cp")))

    def attention(
        self,
        q_BSHD: Tensor,
        k_BSKD: Tensor,
        v_BSKD: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        documents: Tensor | None = None,
        sinks: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Causal attention [B, S, H, D] of this rank's queries over the whole row; see `megalite_kernels.attention`.

        documents[B, L]: document number of each position, never falling along a row, the same on every rank. RoPE has
        been applied at `positions`. Communicates over ring and ulysses; gradients of k and v arrive summed over all
        queries that saw them, the sinks' (the same on every cp rank) as this rank's term. Raises ValueError where query
        heads do not divide by ulysses.
        """
        batch, length = q_BSHD.shape[0], q_BSHD.shape[1] * self.ring * self.ulysses
        if documents is not None and documents.shape != (batch, length):
            raise ValueError(f"context parallelism: documents are {list(documents.shape)}, rows {[batch, length]}")
        q, k, v = self._spread_heads(q_BSHD, k_BSKD, v_BSKD)
        if sinks is not None:
            sinks = sinks.chunk(self.ulysses)[self.comm.mesh.index("ulysses")]
        if self.ring == 1:
            out = attention(
                q, k, v, scale=scale, window=window, softcap=softcap, documents=documents, sinks=sinks, backend=backend
            )
        else:
            whole = q.new_empty(()).expand(batch, length, 1, 1)
            spans = visible_spans(whole, length, True, -1 if window is None else window, documents)
            pieces = zigzag(length, self.ring, self.comm.mesh.index("ring"))
            low, high = (_columns(x_BL, pieces) for x_BL in spans)
            out, lse = ring_attention(q, k, v, low, high, self.comm, scale=scale, softcap=softcap, backend=backend)
            if sinks is not None:  # once, after the partial results of all keys
                out, _ = add_sinks(out, lse, sinks)
        return self._gather_heads(out)

    def _spread_heads(self, *qkv: Tensor) -> list[Tensor]:
        """[B, S, heads, D] of one rank's positions to [B, S·ulysses, heads / ulysses, D] of the group's, in one
        all-to-all; D may differ. Key heads are repeated as often as it takes for every rank to get as many of them."""
        if self.ulysses == 1:
            return list(qkv)
        heads, key_heads = qkv[0].shape[2], qkv[1].shape[2]
        if heads % self.ulysses:
            raise ValueError(f"context parallelism: {heads} query heads do not divide by {self.ulysses} ulysses ranks")
        times = self.ulysses // gcd(key_heads, self.ulysses)
        repeated = [qkv[0], *(x.repeat_interleave(times, dim=2) for x in qkv[1:])]
        parts = [x.unflatten(2, (self.ulysses, -1)).movedim(2, 0).flatten(3) for x in repeated]
        got = exchange(torch.cat(parts, dim=3), self.comm, "ulysses")
        early, late = got.chunk(2, dim=2)
        rising = torch.cat((*early.unbind(0), *late.flip(0).unbind(0)), dim=1).split([p.shape[3] for p in parts], dim=2)
        return [part.unflatten(2, (-1, x.shape[3])) for part, x in zip(rising, qkv, strict=True)]

    def _gather_heads(self, x_BSHD: Tensor) -> Tensor:
        """The way back for attention's output."""
        if self.ulysses == 1:
            return x_BSHD
        early, late = (half.unflatten(1, (self.ulysses, -1)).movedim(1, 0) for half in x_BSHD.chunk(2, dim=1))
        got = exchange(torch.cat((early, late.flip(0)), dim=2), self.comm, "ulysses")
        return got.movedim(0, 2).flatten(2, 3)


def _columns(x_BL: Tensor, pieces: Pieces) -> Tensor:
    return torch.cat([x_BL[:, start:stop] for start, stop in pieces], dim=1)
