"""The line a person watches: one live line on a terminal, one plain line a logged step elsewhere, on stdout."""

import sys
import time
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megalite.progress import duration, quantity
from megalite.train.callback import Callback, StepMetrics, TrainerView, logged
from megalite.train.header import header

REFRESH_SECONDS = 0.2
BAR_CELLS = 20


class ProgressLine(Callback):
    """log.progress: `auto` is `bar` on a terminal and `lines` when piped; `none` prints nothing at all."""

    def __init__(self, mode: str = "auto", stream: IO[str] | None = None) -> None:
        self.console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        self.mode = ("bar" if terminal else "lines") if mode == "auto" else mode
        self._live: Live | None = None
        self._drawn = self._began = 0.0

    def on_start(self, trainer: TrainerView) -> None:
        self._began = 0.0
        self._say(header(trainer.facts))
        if self.mode == "bar":
            self._live = Live(console=self.console, auto_refresh=False, transient=False)
            self._live.start()

    def on_step(self, trainer: TrainerView, metrics: StepMetrics) -> None:
        if self.mode == "none":
            return
        steps = trainer.config.train.steps
        eta = self._seconds_left(trainer, metrics)
        if self._live is None:
            if logged(trainer.config, metrics):
                self._say(plain_line(metrics, steps, eta))
            return
        if metrics.val_loss is not None:
            self._say(validation_text(metrics))
        now = time.monotonic()
        if now - self._drawn >= REFRESH_SECONDS or metrics.step == steps:
            self._drawn = now
            self._live.update(live_text(metrics, steps, eta, self.console.width), refresh=True)

    def on_event(self, trainer: TrainerView, event: dict[str, Any]) -> None:
        if event.get("kind") in ("skip", "spike", "rewind", "warning", "interrupt"):
            details = ", ".join(f"{name}={value}" for name, value in event.items() if name not in ("kind", "message"))
            self._say(f"{event['kind']}: {event.get('message') or details}")
        elif event.get("kind") == "resume" and event.get("changed"):
            self._say(f"resumed with other values: {', '.join(event['changed'])}")

    def on_end(self, trainer: TrainerView) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _seconds_left(self, trainer: TrainerView, metrics: StepMetrics) -> float:
        """From the mean step of this process so far, so that evaluations and saves count in."""
        now = time.monotonic()
        self._began = self._began or now - metrics.step_s
        done = metrics.step - trainer.start_step
        return (now - self._began) / max(done, 1) * (trainer.config.train.steps - metrics.step)

    def _say(self, text: str) -> None:
        if self.mode != "none" and text:
            self.console.print(text, markup=False)


def fields(metrics: StepMetrics, eta: float) -> list[str]:
    """What a line says after the step, the most wanted first."""
    mfu = [] if metrics.mfu is None else [f"MFU {metrics.mfu:.1%}"]
    return [
        f"loss {metrics.loss:.4f}",
        f"{quantity(metrics.tokens_per_s)} tok/s",
        f"ETA {duration(eta)}",
        f"{metrics.model_tflops:.3g} TFLOP/s",
        *mfu,
        f"mem {metrics.memory_gb:.2f} GB",
        f"grad {metrics.grad_norm:.3f}",
        f"lr {metrics.lr:.2e}",
    ]


def plain_line(metrics: StepMetrics, steps: int, eta: float) -> str:
    """`step 12/100 (12%)  loss 5.1234  2.4k tok/s ...`, whatever the width."""
    skipped = "  SKIPPED (not finite)" if metrics.skipped else "  SPIKE" if metrics.spike else ""
    validation = "  " + validation_text(metrics) if metrics.val_loss is not None else ""
    line = "  ".join([f"step {metrics.step}/{steps} ({metrics.step / steps:.0%})", *fields(metrics, eta)])
    return line + skipped + validation


def validation_text(metrics: StepMetrics) -> str:
    bits = "" if metrics.val_bits_per_byte is None else f" = {metrics.val_bits_per_byte:.4f} bits/byte"
    return f"validation loss {metrics.val_loss:.4f}{bits}"


def live_text(metrics: StepMetrics, steps: int, eta: float, width: int) -> Text:
    """As many fields as the terminal is wide, behind a bar; never more than one line."""
    share = min(metrics.step / steps, 1.0)
    full = int(share * BAR_CELLS)
    text = Text(no_wrap=True, overflow="ellipsis")
    if width >= 100:
        text.append("━" * full, style="green").append("━" * (BAR_CELLS - full), style="bright_black").append(" ")
    text.append(f"{metrics.step}/{steps} ({share:.0%})", style="bold")
    for field in fields(metrics, eta):
        if text.cell_len + len(field) + 2 > width:
            break
        text.append("  ").append(field)
    return text
