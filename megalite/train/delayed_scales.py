"""Delayed FP8 scaling between steps: what linears and experts have seen, agreed on, goes into their histories."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megalite.comm import Communicator
from megalite.model.experts import Experts
from megalite.model.linear import Linear
from megalite.model.transformer import Transformer
from megalite.parallel.fp8 import History

OF_LINEARS, OF_EXPERTS = ("dp", "cp", "tp"), ("edp", "etp")
"""The ranks that hold parts of the same tensors."""


class DelayedScales:
    """Of this rank's stages, whose linears the ranks along dp, cp and tp have too, its experts those along edp and etp.
    Communicates over those, once a step; a model without such histories does not."""

    def __init__(self, stages: Sequence[Transformer], comm: Communicator) -> None:
        self.comm = comm
        self.histories: dict[tuple[str, ...], list[History]] = {OF_LINEARS: [], OF_EXPERTS: []}
        for module in (module for stage in stages for module in stage.modules()):
            if isinstance(module, Linear) and module.fp8 is not None:
                self._keep(OF_LINEARS, module.fp8.history, getattr(module, "amax_history", None))
            elif isinstance(module, Experts):
                for place, fp8 in enumerate(module.fp8.values()):
                    values = module.amax_history.detach()[:, place] if fp8.history is not None else None
                    self._keep(OF_EXPERTS, fp8.history, values)

    def begin(self) -> None:
        """Before a step: scales from the histories; forget what was seen outside of a step."""
        for histories in self.histories.values():
            for history in histories:
                history.begin()

    @torch.no_grad()
    def update(self) -> None:
        """After a step: the largest value of each tensor over all its microbatches and ranks."""
        for axes, histories in self.histories.items():
            if histories:
                seen = torch.stack([history.seen for history in histories if history.seen is not None])
                self.comm.all_reduce(seen, *axes, op="max")
                for history, row in zip(histories, seen, strict=True):
                    history.extend(row)

    def _keep(self, axes: tuple[str, ...], history: History | None, values: Tensor | None) -> None:
        if history is not None:
            history.values = values
            self.histories[axes].append(history)
