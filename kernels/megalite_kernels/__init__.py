"""Ops that decide training speed, as plain functions on tensors; `reference` is their specification.

Imports torch alone and knows nothing of megalite. Shapes and meaning of each op: see its reference.
"""

from megalite_kernels.activation import geglu, gelu, gelu_tanh, relu2, swiglu, swiglu_clamped
from megalite_kernels.allocator import tune_allocator
from megalite_kernels.attention import attention
from megalite_kernels.embedding import embedding
from megalite_kernels.explain import decision, explain
from megalite_kernels.fp8 import dequantize_fp8, fp8_amax, fp8_scale, quantize_fp8, scaled_mm
from megalite_kernels.linear import linear, weight_gradient
from megalite_kernels.loss import linear_cross_entropy, vocabulary_parallel_cross_entropy
from megalite_kernels.mixed import accumulate
from megalite_kernels.moe import grouped_gemm, moe_permute, moe_route, moe_unpermute
from megalite_kernels.moe_cpu import multiple_of_rows
from megalite_kernels.norm import layer_norm, rms_norm
from megalite_kernels.optim import adamw_step, gradient_norm, newton_schulz
from megalite_kernels.reference import IGNORE_INDEX
from megalite_kernels.rope import apply_rope

__all__ = [
    "IGNORE_INDEX",
    "accumulate",
    "adamw_step",
    "apply_rope",
    "attention",
    "decision",
    "dequantize_fp8",
    "embedding",
    "explain",
    "fp8_amax",
    "fp8_scale",
    "geglu",
    "gelu",
    "gelu_tanh",
    "gradient_norm",
    "grouped_gemm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "multiple_of_rows",
    "newton_schulz",
    "quantize_fp8",
    "relu2",
    "rms_norm",
    "scaled_mm",
    "swiglu",
    "swiglu_clamped",
    "tune_allocator",
    "vocabulary_parallel_cross_entropy",
    "weight_gradient",
]
