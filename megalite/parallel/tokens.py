"""Which tokens of a microbatch a rank has where none may be computed twice: at routers and experts.

What is decided over a whole microbatch (who is dropped, who an expert takes) is decided alike on all its ranks, from
every token in the order of their numbers, so that it depends on no layout. Communicates over cp and tp.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megalite.comm import Communicator
from megalite.parallel.context import ContextParallel
from megalite.parallel.parameter import part
from megalite.parallel.tensor import TensorParallel

AXES = ("cp", "tp")


class Tokens(NamedTuple):
    """Dimensions: N tokens of this rank, B rows of L tokens in the microbatch. `numbers_N`: row · L + position."""

    numbers_N: Tensor
    batch: int
    length: int
    comm: Communicator

    @property
    def total(self) -> int:
        return self.batch * self.length

    @property
    def rows_N(self) -> Tensor:
        return self.numbers_N // self.length

    def everyone(self, x_N: Tensor) -> Tensor:
        """Values of all tokens of the microbatch [B·L, ...], in the order of their numbers."""
        if self.comm.mesh.size(*AXES) == 1:
            return x_N
        values = self.comm.all_gather(x_N.contiguous(), *AXES)
        numbers = self.comm.all_gather(self.numbers_N, *AXES)
        return torch.empty_like(values).index_copy_(0, numbers, values)

    def mine(self, x_T: Tensor) -> Tensor:
        """This rank's part of what `everyone` gives."""
        return x_T if self.comm.mesh.size(*AXES) == 1 else x_T[self.numbers_N]

    def summed(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, without a gradient."""
        total = x.detach().clone()
        self.comm.all_reduce(total, *AXES)
        return total


def own_tokens(tp: TensorParallel, cp: ContextParallel | None, batch: int, count: int, device: torch.device) -> Tokens:
    """The `count` tokens that `TensorParallel.own` leaves this rank, of a microbatch of `batch` rows."""
    ranks = tp.comm.mesh.size(*AXES)
    length = count * ranks // batch
    numbers_BL = torch.arange(batch * length, device=device).view(batch, length)
    here = (numbers_BL if cp is None else cp.take(numbers_BL)).flatten()
    start, stop = part(len(here), tp.size, tp.index)
    return Tokens(here[start:stop], batch, length, tp.comm)
