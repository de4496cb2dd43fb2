"""A linear layer whose weight declares how tensor parallelism splits it."""

from collections.abc import Callable
from typing import Literal

from megalite_kernels import linear
from torch import Tensor, nn

from megalite.parallel.deferred import DeferredWeights
from megalite.parallel.fp4 import Fp4
from megalite.parallel.fp8 import KINDS, Fp8
from megalite.parallel.parameter import declare
from megalite.parallel.tensor import ALONE, TensorParallel


class Linear(nn.Module):
    """x[..., inputs] @ weight[outputs, inputs].T + bias[outputs].

    `split`: the mesh axis tp divides the outputs (rows of the weight, and the bias) or the inputs (its columns). Split
    outputs take x as `TensorParallel.enter` gives it and return this rank's outputs; split inputs take this rank's
    inputs and return to the residual stream. None: every rank has the whole weight, for its tokens of that stream.
    `fp8`: how it multiplies, where not in the dtype of x.
    """

    def __init__(
        self, inputs: int, outputs: int, *, split: Literal["outputs", "inputs"] | None, std: float, bias: bool
    ) -> None:
        super().__init__()
        shard = None if split is None else {"tp": 0 if split == "outputs" else 1}
        self.weight = declare(outputs, inputs, role="matrix", std=std, shard=shard)
        self.bias = declare(outputs, role="bias", shard={"tp": 0} if split == "outputs" else None) if bias else None
        self.split, self.returns = split, split == "inputs"
        self.tp: TensorParallel = ALONE
        self.deferred: DeferredWeights | None = None  # the weight's gradient may be asked for later
        self.fp8: Fp8 | Fp4 | None = None
        self.watch: Callable[[Tensor, Tensor], None] | None = None  # is told of every product's x and y

    def multiply_in(self, fp8: Fp8, steps: int) -> None:
        """Multiply so from now on; `steps` of history where that scales by one."""
        self.fp8 = fp8
        if fp8.history is not None:
            self.amax_history = declare(len(KINDS), steps, role="state")

    def forward(self, x: Tensor) -> Tensor:
        if not self.returns or self.tp.size == 1:
            return self._product(x, self.bias)
        y = self.tp.leave(self._product(x, None))
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.fp8 is not None:
            y = self.fp8.linear(x, self.weight, bias, self.deferred)
        elif self.deferred is not None:
            y = self.deferred.linear(x, self.weight, bias)
        else:
            y = linear(x, self.weight, bias)
        if self.watch is not None:
            self.watch(x, y)
        return y
