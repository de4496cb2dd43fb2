"""Data parallelism: gradients live in flat buckets, accumulate over microbatches, and are summed over ranks while the
backward pass still runs. Gradients are sums; the loss is divided by the global token count before backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megalite.comm import Communicator

REPLICATED_OVER = ("dp", "cp")
"""Mesh axes whose ranks hold the same parameters but see different tokens."""


class Bucket:
    """A flat buffer of gradients in `dtype`, summed over ranks by one collective."""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = parameters
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
        self.views, start = [], 0
        for parameter in parameters:
            self.views.append(self.flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
        self.missing = 0
        self.work: Any = None


class Gradients:
    """All gradients of a model: zeroed, accumulated, reduced over dp and cp, measured, clipped.

    Buckets follow the reverse of definition order, which is nearly the order in which backward finishes them. They are
    launched strictly in that order, so every rank issues the same collectives whatever its autograd graph does.
    """

    def __init__(
        self, parameters: list[nn.Parameter], comm: Communicator, dtype: torch.dtype, bucket_bytes: float
    ) -> None:
        self.comm = comm
        self.buckets: list[Bucket] = []
        pending: list[nn.Parameter] = []
        for parameter in reversed(parameters):
            pending.append(parameter)
            if sum(p.numel() for p in pending) * dtype.itemsize >= bucket_bytes:
                self.buckets.append(Bucket(pending, dtype))
                pending = []
        if pending:
            self.buckets.append(Bucket(pending, dtype))
        self._slots = {p: (b, v) for b in self.buckets for p, v in zip(b.parameters, b.views, strict=True)}
        self._last_microbatch = False
        self._launched = 0
        for parameter, (_, view) in self._slots.items():
            if parameter.dtype == dtype:
                parameter.grad = view
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The gradient of `parameter`: its view into a bucket."""
        return self._slots[parameter][1]

    def zero(self) -> None:
        for bucket in self.buckets:
            bucket.flat.zero_()
            bucket.missing = len(bucket.parameters)
        self._launched = 0

    @contextmanager
    def accumulating(self, last_microbatch: bool) -> Iterator[None]:
        """Around forward and backward of a microbatch; during the last one finished buckets are reduced at once."""
        self._last_microbatch = last_microbatch
        yield

    def _accumulated(self, parameter: nn.Parameter) -> None:
        bucket, view = self._slots[parameter]
        if parameter.grad is not view:
            assert parameter.grad is not None
            view.add_(parameter.grad)
            parameter.grad = None
        if self._last_microbatch:
            bucket.missing -= 1
            while self._launched < len(self.buckets) and self.buckets[self._launched].missing == 0:
                self._launch()

    def _launch(self) -> None:
        bucket = self.buckets[self._launched]
        bucket.work = self.comm.all_reduce(bucket.flat, *REPLICATED_OVER, async_op=True)
        self._launched += 1

    def finish(self) -> None:
        """Reduce what is left (a parameter may have had no gradient) and wait for every bucket."""
        while self._launched < len(self.buckets):
            self._launch()
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None

    def global_norm(self) -> torch.Tensor:
        """L2 norm over every logical gradient element, each once; float64 sum of per-parameter norms."""
        views = [view for bucket in reversed(self.buckets) for view in reversed(bucket.views)]
        norms = torch.stack(torch._foreach_norm(views))
        return torch.linalg.vector_norm(norms.double())

    def scale(self, factor: float) -> None:
        for bucket in self.buckets:
            bucket.flat.mul_(factor)
