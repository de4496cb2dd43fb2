"""The feed-forward half of a block, gated (SwiGLU, GEGLU) or plain (GELU, ReLU²)."""

from collections.abc import Callable

import megalite_kernels
from torch import Tensor, nn

from megalite.config.schema import ModelConfig
from megalite.model import recompute
from megalite.model.linear import Linear
from megalite.model.size import gated
from megalite.parallel.tensor import ALONE, TensorParallel

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": megalite_kernels.swiglu,
    "geglu": megalite_kernels.geglu,
    "swiglu_clamped": megalite_kernels.swiglu_clamped,
    "gelu": megalite_kernels.gelu,
    "gelu_tanh": megalite_kernels.gelu_tanh,
    "relu2": megalite_kernels.relu2,
}
"""The gated ones take (gate, up), the plain ones (up,)."""


class MLP(nn.Module):
    """down(activation([gate(x),] up(x))): [..., hidden] to [..., hidden] through `ffn` inner values."""

    def __init__(self, config: ModelConfig, output_std: float, ffn: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gated = gated(config)
        self.recompute = False  # the activation's output is computed again in backward
        hidden, std, bias = config.hidden, config.init_std, config.mlp_bias
        if self.gated:
            self.gate = Linear(hidden, ffn, split="outputs", std=std, bias=bias)
        self.up = Linear(hidden, ffn, split="outputs", std=std, bias=bias)
        self.down = Linear(ffn, hidden, split="inputs", std=output_std, bias=bias)
        self.tp: TensorParallel = ALONE
        self.backend = "auto"

    def forward(self, x: Tensor, _: object = None) -> Tensor:
        inner = self.tp.columns(x, (self.gate, self.up) if self.gated else (self.up,))
        return recompute.run(self.recompute, self.contract, *inner)

    def contract(self, *inner: Tensor) -> Tensor:
        return self.down(self.activation(*inner, backend=self.backend))
