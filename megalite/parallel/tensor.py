"""Tensor and sequence parallelism: how one layer's work is spread over the mesh axis tp.

Weights are cut by their declarations; here are the borders that activations cross. The residual stream is replicated
over tp or, under sequence parallelism (arXiv:2205.05198), each rank holds part of its tokens: rows of the flattened
[batch x sequence, hidden], so that joining them needs no copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megalite_kernels import embedding, linear_cross_entropy, vocabulary_parallel_cross_entropy
from torch import Tensor

from megalite.comm import Communicator
from megalite.errors import RunError
from megalite.mesh import AXES, Mesh
from megalite.parallel.collectives import gather, gather_for_parts, scatter_sum, split, sum_backward, sum_forward
from megalite.parallel.overlap import gathered_products
from megalite.parallel.parameter import part

ROUNDING = 1e-6
"""Relative; ranks that compute the same may add in another order on some hardware."""


class TensorParallel:
    """One rank's side of the borders. `sp`: the residual stream is spread over tp. `overlap`: with sp, tokens are
    gathered while they are multiplied."""

    def __init__(self, comm: Communicator, sp: bool = False, overlap: bool = False) -> None:
        self.comm, self.size, self.index = comm, comm.mesh.size("tp"), comm.mesh.index("tp")
        self.sp = sp and self.size > 1
        self.overlap = overlap and self.sp

    def enter(self, x: Tensor) -> Tensor:
        """Residual stream to the input of split weights: all tokens on every rank ([N, E] under sp, else as it is).

        Backward sums the ranks' terms of the gradient.
        """
        if self.sp:
            return gather_for_parts(x, self.comm, "tp")
        self._must_be_replicated("the residual stream where it enters split weights", x)
        return sum_backward(x, self.comm, "tp")

    def columns(self, x: Tensor, linears: Sequence[Any]) -> list[Tensor]:
        """Residual stream through linears with split outputs: each one's [..., outputs / tp] for all tokens."""
        if self.overlap:
            weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
            return list(gathered_products(x, weights, biases, self.comm, linears[0].deferred))
        entered = self.enter(x)
        return [linear(entered) for linear in linears]

    def leave(self, partial: Tensor) -> Tensor:
        """Every rank's term of a sublayer's output [..., E] to the residual stream."""
        if self.sp:
            return scatter_sum(partial.flatten(0, -2), self.comm, "tp")
        return sum_forward(partial, self.comm, "tp")

    def own(self, x: Tensor) -> Tensor:
        """Residual stream to this rank's own tokens of it [N / tp, E]: no two ranks compute the same one."""
        flat = x.flatten(0, -2)
        return flat if self.sp else split(flat, self.comm, "tp")

    def joined(self, own_NE: Tensor, like: Tensor) -> Tensor:
        """Every rank's own tokens as the residual stream, of the shape of `like`."""
        return own_NE if self.sp else gather(own_NE, self.comm, "tp").view(like.shape)

    def tokens(self, x_BS: Tensor) -> Tensor:
        """What belongs to this rank's tokens of the residual stream, of something every rank has whole."""
        return split(x_BS.flatten(0, 1), self.comm, "tp") if self.sp else x_BS

    def heads(self, x: Tensor, heads: int, head_dim: int, queries: int) -> Tensor:
        """[..., rows / tp] of key or value rows to this rank's [..., kv heads, head_dim].

        With fewer kv heads than ranks a rank computes part of a head; the parts are joined and each rank takes the
        heads that its queries read. So no weight is replicated, and no gradient needs a sum of its own.
        """
        if heads % self.size == 0:
            return x.unflatten(-1, (-1, head_dim))
        whole = gather_for_parts(x, self.comm, "tp", dim=-1).unflatten(-1, (-1, head_dim))
        first, stop = part(queries, self.size, self.index)
        group = queries // heads
        return whole[..., first // group : (stop - 1) // group + 1, :]

    def lookup(self, index: Tensor, weight_VE: Tensor, rows: int) -> Tensor:
        """Rows of a table of `rows` rows, of which this rank holds its part, as the residual stream."""
        if self.size == 1:
            return embedding(index, weight_VE)
        first, stop = part(rows, self.size, self.index)
        elsewhere = (index < first) | (index >= stop)
        found = embedding((index - first).masked_fill(elsewhere, 0), weight_VE)
        return self.leave(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))

    def cross_entropy(
        self, x: Tensor, weight_VE: Tensor, targets_N: Tensor, vocab: int, z_loss: float, softcap: float | None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(nll_sum, z_sum) of all tokens, replicated, from the residual stream; the logits are never joined."""
        hidden_NE = self.enter(x).flatten(0, -2)
        if self.size == 1:
            return linear_cross_entropy(
                hidden_NE, weight_VE, targets_N, z_loss=z_loss, softcap=softcap, backend=backend
            )
        self._must_be_replicated("the targets of the loss", targets_N)
        first, _ = part(vocab, self.size, self.index)
        losses = vocabulary_parallel_cross_entropy(
            hidden_NE, weight_VE, targets_N,
            first=first, vocab=vocab, shards=self.size, combine=self._combine, z_loss=z_loss, softcap=softcap,
            backend=backend,
        )  # fmt: skip
        self._must_be_replicated("the loss", *losses)
        return losses

    def _combine(self, lse_N: Tensor, chosen_N: Tensor) -> tuple[Tensor, Tensor]:
        everyone = self.comm.all_gather(torch.stack([lse_N, chosen_N])[None], "tp")
        return torch.logsumexp(everyone[:, 0], dim=0), everyone[:, 1].sum(0)

    def _must_be_replicated(self, what: str, *tensors: Tensor) -> None:
        """RunError, where the communicator checks, if the ranks' sums of a tensor differ by more than rounding."""
        if not self.comm.check or self.size == 1:
            return
        wide = [tensor.detach().double() for tensor in tensors]
        sums = torch.stack([total for x in wide for total in (x.sum(), x.abs().sum())])
        extremes = torch.stack([sums, -sums])
        self.comm.all_reduce(extremes, "tp", op="max")
        if not (extremes.sum(0) <= ROUNDING * extremes[0].abs().max()).all():
            error = RunError(f"tensor parallelism: {what} must be the same on all tp ranks and is not (parallel.check)")
            error.on_every_rank = True
            raise error


ALONE = TensorParallel(Communicator(Mesh(dict.fromkeys(AXES, 1))))
"""No tensor parallelism: every border changes nothing."""
