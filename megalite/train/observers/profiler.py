"""train.profile_step=n: one step under torch's profiler, as timeline.json (chrome://tracing or ui.perfetto.dev)."""

import os
from typing import Any

import torch

from megalite.train.callback import Callback, StepMetrics, TrainerView


class StepProfiler(Callback):
    """Records step `step` of rank 0: from the end of the step before it to its own end."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._profile: Any = None

    def on_start(self, trainer: TrainerView) -> None:
        self._start_before(trainer.start_step + 1)

    def on_step(self, trainer: TrainerView, metrics: StepMetrics) -> None:
        if self._profile is not None:
            profile, self._profile = self._profile, None
            profile.stop()
            target = trainer.run_dir / "timeline.json"
            temporary = target.with_name("timeline.part.json")
            profile.export_chrome_trace(str(temporary))
            os.replace(temporary, target)
        self._start_before(metrics.step + 1)

    def on_end(self, trainer: TrainerView) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _start_before(self, step: int) -> None:
        if step != self.step:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()
