"""Watches an interpreted kernel's memory: accesses out of bounds, races of stores, bytes and FLOPs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor


class OutOfBounds(MemoryError):
    """A kernel touched memory of no tensor that it was given."""


@dataclass
class Sanitizer:
    """Totals over all kernels of its scope; a masked-off element counts nothing.

    `races`: elements that more than one program of a launch stored to. `flops`: of products, 2·M·N·K a tile.
    """

    loaded: int = 0
    stored: int = 0
    flops: int = 0
    races: int = 0
    kernels: list[str] = field(default_factory=list)

    def methods(self, base: Any, tensors: list[Tensor]) -> dict[str, Callable[..., Any]]:
        """Replacements for the interpreter's memory operations during one launch on `tensors`."""
        builder = base.InterpreterBuilder
        load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
        owner: dict[int, tuple[int, ...]] = {}
        first, last = _ranges(tensors)

        def touched(interpreter: Any, pointers: Any, mask: Any, what: str) -> Any:
            size = base._get_np_dtype(pointers.get_element_ty()).itemsize
            there = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)  # a mask may come as int8: no indices
            places = pointers.data[there].ravel()
            holder = np.searchsorted(first, places, side="right").astype(int) - 1
            if ((holder < 0) | (places + np.uint64(size) > last[holder])).any():
                raise OutOfBounds(f"out-of-bounds {what} in program {interpreter.grid_idx}")
            return places, places.size * size

        def watched_load(interpreter: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            self.loaded += touched(interpreter, pointers, mask, "load")[1]
            return load(interpreter, pointers, mask, *rest, **named)

        def watched_store(interpreter: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            places, size = touched(interpreter, pointers, mask, "store")
            self.stored += size
            program = tuple(interpreter.grid_idx)
            self.races += sum(owner.setdefault(place, program) != program for place in places.tolist())
            return store(interpreter, pointers, value, mask, *rest, **named)

        def watched_dot(interpreter: Any, a: Any, b: Any, *rest: Any) -> Any:
            self.flops += 2 * a.data.size * b.data.shape[-1]
            return dot(interpreter, a, b, *rest)

        return {"create_masked_load": watched_load, "create_masked_store": watched_store, "create_dot": watched_dot}


def _ranges(tensors: list[Tensor]) -> tuple[Any, Any]:
    """First and past-the-last address of each tensor's own elements, in order of address.

    The view that was passed, not its storage: reading past a slice of a larger tensor is an error too.
    """
    spans = []
    for x in tensors:
        if x.numel():
            reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            spans.append((x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()))
    ordered = sorted(spans)
    # Views of one storage may overlap: each range reaches as far as any before it, so a lookup by start is enough.
    ends: Any = np.maximum.accumulate([end for _, end in ordered]) if ordered else []
    return np.array([start for start, _ in ordered], np.uint64), np.array(ends, np.uint64)
