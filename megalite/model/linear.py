"""A linear layer whose weight declares how tensor parallelism splits it."""

from typing import Literal

from megalite_kernels import linear
from torch import Tensor, nn

from megalite.parallel.parameter import declare


class Linear(nn.Module):
    """x[..., inputs] @ weight[outputs, inputs].T + bias[outputs].

    `split`: the mesh axis tp divides the outputs (rows of the weight, and the bias) or the inputs (its columns).
    """

    def __init__(
        self, inputs: int, outputs: int, *, split: Literal["outputs", "inputs"], std: float, bias: bool
    ) -> None:
        super().__init__()
        rows = split == "outputs"
        self.weight = declare(outputs, inputs, role="matrix", std=std, shard={"tp": 0 if rows else 1})
        self.bias = declare(outputs, role="bias", shard={"tp": 0} if rows else None) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
