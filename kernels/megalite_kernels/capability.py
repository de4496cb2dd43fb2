"""What this machine's processor can do, as far as the choice of an implementation depends on it."""

import functools
import platform
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megalite_kernels.build import library

F = TypeVar("F", bound=Callable[..., Any])


@functools.cache
def bf16_matmul_hardware() -> str | None:
    """The instruction set that multiplies bf16 on this CPU, or None: then a bf16 product is slower than fp32's."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    if platform.machine() in ("aarch64", "arm64") and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "arm bf16"
    return None


def constant_when_compiled(function: F) -> F:
    """As torch.compiler.assume_constant_result marks it, whose import of torch's compiler takes 140 MB and a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def compiled_kernels() -> bool:
    return library().functions is not None


@constant_when_compiled
def emulate_bf16_on_cpu() -> bool:
    """True when bf16 products on the CPU are to be made in fp32 and rounded once."""
    return bf16_matmul_hardware() is None
