"""Checkpoint folders: complete or absent, never half. `step_00000100` appears by one rename after all is on disk.

A folder holds the tensors (`dcp.py`), `trainer.json` (counters, data position, what made it) and `manifest.json`, which
lists every file with its size and SHA-256 and is checked before anything is loaded.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint import dcp
from megalite.comm import Communicator
from megalite.errors import RunError, UserError
from megalite.mesh import AXES

STEP_FOLDER = re.compile(r"step_(\d{8,})")
MANIFEST = "manifest.json"


def sync_folder(path: Path) -> None:
    """Make renames inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write and sync; the caller's folder is renamed into place later."""
    with open(path, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointStore:
    """The checkpoints of one run. Methods are called by every rank together; rank 0 touches folders."""

    def __init__(self, folder: Path, comm: Communicator, keep: int) -> None:
        self.folder, self.comm, self.keep = folder, comm, keep

    def save(self, step: int, tensors: dict[str, torch.Tensor], trainer: dict[str, Any]) -> Path:
        """Write step's checkpoint; when this returns it is complete on disk. An I/O failure leaves no folder behind."""
        final = self.folder / f"step_{step:08d}"
        part = self.folder / f"{final.name}.part"
        self.comm.on_rank_zero(lambda: self._start(part))
        failure = ""
        try:
            dcp.save_tensors(part, tensors, self.comm.mesh.group(*AXES))
        except OSError as error:
            failure = str(error.strerror)
        self.comm.on_rank_zero(lambda: self._commit(part, final, trainer, failure))
        return final

    def _start(self, part: Path) -> None:
        try:
            for leftover in self.folder.glob("*.part"):
                shutil.rmtree(leftover, ignore_errors=True)
            part.mkdir(parents=True)
        except OSError as error:
            raise RunError(
                f"{part}: cannot write the checkpoint ({error.strerror}); free space or change run.dir"
            ) from error

    def _commit(self, part: Path, final: Path, trainer: dict[str, Any], failure: str) -> None:
        try:
            if failure:
                raise OSError(0, failure)
            write_json(part / "trainer.json", trainer)
            files = {f.name: {"bytes": f.stat().st_size, "sha256": digest(f)} for f in sorted(part.iterdir())}
            write_json(part / MANIFEST, {"format": "megalite-checkpoint", "version": 1, "files": files})
            sync_folder(part)
            if final.exists():
                shutil.rmtree(final)
            os.rename(part, final)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise RunError(f"{final}: checkpoint not saved ({error.strerror}); free space or change run.dir") from error
        self._prune()

    def _prune(self) -> None:
        """Drop all but the newest `keep`; each is renamed first, so that a half-deleted one never looks complete."""
        for old in complete_steps(self.folder)[: -self.keep] if self.keep else []:
            doomed = old.with_name(old.name + ".part")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(old, doomed)
            shutil.rmtree(doomed)


def complete_steps(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, oldest first. Only a finished save has such a name."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file against the manifest and return `trainer.json`; UserError names the first damaged file."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name, entry in listed.items():
            path = checkpoint / name
            if Path(name).name != name or path.is_symlink() or not path.is_file():
                raise UserError(
                    f"{path}: missing from the checkpoint; delete {checkpoint.name} to go on from an older one"
                )
            if path.stat().st_size != entry["bytes"] or digest(path) != entry["sha256"]:
                raise UserError(
                    f"{path}: damaged (digest differs); delete {checkpoint.name} to go on from an older one"
                )
        trainer: dict[str, Any] = json.loads((checkpoint / "trainer.json").read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint}: not a complete checkpoint ({error}); use another one") from error
    return trainer
