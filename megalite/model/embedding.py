"""Tables indexed by token or position, and the output head."""

from megalite_kernels import embedding
from torch import Tensor, nn

from megalite.parallel.parameter import declare
from megalite.parallel.tensor import ALONE, TensorParallel


class Embedding(nn.Module):
    """Rows of weight[vocab, hidden] picked by tokens [B, S], as the residual stream; tp divides the vocabulary."""

    def __init__(self, vocab: int, hidden: int, *, std: float) -> None:
        super().__init__()
        self.vocab = vocab
        self.weight = declare(vocab, hidden, role="embedding", std=std, shard={"tp": 0})
        self.tp: TensorParallel = ALONE

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return self.tp.lookup(tokens_BS, self.weight, self.vocab)


class Positions(nn.Module):
    """Rows of weight[positions, hidden] picked by positions [...]: [..., hidden]."""

    def __init__(self, positions: int, hidden: int, *, std: float) -> None:
        super().__init__()
        self.weight = declare(positions, hidden, role="position", std=std)

    def forward(self, positions: Tensor) -> Tensor:
        return embedding(positions, self.weight)


class Head(nn.Module):
    """weight[vocab, hidden] of the output projection; the loss and the logits read it."""

    def __init__(self, vocab: int, hidden: int, *, std: float) -> None:
        super().__init__()
        self.weight = declare(vocab, hidden, role="head", std=std, shard={"tp": 0})
