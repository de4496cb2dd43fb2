"""RMSNorm and LayerNorm with declared parameters; the arithmetic (float32 at least) is in megalite_kernels."""

from typing import Literal

from megalite_kernels import layer_norm, rms_norm
from torch import Tensor, nn

from megalite.config.schema import ModelConfig
from megalite.parallel.parameter import declare


class RMSNorm(nn.Module):
    """x[..., size] / rms(x) * weight, or * (1 + weight) when zero-centred."""

    def __init__(
        self, size: int, eps: float, zero_centered: bool = False, sees: Literal["tokens", "heads"] = "tokens"
    ) -> None:
        super().__init__()
        self.weight = declare(size, role="norm", constant=0.0 if zero_centered else 1.0, sees=sees)
        self.eps, self.zero_centered = eps, zero_centered
        self.backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = rms_norm(x, self.weight, self.eps, self.zero_centered, backend=self.backend)
        return y


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = declare(size, role="norm", constant=1.0)
        self.bias = declare(size, role="norm")
        self.eps = eps
        self.backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = layer_norm(x, self.weight, self.bias, self.eps, backend=self.backend)
        return y


def make_norm(config: ModelConfig) -> nn.Module:
    """The config's norm over the residual stream."""
    if config.norm == "layernorm":
        return LayerNorm(config.hidden, config.norm_eps)
    return RMSNorm(config.hidden, config.norm_eps, config.norm_zero_centered)
