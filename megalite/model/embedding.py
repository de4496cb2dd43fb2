"""Tables indexed by token or position, and the output head."""

from megalite_kernels import embedding
from torch import Tensor, nn

from megalite.parallel.parameter import Role, declare


class Embedding(nn.Module):
    """Rows of weight[size, hidden] picked by integers [...]: [..., hidden]."""

    def __init__(self, size: int, hidden: int, *, role: Role, std: float) -> None:
        super().__init__()
        self.weight = declare(size, hidden, role=role, std=std, shard={"tp": 0} if role == "embedding" else None)

    def forward(self, index: Tensor) -> Tensor:
        return embedding(index, self.weight)


class Head(nn.Module):
    """weight[vocab, hidden] of the output projection; the loss and the logits read it."""

    def __init__(self, vocab: int, hidden: int, *, std: float) -> None:
        super().__init__()
        self.weight = declare(vocab, hidden, role="head", std=std, shard={"tp": 0})
