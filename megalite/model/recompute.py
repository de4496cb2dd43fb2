"""Run a function now and again in the backward pass, instead of keeping what it computes in between."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run(again: bool, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(*arguments); with `again`, only the arguments are kept for backward.

    The state of random generators is not restored: nothing in a model draws random numbers.
    """
    if again and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)
