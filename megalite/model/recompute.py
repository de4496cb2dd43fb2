"""What the backward pass finds kept: computed again, moved to host memory and back, or simply held."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Keeping:
    """How a block keeps what its backward pass needs. `again`: only its input, the rest is computed again. `offload`:
    everything in host memory."""

    again: bool = False
    offload: bool = False

    def run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        with HostMemory() if self.offload and torch.is_grad_enabled() else nullcontext():
            return run(self.again, function, *arguments)


def run(again: bool, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(*arguments); with `again`, only the arguments are kept for backward.

    The state of random generators is not restored: nothing in a model draws random numbers.
    """
    if again and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


class HostMemory(torch.autograd.graph.saved_tensors_hooks):
    """Tensors saved inside wait in (pinned) host memory; weights, which stay anyway, are left where they are."""

    def __init__(self) -> None:
        super().__init__(_to_host, _from_host)


def _to_host(tensor: Tensor) -> Any:
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter) or not tensor.is_floating_point():
        return tensor
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, on_host.copy_(tensor, non_blocking=tensor.is_cuda)


def _from_host(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, on_host = kept
    result: Tensor = on_host.to(device, non_blocking=True)
    return result
