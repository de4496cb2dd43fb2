"""What the backward pass finds kept: computed again, moved to host memory and back, or simply held."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


@dataclass
class Keeping:
    """How a block keeps what its backward pass needs. `again`: only its input, the rest is computed again; `norms`: all
    but what the norms before its sublayers give. `offload`: everything in host memory."""

    again: bool = False
    norms: bool = False
    offload: bool = False

    def normed(self, norm: nn.Module, sublayer: nn.Module, x: Tensor, *more: Any) -> Tensor:
        """sublayer(norm(x), *more)."""
        y = norm(x)
        drops = self.norms and y is not x and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not drops:
            result: Tensor = sublayer(y, *more)
            return result
        dropped = _Dropped(norm, x, y)
        with saved_tensors_hooks(dropped.pack, dropped.unpack):
            result = sublayer(y, *more)
        dropped.y = None
        return result

    def run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        with HostMemory() if self.offload and torch.is_grad_enabled() else nullcontext():
            return run(self.again, function, *arguments)


def run(again: bool, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(*arguments); with `again`, only the arguments are kept for backward (arXiv:1604.06174).

    The state of random generators is not restored: nothing in a model draws random numbers. Eager code does without
    torch.utils.checkpoint, which imports torch's compiler: 140 MB and a second and a half.
    """
    if not again or not torch.is_grad_enabled():
        return function(*arguments)
    if torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    computed = _ComputedAgain(function, arguments)
    with saved_tensors_hooks(computed.number, computed.tensor):
        return function(*arguments)


class _ComputedAgain:
    """A call whose saved tensors are numbers until backward asks for the first; then it runs again, up to the last
    tensor that it saves."""

    def __init__(self, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.saved: list[tuple[torch.Size, torch.dtype]] = []
        self.tensors: dict[int, Tensor] = {}
        # Kept as autograd keeps any tensor, so that hooks around this call (host memory, another call) see them.
        self.places = [place for place, x in enumerate(arguments) if isinstance(x, Tensor)]
        given = (arguments[place] for place in self.places)
        self.given = _Given.apply(torch.empty(0, requires_grad=True), *given).grad_fn
        self.arguments = [None if isinstance(x, Tensor) else x for x in arguments]

    def number(self, tensor: Tensor) -> int:
        self.saved.append((tensor.shape, tensor.dtype))
        return len(self.saved) - 1

    def tensor(self, number: int) -> Tensor:
        if number not in self.tensors:
            self._run_again()
        return self.tensors.pop(number)

    def _run_again(self) -> None:
        arguments = self.arguments.copy()
        for place, tensor in zip(self.places, self.given.saved_tensors, strict=True):
            arguments[place] = tensor
        self.tensors.clear()
        found = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal found
            assert self.saved[found] == (tensor.shape, tensor.dtype), "computed again, it took another course"
            # Detached: a node that held its own output would never be freed.
            kept = self.tensors[found] = tensor.detach()
            found += 1
            if found == len(self.saved):
                raise _AllThere
            return kept

        try:
            with saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
                self.function(*arguments)
        except _AllThere:
            pass
        assert found == len(self.saved), f"{found} tensors saved when computed again, {len(self.saved)} going forward"


class _AllThere(Exception):
    """What backward needs is computed."""


class _Given(torch.autograd.Function):
    """A node that saves tensors, and nothing else."""

    @staticmethod
    def forward(ctx: Any, tie: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tie.new_empty(0)


class _Dropped:
    """y = norm(x), of which those who save it keep only how they see it: backward makes y anew, from x, which the norm
    keeps. Hooks around these see nothing that is saved inside."""

    def __init__(self, norm: nn.Module, x: Tensor, y: Tensor) -> None:
        self.norm, self.x = norm, x.detach()
        self.y: Tensor | None = y.detach()
        self.waiting = 0

    def pack(self, tensor: Tensor) -> Any:
        if self.y is not None and tensor.untyped_storage().data_ptr() == self.y.untyped_storage().data_ptr():
            self.waiting += 1
            return tensor.shape, tensor.stride(), tensor.storage_offset()
        # Detached, or a node that saves its own output would hold itself.
        return tensor if tensor.is_leaf else tensor.detach()

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self.y is None:
            with torch.no_grad():
                self.y = self.norm.forward(self.x)  # not a call that anybody else should see
        seen = self.y.as_strided(*kept)
        self.waiting -= 1
        if self.waiting <= 0:
            self.y = None
        return seen


class HostMemory(saved_tensors_hooks):
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
