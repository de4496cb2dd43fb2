"""metrics.jsonl and events.jsonl: one JSON object a line, flushed line by line, never a half line after a restart."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from megalite.report.run_folder import parse_row
from megalite.train.callback import Callback, StepMetrics, TrainerView, logged


def to_json(record: dict[str, Any]) -> str:
    """One line of strict JSON: floats by repr (every bit kept); NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(record), allow_nan=False, default=str)


def metrics_row(metrics: StepMetrics) -> dict[str, Any]:
    """The step's fields without those that were not measured."""
    return {name: value for name, value in dataclasses.asdict(metrics).items() if value is not None}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reopen(path: Path, keep: Callable[[dict[str, Any]], bool]) -> IO[str]:
    """Open a .jsonl file for appending after dropping torn lines and those that `keep` refuses (atomically)."""
    if path.exists():
        old = path.read_text(encoding="utf-8", errors="replace")
        new = "".join(line + "\n" for line in old.split("\n") if (row := parse_row(line)) is not None and keep(row))
        if new != old:
            temporary = path.with_name(path.name + ".tmp")
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(new)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    return open(path, "a", encoding="utf-8")


class MetricsFile(Callback):
    """metrics.jsonl. After a resume the rows beyond the resumed step are dropped, so that the file reads as if the run
    had never stopped: step, tokens, loss, grad_norm and lr are then the same characters, only timings differ."""

    file: IO[str] | None = None

    def on_start(self, trainer: TrainerView) -> None:
        self.file = reopen(trainer.run_dir / "metrics.jsonl", lambda row: row.get("step", 0) <= trainer.start_step)

    def on_step(self, trainer: TrainerView, metrics: StepMetrics) -> None:
        if self.file is not None and logged(trainer.config, metrics):
            self.file.write(to_json(metrics_row(metrics)) + "\n")
            self.file.flush()

    def on_event(self, trainer: TrainerView, event: dict[str, Any]) -> None:
        """Rows up to a checkpoint must survive a power cut that the checkpoint survives. Those of a course that a
        rewind leaves are dropped, as after a resume."""
        if self.file is not None and event.get("kind") == "save":
            os.fsync(self.file.fileno())
        if self.file is not None and event.get("kind") == "rewind":
            self.file.close()
            self.file = reopen(trainer.run_dir / "metrics.jsonl", lambda row: row.get("step", 0) <= event["step"])

    def on_end(self, trainer: TrainerView) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


class EventsFile(Callback):
    """events.jsonl: saves, restarts, skipped steps, warnings, each with the step and the Unix time.

    Opened anew for each of these rare lines, so that what observers report at their end is kept too.
    """

    started = False

    def on_start(self, trainer: TrainerView) -> None:
        reopen(trainer.run_dir / "events.jsonl", lambda row: True).close()
        self.started = True
        self.on_event(trainer, {"kind": "start", "step": trainer.start_step})

    def on_event(self, trainer: TrainerView, event: dict[str, Any]) -> None:
        if self.started:
            with open(trainer.run_dir / "events.jsonl", "a", encoding="utf-8") as file:
                file.write(to_json({"time": round(time.time(), 3), "step": trainer.step} | event) + "\n")

    def on_end(self, trainer: TrainerView) -> None:
        self.on_event(trainer, {"kind": "end"})
