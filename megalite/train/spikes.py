"""Loss spikes: told from the noise of the steps before, and how far a run has moved on in its data because of them."""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from megalite.config.schema import TrainConfig

WINDOW = 128
"""Steps that a step is compared with (as OLMo-core's SkipStepOptimizer)."""
FACTOR = 10.0
"""Deviations above the median that make a spike."""
FEWEST = 20
"""Of them there must be so many before anything is called a spike."""
NORMAL = 1.4826
"""Median absolute deviation to the standard deviation of a normal distribution."""
NOTICED = 1e-3
"""Nats. Smaller deviations are taken for this, so that steps all alike make no spike of the next."""


def _window() -> deque[float]:
    return deque(maxlen=WINDOW)


@dataclass
class Spikes:
    """A spike is a step whose loss, or whose gradient norm's logarithm, is above the median of those before by more
    than `factor` deviations: Hampel's identifier (Leys et al. 2013, doi:10.1016/j.jesp.2013.03.013). Median and median
    absolute deviation stay what they are while fewer than half of the window are spikes themselves. All ranks know the
    same numbers, so they agree.

    `limit`: rewinds allowed, of which `rewinds` have been. `skipped`: global batches of the data order that lie behind
    and that no step of this course was trained on: step n reads batch n + skipped. `found`: what the last step was.
    """

    factor: float = 0.0
    limit: int = 0
    rewinds: int = 0
    skipped: int = 0
    found: str = ""
    losses: deque[float] = field(default_factory=_window)
    norms: deque[float] = field(default_factory=_window)

    @classmethod
    def of(cls, config: TrainConfig) -> "Spikes":
        return cls() if config.spike_rewinds is None else cls(FACTOR, config.spike_rewinds)

    @property
    def kept(self) -> bool:
        """Whether a checkpoint has anything to keep of it."""
        return self.factor > 0 or self.rewinds > 0

    def see(self, loss: float, grad_norm: float) -> str:
        """Notes a finite step; what it is a spike of in words, or ""."""
        if self.factor == 0:
            return ""
        logarithm = math.log(max(grad_norm, 1e-30))
        seen = (("loss", loss, self.losses), ("logarithm of the gradient norm", logarithm, self.norms))
        self.found = "; ".join(filter(None, (self._above(*of) for of in seen)))
        self.losses.append(loss)
        self.norms.append(logarithm)
        return self.found

    def _above(self, name: str, value: float, before: deque[float]) -> str:
        if len(before) < FEWEST:
            return ""
        median = statistics.median(before)
        deviation = max(NOTICED, NORMAL * statistics.median(abs(other - median) for other in before))
        times = (value - median) / deviation
        if times <= self.factor:
            return ""
        return f"{name} {value:.4g} is {times:.3g} deviations above {median:.4g}, the median of {len(before)} steps"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the limit is the configuration's."""
        return {
            "rewinds": self.rewinds, "skipped": self.skipped, "losses": list(self.losses), "norms": list(self.norms)
        }  # fmt: skip

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from `state`; a checkpoint of a run that did not look for spikes has none."""
        state = state or {"rewinds": 0, "skipped": 0, "losses": [], "norms": []}
        self.rewinds, self.skipped, self.found = state["rewinds"], state["skipped"], ""
        self.losses, self.norms = deque(state["losses"], WINDOW), deque(state["norms"], WINDOW)
