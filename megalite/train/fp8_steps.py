"""FP8 from step to step: what linears and experts saw goes into histories; weights' factors are kept for a step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megalite.comm import Communicator
from megalite.model.experts import Experts
from megalite.model.linear import Linear
from megalite.model.transformer import Transformer
from megalite.parallel.fp8 import Fp8, History, WeightFactors

OF_LINEARS, OF_EXPERTS = ("dp", "cp", "tp"), ("edp", "etp")
"""The ranks that hold parts of the same tensors."""


class Fp8Steps:
    """Of this rank's stages, whose linears the ranks along dp, cp and tp have too, its experts those along edp and etp.
    Communicates over those, once a step; a model without histories does not. `whole`: weights stay what they are for a
    whole step, and so do their factors; ZeRO 3 has them for one use alone.
    """

    def __init__(self, stages: Sequence[Transformer], comm: Communicator, whole: bool) -> None:
        self.comm = comm
        self.weights: list[WeightFactors] = []
        self.histories: dict[tuple[str, ...], list[History]] = {OF_LINEARS: [], OF_EXPERTS: []}
        for module in (module for stage in stages for module in stage.modules()):
            if isinstance(module, Linear) and isinstance(module.fp8, Fp8):
                self.weights += [module.fp8.weights] * whole
                self._keep(OF_LINEARS, module.fp8.history, getattr(module, "amax_history", None))
            elif isinstance(module, Experts):
                for place, fp8 in enumerate(module.fp8.values()):
                    self.weights += [fp8.weights] * whole
                    values = module.amax_history.detach()[:, place] if fp8.history is not None else None
                    self._keep(OF_EXPERTS, fp8.history, values)

    def begin(self) -> None:
        """Before a step: scales from the histories; forget what was seen outside of a step."""
        every = [history for histories in self.histories.values() for history in histories]
        if every:
            known = torch.stack([history.begin() for history in every]).tolist()
            for history, complete in zip(every, known, strict=True):
                history.complete = complete

    @contextmanager
    def weights_kept(self) -> Iterator[None]:
        """While the products of a step are computed, and weights do not change."""
        for factors in self.weights:
            factors.begin()
        try:
            yield
        finally:
            for factors in self.weights:
                factors.end()

    @torch.no_grad()
    def update(self, taken: bool, rescaled: float) -> None:
        """After a step: if it was `taken`, the largest value of each tensor over all its microbatches and ranks goes
        into the histories. `rescaled`: the loss scale's change, by which the next gradients are larger than these."""
        for axes, histories in self.histories.items():
            if histories and taken:
                seen = torch.stack([history.seen for history in histories])
                self.comm.all_reduce(seen, *axes, op="max")
                for history, row in zip(histories, seen, strict=True):
                    history.extend(row)
        self.rescale(rescaled)

    @torch.no_grad()
    def rescale(self, times: float) -> None:
        """What was seen of gradients, where the loss scale is another now: larger by that power of two."""
        for history in (of for histories in self.histories.values() for of in histories if times != 1.0):
            history.rescale(times)

    def _keep(self, axes: tuple[str, ...], history: History | None, values: Tensor | None) -> None:
        if history is not None:
            history.values = values
            self.histories[axes].append(history)
