"""Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740): what keeps float16 gradients above its smallest
number. A state machine of plain numbers; whoever asks it knows already what all ranks saw.
"""

from dataclasses import dataclass
from typing import Any

from megalite.config.precision import LARGEST_LOSS_SCALE
from megalite.config.schema import PrecisionConfig

GROWTH = 2.0
"""A power of two: scaling and unscaling then round nothing."""


@dataclass
class LossScale:
    """`value`: what the loss is multiplied by. `window`: finite steps until it doubles; `hysteresis`: steps that
    overflow, since it last doubled, until each halves it (as in Megatron). `window` 0: the value never moves.

    `finite`: in a row; `tolerated`: overflows left.
    """

    value: float = 1.0
    window: int = 0
    hysteresis: int = 1
    finite: int = 0
    tolerated: int = 1

    @classmethod
    def of(cls, config: PrecisionConfig, scaled: bool) -> "LossScale":
        if not scaled:
            return cls()
        return cls(
            config.loss_scale, config.loss_scale_window, config.loss_scale_hysteresis, 0, config.loss_scale_hysteresis
        )

    @property
    def dynamic(self) -> bool:
        return self.window > 0

    @property
    def can_fall(self) -> bool:
        return self.dynamic and self.value > 1.0

    def update(self, finite: bool) -> None:
        """After every step, with what all ranks together saw."""
        if not self.dynamic:
            return
        if not finite:
            self.finite = 0
            self.tolerated = max(0, self.tolerated - 1)
            if self.tolerated == 0:
                self.value = max(1.0, self.value / GROWTH)
            return
        self.finite += 1
        if self.finite >= self.window:  # it may have become shorter since the checkpoint
            self.finite, self.tolerated = 0, self.hysteresis
            self.value = min(LARGEST_LOSS_SCALE, self.value * GROWTH)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the limits are the configuration's."""
        return {"value": self.value, "finite": self.finite, "tolerated": self.tolerated}

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from `state`; a checkpoint of a precision without a scale has none."""
        if self.dynamic and state is not None:
            self.value, self.finite, self.tolerated = state["value"], state["finite"], state["tolerated"]
