"""What the trainer tells the outside: one record a step, and the hooks that receive it. No torch, no maths.

The trainer's loop holds only what changes the weights; everything that watches it is a `Callback`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megalite.config.schema import Config


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all ranks.

    `tokens`: trained on since step 1. `loss`: nats a token (without z-loss). `grad_norm`: global, before clipping.
    `tokens_per_s`: all ranks. `model_tflops`: model TFLOP/s of one rank. `mfu`: share of one rank's measured peak
    (0.41 is 41%); None where no peak was measured. `memory_gb`: this rank's peak (1e9 bytes). `step_s`: wall time, of
    which `data_s` waiting for data. `skipped`: the update was left out because loss or gradient was not finite.
    `val_*`: set on the steps that evaluate. `experts`: see `Balance.described`. `mtp_loss`: nats a token, the mean over
    the multi-token modules. `loss_scale`: of this step, with precision=fp16. `numerics`: see `Numerics.first`, of a
    skipped step with debug.numerics. `spike`: of what the step was one. `rewinds`: spikes left behind so far.
    `statistics`: by module, see `train/statistics.py`; on the steps of log.statistics.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_s: float
    model_tflops: float
    mfu: float | None
    memory_gb: float
    step_s: float
    data_s: float
    skipped: bool = False
    z_loss: float = 0.0
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    experts: dict[str, Any] | None = None
    mtp_loss: float | None = None
    loss_scale: float | None = None
    numerics: dict[str, Any] | None = None
    spike: str | None = None
    rewinds: int | None = None
    statistics: dict[str, Any] | None = None


class TrainerView(Protocol):
    """The part of the trainer that a callback may read. `facts`: see `header.py`."""

    config: Config
    model: Any
    mesh: Any
    data: Any
    run_dir: Path
    step: int
    start_step: int
    facts: dict[str, Any]

    def event(self, kind: str, **facts: Any) -> None:
        """Tell every callback about something rare."""


class Callback:
    """Base of all observers; every hook does nothing unless overridden.

    Called on rank 0 alone unless `every_rank`. Must not change weights, random state or data order.
    """

    every_rank = False

    def on_start(self, trainer: TrainerView) -> None:
        """Everything is built or resumed; `trainer.start_step` steps lie behind."""

    def on_step(self, trainer: TrainerView, metrics: StepMetrics) -> None:
        """After every step (also those between log.every), before that step's checkpoint is written."""

    def on_event(self, trainer: TrainerView, event: dict[str, Any]) -> None:
        """Something rare: `event["kind"]` is save, resume, skip, spike, rewind, ...; the rest is plain JSON."""

    def on_end(self, trainer: TrainerView) -> None:
        """Training is over, also by an interrupt; files must be complete after this."""


def logged(config: Config, metrics: StepMetrics) -> bool:
    """Whether this step gets a row and a line: every log.every steps, the last one, and whenever something happened."""
    due = metrics.step % config.log.every == 0 or metrics.step == config.train.steps
    return (
        due
        or metrics.skipped
        or metrics.val_loss is not None
        or metrics.spike is not None
        or metrics.statistics is not None
    )
