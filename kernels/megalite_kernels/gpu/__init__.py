"""The Triton kernels: one file an op, from `@triton.jit` functions to plain wrappers on tensors.

Only this folder imports Triton, and only when one of its ops is asked for. House rules, which the interpreter and the
compilers of four chips check: load, widen to float32, compute, narrow at the store; offsets that can pass 2³¹ are
int64; no atomics, so two runs give the same bits; every launch goes through `launch`; a configuration is a pure
function of chip, dtype and shape.
"""
