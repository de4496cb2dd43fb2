"""Runs a kernel on the CPU, program by program, with the casts that hardware makes.

Triton's own interpreter must be chosen by an environment variable before `import triton`, truncates to bf16, computes
bf16 on its bit patterns and rounds FP8 wrongly. Here a single kernel is interpreted in an ordinary process, casts are
PyTorch's (round to nearest even, FP8 saturating as `cvt.rn.satfinite` does), and products are summed in float32, in
the order of hardware. Private names of Triton are used: tests/kernels/test_interpret.py checks every code of every
narrow type.

Left as Triton has it, and so forbidden in our kernels: reductions and elementwise functions on bf16 or FP8 values.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from itertools import product
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as base
from triton import knobs
from triton.runtime.jit import JITFunction

from megalite_kernels.gpu.sanitize import Sanitizer

Builder = base.InterpreterBuilder
TORCH = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2,
}  # fmt: skip
BITS = {
    1: (np.uint8, torch.uint8),
    2: (np.uint16, torch.uint16),
    4: (np.uint32, torch.uint32),
    8: (np.uint64, torch.uint64),
}

sanitizer: ContextVar[Sanitizer | None] = ContextVar("sanitizer", default=None)
"""Watches the memory of every kernel interpreted in its scope."""
Programs = list[tuple[int, ...]]
arrange: ContextVar[Callable[[Programs], Programs]] = ContextVar("arrange", default=lambda programs: programs)
"""Which programs of a kernel run, in which order; by default all in that of their numbers."""


def interpret(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], reaches: Sequence[torch.Tensor] = ()
) -> None:
    """Run every program of kernel[grid] on tensors in CPU memory; `reaches`: those it finds by address."""
    watch = sanitizer.get()
    memory = [getattr(x, "base", x) for x in (*arguments.values(), *reaches)]  # a descriptor's tensor is its base
    with _Patched(watch, [x for x in memory if isinstance(x, torch.Tensor)]), knobs.runtime.scope():
        knobs.runtime.interpret = True
        function = _interpreted(kernel).rewrite()
        constants = {p.name for p in kernel.params if p.is_constexpr}
        values = {n: x if n in constants or x is None else _handle(x) for n, x in arguments.items()}
        full = (*grid, 1, 1)[:3]
        base.interpreter_builder.set_grid_dim(*full)
        for program in arrange.get()(list(product(*(range(size) for size in full)))):
            base.interpreter_builder.set_grid_idx(*program)
            function(**values)


def _handle(x: Any) -> Any:
    return base._implicit_cvt(x.detach() if isinstance(x, torch.Tensor) else x)


_made: dict[Any, Any] = {}


def _interpreted(kernel: Any) -> Any:
    if kernel.fn not in _made:  # making one parses the kernel
        _made[kernel.fn] = base.InterpretedFunction(kernel.fn)
    return _made[kernel.fn]


class _Languages:
    """Stands for a kernel in `_patch_lang`, which patches the modules among a function's globals."""

    __globals__ = {"tl": tl, "core": tl.core}  # noqa: RUF012


class _Patched:
    """Triton's language, interpreted, with exact casts and, if there is one, a watch on memory."""

    def __init__(self, watch: Sanitizer | None, tensors: list[torch.Tensor]):
        self.watch, self.tensors = watch, tensors

    def __enter__(self) -> None:
        self.saved: list[tuple[Any, str, Any]] = []
        self._replace(base, "_convert_float", convert)
        self._replace(Builder, "create_dot", _dot)
        self._replace(Builder, "binary_op", _binary(Builder.binary_op))
        self._replace(JITFunction, "__call__", lambda function, *a, **k: _interpreted(function).rewrite()(*a, **k))
        if self.watch is not None:
            for name, method in self.watch.methods(base, self.tensors).items():
                self._replace(Builder, name, method)
        self.scope = base._patch_lang(_Languages)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self.saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def __exit__(self, *_: object) -> None:
        self.scope.restore()
        for owner, name, value in reversed(self.saved):
            setattr(owner, name, value)


def _values(bits: Any, dtype: Any) -> torch.Tensor:
    """float32 values of an array of codes of `dtype`."""
    codes = np.ascontiguousarray(bits)
    return torch.from_numpy(codes.view(BITS[codes.itemsize][0]).copy()).view(TORCH[dtype.name]).float()


def convert(x: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Codes of `source` as codes of `target`: to nearest even, FP8 saturating."""
    if source.name == "fp64" and target.name == "fp32":
        return x.view(np.float64).astype(np.float32).view(np.uint32)
    values = _values(x, source)
    into = TORCH[target.name]
    if target.is_fp8():
        largest = torch.finfo(into).max
        values = torch.where(values.isnan(), values, values.clamp(-largest, largest))
    unsigned, tensor_unsigned = BITS[into.itemsize]
    return values.to(into).contiguous().view(tensor_unsigned).numpy().view(unsigned).reshape(x.shape)


def _numbers(handle: Any) -> Any:
    """A handle's values; floats narrower than float32 that numpy lacks are held as codes."""
    scalar = handle.dtype.scalar
    if scalar.is_floating() and handle.data.dtype.kind == "u":
        return _values(handle.data, scalar).numpy()
    return handle.data


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """a · b + d, summed in the order of k as chips do: float32 by fused multiply-adds, narrower types by instructions
    on 32 bytes of k that round once. So an element's bits do not depend on how its tile lies; those of BLAS do."""
    bits = a.dtype.scalar.primitive_bitwidth
    step = 256 // bits if bits < 32 else 1
    left, right = (_numbers(x).astype(np.float64) for x in (a, b))
    total = d.data
    for k in range(0, left.shape[-1], step):
        total = (left[..., k : k + step] @ right[..., k : k + step, :] + total).astype(total.dtype)
    return base.TensorHandle(total, d.dtype.scalar)


def _binary(plain: Callable[..., Any]) -> Callable[..., Any]:
    def binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return plain(self, left, right, op)
        result = op(_numbers(left), _numbers(right))
        if result.dtype == bool:
            return base.TensorHandle(result, tl.int1)
        return base.TensorHandle(convert(result.astype(np.float32), tl.float32, tl.bfloat16, None), tl.bfloat16)

    return binary
