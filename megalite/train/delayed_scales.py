"""Delayed FP8 scaling between steps: what every linear has seen, agreed on by all ranks and put into its history."""

from collections.abc import Sequence

import torch

from megalite.comm import Communicator
from megalite.model.linear import Linear
from megalite.model.transformer import Transformer
from megalite.parallel.fp8 import History


class DelayedScales:
    """Of this rank's stages, whose linears the ranks along dp, cp and tp have too. Communicates over those, once a
    step; a model without such histories does not."""

    def __init__(self, stages: Sequence[Transformer], comm: Communicator) -> None:
        self.comm = comm
        linears = [module for stage in stages for module in stage.modules() if isinstance(module, Linear)]
        self.histories: list[History] = []
        for linear in linears:
            if linear.fp8 is not None and linear.fp8.history is not None:
                linear.fp8.history.values = linear.amax_history
                self.histories.append(linear.fp8.history)

    def begin(self) -> None:
        """Before a step: scales from the histories; forget what was seen outside of a step."""
        for history in self.histories:
            history.begin()

    @torch.no_grad()
    def update(self) -> None:
        """After a step: the largest value of each tensor over all its microbatches and ranks."""
        if not self.histories:
            return
        seen = torch.stack([history.seen for history in self.histories if history.seen is not None])
        self.comm.all_reduce(seen, "dp", "cp", "tp", op="max")
        for history, row in zip(self.histories, seen, strict=True):
            history.extend(row)
