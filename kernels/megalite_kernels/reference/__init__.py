"""The specification of every op, in plain PyTorch and any float dtype; float64 runs in float64 all the way.

Nothing here is tuned. Half precision is computed in float32 and rounded once at the end. Every faster
implementation in this package is tested against these functions in float64.
"""

from megalite_kernels.reference.attention import attention, visible
from megalite_kernels.reference.loss import IGNORE_INDEX, linear_cross_entropy
from megalite_kernels.reference.rows import (
    apply_rope,
    embedding,
    geglu,
    gelu,
    gelu_tanh,
    layer_norm,
    linear,
    relu2,
    rms_norm,
    swiglu,
)
from megalite_kernels.reference.wide import accumulation_dtype

__all__ = [
    "IGNORE_INDEX",
    "accumulation_dtype",
    "apply_rope",
    "attention",
    "embedding",
    "geglu",
    "gelu",
    "gelu_tanh",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "relu2",
    "rms_norm",
    "swiglu",
    "visible",
]
