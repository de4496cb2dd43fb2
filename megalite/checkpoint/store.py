"""Checkpoint folders: complete or absent, never half. `step_00000100` appears by one rename after all is on disk.

A folder holds the tensors (`dcp.py`), `trainer.json` (counters, data position, what made it) and `manifest.json`, which
lists every file with its size and SHA-256 and is checked before anything is loaded.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalite.comm import Communicator
from megalite.disk import sync
from megalite.errors import RunError, UserError
from megalite.mesh import AXES
from megalite.parallel.boxes import Held
from megalite.progress import Progress

STEP_FOLDER = re.compile(r"step_(\d{8,})")
MANIFEST = "manifest.json"


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

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Held], trainer: dict[str, Any], spared: Path | None = None) -> Path:
        """Write step's checkpoint; when this returns it is complete on disk. An I/O failure leaves no folder behind.
        `spared`: stays, however many are newer."""
        final = self.path(step)
        part = self.folder / f"{final.name}.part"
        self.comm.on_rank_zero(lambda: self._start(part))
        from megalite.checkpoint import dcp  # a second of imports that a run's start need not wait for

        failure = ""
        try:
            dcp.save_tensors(part, tensors, self.comm.mesh.group(*AXES), show=self.comm.mesh.rank == 0)
        except OSError as error:
            failure = str(error.strerror)
        reports = self.comm.gather_json({"failure": failure, "files": {} if failure else self._digests(part)})
        self.comm.on_rank_zero(lambda: self._commit(part, final, trainer, reports, spared))
        return final

    def _digests(self, part: Path) -> dict[str, Any]:
        """Size and digest of this rank's share of the tensor files: hashing terabytes is shared out over the ranks."""
        names = sorted(path.name for path in part.iterdir())[self.comm.mesh.rank :: self.comm.mesh.world_size]
        return {name: describe_file(part / name) for name in names}

    def verify(self, checkpoint: Path) -> dict[str, Any]:
        """Check every file against the manifest, each rank its share; returns trainer.json. UserError on every rank."""
        trainer = self.comm.on_rank_zero(lambda: read_trainer(checkpoint))
        try:
            check_files(checkpoint, listed_files(checkpoint), self.comm.mesh.rank, self.comm.mesh.world_size)
            problem = ""
        except UserError as error:
            problem = str(error)
        problems = [found for found in self.comm.gather_json(problem) if found]
        if problems:
            failure = UserError(problems[0])
            failure.on_every_rank = True
            raise failure
        return dict(trainer)

    def set_aside_after(self, step: int) -> list[str]:
        """Rename the checkpoints newer than `step`: training goes back there, and they belong to another course."""

        def rename() -> list[str]:
            moved = []
            for path in complete_steps(self.folder):
                if int(path.name.removeprefix("step_")) > step:
                    target = path.with_name(f"{path.name}.abandoned")
                    shutil.rmtree(target, ignore_errors=True)
                    os.rename(path, target)
                    moved.append(target.name)
            if moved:
                sync(self.folder)
            return moved

        return list(self.comm.on_rank_zero(rename))

    def _start(self, part: Path) -> None:
        try:
            for leftover in self.folder.glob("*.part"):
                shutil.rmtree(leftover, ignore_errors=True)
            part.mkdir(parents=True)
        except OSError as error:
            raise RunError(
                f"{part}: cannot write the checkpoint ({error.strerror}); free space or change run.dir"
            ) from error

    def _commit(
        self, part: Path, final: Path, trainer: dict[str, Any], reports: list[dict[str, Any]], spared: Path | None
    ) -> None:
        files: dict[str, Any] = {}
        try:
            for report in reports:
                if report["failure"]:
                    raise OSError(0, report["failure"])
                files |= report["files"]
            write_json(part / "trainer.json", trainer)
            files["trainer.json"] = describe_file(part / "trainer.json")
            manifest = {"format": "megalite-checkpoint", "version": 1, "files": dict(sorted(files.items()))}
            write_json(part / MANIFEST, manifest)
            sync(part)
            if final.exists():
                discard(final)
            os.rename(part, final)
            sync(self.folder)
            self._prune(final, spared)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise RunError(f"{final}: checkpoint not saved ({error.strerror}); free space or change run.dir") from error

    def _prune(self, *spared: Path | None) -> None:
        """Drop all but the newest `keep` and those, the one just written among them."""
        for old in complete_steps(self.folder)[: -self.keep] if self.keep else []:
            if old not in spared:
                discard(old)


def discard(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a half-deleted one never looks complete."""
    doomed = folder.with_name(f"{folder.name}.old.part")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def complete_steps(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, oldest first. Only a finished save has such a name."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def describe_file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def listed_files(checkpoint: Path) -> dict[str, Any]:
    """The manifest's files. UserError when there is no readable manifest."""
    try:
        files: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())["files"]
        assert all({"bytes", "sha256"} <= entry.keys() for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{checkpoint}: not a complete checkpoint ({error}); use another one") from error
    return files


def check_files(checkpoint: Path, files: dict[str, Any], rank: int = 0, ranks: int = 1) -> None:
    """Compare sizes and digests of this rank's share of `files`; UserError names the first damaged one."""
    mine = sorted(files)[rank::ranks]
    with Progress(f"checking {checkpoint.name}", len(mine), "files", show=rank == 0) as bar:
        for name in mine:
            path = checkpoint / name
            if Path(name).name != name or path.is_symlink() or not path.is_file():
                raise UserError(
                    f"{path}: missing from the checkpoint; delete {checkpoint.name} to go on from an older one"
                )
            if describe_file(path) != {key: files[name][key] for key in ("bytes", "sha256")}:
                raise UserError(
                    f"{path}: damaged (digest differs); delete {checkpoint.name} to go on from an older one"
                )
            bar.advance()


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """The counters in trainer.json."""
    if "trainer.json" not in listed_files(checkpoint):
        raise UserError(f"{checkpoint}: not a complete checkpoint (trainer.json is not listed); use another one")
    check_files(checkpoint, {"trainer.json": listed_files(checkpoint)["trainer.json"]})
    trainer: dict[str, Any] = json.loads((checkpoint / "trainer.json").read_text())
    return trainer


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check every file against the manifest in this process and return trainer.json; UserError names a damaged file."""
    check_files(checkpoint, listed_files(checkpoint))
    return read_trainer(checkpoint)
