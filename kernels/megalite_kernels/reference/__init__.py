"""The specification of every op, in plain PyTorch and any float dtype; float64 runs in float64 all the way.

Nothing here is tuned. Half precision is computed in float32 and rounded once at the end. Every faster
implementation in this package is tested against these functions in float64.
"""

from megalite_kernels.reference.attention import attention, visible
from megalite_kernels.reference.fp8 import dequantize_fp8, fp8_amax, fp8_scale, quantize_fp8, scaled_mm
from megalite_kernels.reference.loss import IGNORE_INDEX, linear_cross_entropy
from megalite_kernels.reference.moe import grouped_gemm, grouped_gemm_batched, moe_permute, moe_route, moe_unpermute
from megalite_kernels.reference.moments import (
    MOMENT_BLOCK,
    MOMENT_DTYPES,
    dequantize_moment,
    moment_amax,
    quantize_moment,
)
from megalite_kernels.reference.optim import adamw_moments, adamw_moved, adamw_step, gradient_norm, newton_schulz
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
    swiglu_clamped,
)
from megalite_kernels.reference.wide import accumulation_dtype

__all__ = [
    "IGNORE_INDEX",
    "MOMENT_BLOCK",
    "MOMENT_DTYPES",
    "accumulation_dtype",
    "adamw_moments",
    "adamw_moved",
    "adamw_step",
    "apply_rope",
    "attention",
    "dequantize_fp8",
    "dequantize_moment",
    "embedding",
    "fp8_amax",
    "fp8_scale",
    "geglu",
    "gelu",
    "gelu_tanh",
    "gradient_norm",
    "grouped_gemm",
    "grouped_gemm_batched",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "moment_amax",
    "newton_schulz",
    "quantize_fp8",
    "quantize_moment",
    "relu2",
    "rms_norm",
    "scaled_mm",
    "swiglu",
    "swiglu_clamped",
    "visible",
]
