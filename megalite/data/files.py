"""Files and folders that are complete or absent: temporary names, fsync, rename, and a lock between processes.

A process that is killed leaves at most temporary names behind; the next one that takes the same lock removes them.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megalite.disk import sync
from megalite.errors import UserError

TEMPORARY = ".tmp-"


@contextmanager
def writing(path: Path, key: str) -> Iterator[None]:
    """Turn an operating system's refusal to write (read-only, full disk) into one line that names `key` and `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{key}: cannot write {error.filename or path} ({reason}); choose another folder or free space"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` (made if missing) alone among all processes of the host; stale temporary names in it are removed.

    The lock dies with its process, so whatever carries a temporary name once the lock is held belongs to nobody.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for stale in folder.glob(TEMPORARY + "*"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        yield


def cached_folder(folder: Path, key: str, build: Callable[[Path], None]) -> Path:
    """`folder`, filled once by `build(temporary folder)`, then renamed into place. Other processes wait."""
    if folder.is_dir():
        return folder
    with writing(folder, key), locked(folder.parent):
        if not folder.is_dir():
            temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
            try:
                build(temporary)
                for path in temporary.iterdir():
                    sync(path)
                sync(temporary)
                os.rename(temporary, folder)
                sync(folder.parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    return folder


def load_array(path: Path) -> np.ndarray:
    """A .npy file of a cache, memory-mapped; never unpickles. Raises UserError when it is damaged."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise UserError(f"data.cache: {path} cannot be read ({error}); remove its folder") from error
