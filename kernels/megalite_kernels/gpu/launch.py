"""The one door through which kernels start: on a GPU, in the interpreter, or only written down.

Where the tensors lie decides: a GPU runs the kernel, the CPU interprets it (slowly: for tests and for reading), and
inside `recording()` the launch is noted and nothing runs, so that what a wrapper would launch can be compiled ahead for
a chip that is not here.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

elsewhere: ContextVar[str] = ContextVar("elsewhere", default="")
"""A GPU that takes the launches on CPU tensors: they go there and come back, so that tests written for the interpreter
run on hardware too. Empty: none."""
_recorder: ContextVar["list[Launch] | None"] = ContextVar("recorder", default=None)


@dataclass(frozen=True)
class Launch:
    """A kernel with every argument by name, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2,
    reaches: Any = (), **named: Any,
) -> None:  # fmt: skip
    """Run kernel[grid](*arguments, **named). A grid without programs does nothing, as GPUs refuse an empty one.

    `reaches`: tensors that the kernel finds by their addresses, for the watch on memory.
    """
    if not all(grid):
        return
    recorder = _recorder.get()
    bound = _signature(kernel.fn).bind(*arguments, **named).arguments
    gpu = next((x.device for x in bound.values() if isinstance(x, Tensor) and x.device.type == "cuda"), None)
    if recorder is not None:
        recorder.append(Launch(kernel, grid, bound, num_warps, num_stages))
    elif gpu is not None:
        with torch.cuda.device(gpu):  # Triton starts on the current device, wherever the tensors lie
            kernel[grid](**bound, num_warps=num_warps, num_stages=num_stages)
    elif elsewhere.get() and not reaches:
        there = _Copies(elsewhere.get())
        kernel[grid](**{n: there.of(x) for n, x in bound.items()}, num_warps=num_warps, num_stages=num_stages)
        there.back()
    else:
        from megalite_kernels.gpu.interpret import interpret

        interpret(kernel, grid, bound, reaches)


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


class _Copies:
    """Copies of tensors on another device, one of each storage, so that views stay views of one memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.made: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def of(self, x: Any) -> Any:
        if hasattr(x, "block_shape"):  # a descriptor of a tensor's tiles
            return type(x)(self.of(x.base), x.shape, x.strides, x.block_shape)
        if not isinstance(x, Tensor):
            return x
        here = x.untyped_storage()
        if here.data_ptr() not in self.made:
            copy = torch.UntypedStorage(here.nbytes(), device=self.device).copy_(here)
            self.made[here.data_ptr()] = (here, copy)
        there = torch.empty(0, dtype=x.dtype, device=self.device)
        return there.set_(self.made[here.data_ptr()][1], x.storage_offset(), x.shape, x.stride())

    def back(self) -> None:
        for here, there in self.made.values():
            here.copy_(there)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are listed, not run; tensors may be on the meta device."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)
