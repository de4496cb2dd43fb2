"""torch.library.custom_op for ops that eager code calls too.

The first call of one of torch's imports its compiler, 140 MB and a second and a half, to keep the op out of what is
compiled. Here that waits until something else has imported it.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

_KEPT_OUT = "__dynamo_disable"
"""Where torch._disable_dynamo looks for what it made of a function."""


def custom_op(name: str, *, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator; the op, as torch.library.custom_op gives it."""

    def made(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(name, function, mutates_args=mutates_args)
        for kernel in getattr(op, "_backend_fns", {}).values():
            if (plain := getattr(kernel, "__wrapped__", None)) is not None:
                setattr(plain, _KEPT_OUT, _kept_out_later(plain))
        return op

    return made


def _kept_out_later(plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **words: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return plain(*arguments, **words)
        setattr(plain, _KEPT_OUT, torch._dynamo.disable(plain, wrapping=False))
        return getattr(plain, _KEPT_OUT)(*arguments, **words)

    return call
