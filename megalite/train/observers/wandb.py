"""log.wandb=offline|online: the same numbers for Weights & Biases, kept under <run>/wandb.

Never prompts, never needs the network, and only rank 0 makes a run. Without a key, or when the service does not answer,
online becomes offline and says so; `wandb sync` uploads such a run later.
"""

import dataclasses
import netrc
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from megalite.errors import UserError
from megalite.train.callback import Callback, StepMetrics, TrainerView, logged
from megalite.train.observers.files import metrics_row


class WandbLog(Callback):
    """`mode`: offline or online. Raises UserError at once when the package is missing."""

    def __init__(self, mode: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "log.wandb: the package wandb is not installed; run `pip install wandb` or set log.wandb=disabled"
            ) from error
        self._wandb: Any = wandb
        self._run: Any = None
        self.mode = mode
        self.notice = ""
        if mode == "online" and not has_key():
            self.mode, self.notice = (
                "offline",
                "wandb: no API key found, so this run is kept offline (wandb sync uploads)",
            )

    def on_start(self, trainer: TrainerView) -> None:
        try:
            self._run = self._begin(trainer)
        except self._wandb.errors.Error as error:
            if self.mode == "offline":
                raise
            self.mode = "offline"
            self.notice = f"wandb: the service did not answer ({type(error).__name__}), so this run is kept offline"
            self._run = self._begin(trainer)
        if self.notice:
            trainer.event("warning", message=self.notice)

    def on_step(self, trainer: TrainerView, metrics: StepMetrics) -> None:
        if self._run is not None and logged(trainer.config, metrics):
            row = metrics_row(metrics)
            self._run.log(row, step=row.pop("step"))

    def on_end(self, trainer: TrainerView) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _begin(self, trainer: TrainerView) -> Any:
        settings = self._wandb.Settings(
            mode=self.mode,
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            init_timeout=20,
        )
        return self._wandb.init(
            project="megalite",
            name=trainer.config.run.name,
            id=_run_id(trainer.run_dir),
            resume="allow" if self.mode == "online" else None,
            dir=str(trainer.run_dir),
            config=dataclasses.asdict(trainer.config) | {"facts": trainer.facts},
            settings=settings,
        )


def has_key() -> bool:
    """Whether wandb would find an API key without asking: in its environment variable or the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path) -> str:
    """The same id after every restart, so that one run stays one curve."""
    path = run_dir / "wandb" / "run_id.txt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
