"""Ops that decide training speed, as plain functions on tensors; `reference.py` is their specification.

Imports torch alone and knows nothing of megalite. Shapes and meaning of each op: see its reference.
"""

from megalite_kernels.allocator import tune_allocator
from megalite_kernels.attention import attention
from megalite_kernels.elementwise import apply_rope, geglu, gelu, gelu_tanh, relu2, swiglu
from megalite_kernels.embedding import embedding
from megalite_kernels.explain import explain
from megalite_kernels.linear import linear, weight_gradient
from megalite_kernels.loss import linear_cross_entropy, vocabulary_parallel_cross_entropy
from megalite_kernels.norm import layer_norm, rms_norm
from megalite_kernels.reference import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "apply_rope",
    "attention",
    "embedding",
    "explain",
    "geglu",
    "gelu",
    "gelu_tanh",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "relu2",
    "rms_norm",
    "swiglu",
    "tune_allocator",
    "vocabulary_parallel_cross_entropy",
    "weight_gradient",
]
