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
from typing import IO, Any

from megalite.config.load import config_yaml
from megalite.config.schema import Config
from megalite.errors import UserError

VERSIONS_OF = ("torch", "numpy", "hydra-core", "tokenizers", "triton", "deepspeed", "flash-attn", "wandb")


def run_path(config: Config) -> Path:
    return Path(config.run.dir) if config.run.dir else Path("runs") / config.run.name


def open_run_folder(config: Config) -> IO[str]:
    """Create the folder, check that it is writable and not in use, write config.yaml. Returns the held lock.

    UserError when another process trains in it, or when it holds a run and checkpoint.resume=none.
    """
    path = run_path(config)
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "w")  # noqa: SIM115 (held while the run lives)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if config.checkpoint.resume == "none" and (path / "metrics.jsonl").exists():
            raise UserError(f"run.dir: {path} already holds a run and checkpoint.resume=none; choose another run.name")
        write_text(path / "config.yaml", config_yaml(config))
    except BlockingIOError:
        raise UserError(f"run.dir: another process trains in {path}; choose another run.name or stop it") from None
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {path} ({error.strerror}); choose another run.dir") from error
    return lock


def check_free_space(path: Path, checkpoint_bytes: int) -> None:
    """UserError when not even one checkpoint fits on the disk."""
    free = shutil.disk_usage(path).free
    if free < checkpoint_bytes:
        raise UserError(
            f"run.dir: a checkpoint needs {checkpoint_bytes / 1e9:.3f} GB and {path} has {free / 1e9:.3f} GB free;"
            " free space or choose another run.dir"
        )


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


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


def write_environment(path: Path, facts: dict[str, Any], start_step: int) -> None:
    write_text(path / "environment.json", json.dumps(environment(facts, start_step), indent=1, default=str))
