"""log.tensorboard=true: the numbers of metrics.jsonl as TensorBoard event files in <run>/tensorboard."""

import math
from typing import Any

from megalite.errors import UserError
from megalite.train.callback import Callback, StepMetrics, TrainerView, logged
from megalite.train.observers.files import metrics_row


class TensorBoardLog(Callback):
    """A scalar a number, over steps. Raises UserError at once when the package is missing."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "log.tensorboard: the package tensorboard is not installed; run `pip install tensorboard`"
                " or set log.tensorboard=false"
            ) from error
        self._writer_class: Any = SummaryWriter
        self._writer: Any = None

    def on_start(self, trainer: TrainerView) -> None:
        # steps after the resumed one are written again: purge_step hides the old ones
        purge = trainer.start_step + 1 if trainer.start_step else None
        self._writer = self._writer_class(log_dir=str(trainer.run_dir / "tensorboard"), purge_step=purge)

    def on_step(self, trainer: TrainerView, metrics: StepMetrics) -> None:
        if self._writer is None or not logged(trainer.config, metrics):
            return
        for name, value in metrics_row(metrics).items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(name, value, metrics.step)

    def on_end(self, trainer: TrainerView) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
