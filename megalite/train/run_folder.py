"""The run folder: made and locked once by rank 0; holds everything a run leaves behind."""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from megalite.config.load import config_yaml
from megalite.config.schema import Config
from megalite.disk import replace_text
from megalite.errors import UserError

VERSIONS_OF = ("torch", "numpy", "hydra-core", "tokenizers", "triton", "deepspeed", "flash-attn", "wandb")


def run_path(config: Config) -> Path:
    return Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"run.dir: cannot write to {path} ({error.strerror}); free space or choose another run.dir")


class RunFolder:
    """The folder of a run, held by rank 0: made if new, checked to be writable, locked while this object lives.

    UserError when another process trains in it, or when it holds a run and checkpoint.resume=none (but a job that its
    launcher starts again, `attempt` > 0, goes on with what it made itself).
    """

    def __init__(self, config: Config, attempt: int) -> None:
        self.path = run_path(config)
        self.is_new = not self.path.exists()
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "w")  # noqa: SIM115 (held while the run lives)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run.dir: another process trains in {self.path}; choose another run.name or stop it"
            ) from None
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if config.checkpoint.resume == "none" and attempt == 0 and (self.path / "metrics.jsonl").exists():
            raise UserError(
                f"run.dir: {self.path} already holds a run and checkpoint.resume=none; choose another run.name"
            )

    def abandon(self) -> None:
        """The start failed: a folder that did not exist before is removed again."""
        self._lock.close()
        if self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)

    def record(self, config: Config, facts: dict[str, Any], start_step: int) -> None:
        """Write what is about to run: config.yaml and environment.json."""
        content = environment(facts, start_step)
        try:
            replace_text(self.path / "config.yaml", config_yaml(config))
            replace_text(self.path / "environment.json", json.dumps(content, indent=1, default=str))
        except OSError as error:
            self.abandon()
            raise cannot_write(self.path, error) from error


def check_free_space(path: Path, checkpoint_bytes: int) -> None:
    """UserError when not even one checkpoint fits on the disk."""
    free = shutil.disk_usage(path).free
    if free < checkpoint_bytes:
        raise UserError(
            f"run.dir: a checkpoint needs {checkpoint_bytes / 1e9:.3f} GB and {path} has {free / 1e9:.3f} GB free;"
            " free space or choose another run.dir"
        )


def environment(facts: dict[str, Any], start_step: int) -> dict[str, Any]:
    """What environment.json holds: facts of this run, versions, host. Never the values of environment variables."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "facts": facts,
        "versions": versions,
        "git_revision": git_revision(),
        "host": {"machine": platform.machine(), "system": platform.platform(), "cores": os.cpu_count()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "start_step": start_step,
    }


def git_revision() -> str | None:
    """Commit of the checkout that megalite runs from; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
