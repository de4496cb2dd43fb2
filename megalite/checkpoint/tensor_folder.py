"""A folder of safetensors files, as Hugging Face lays them out: one file, or shards and an index. Lazy and suspicious.

Reading never follows a name out of the folder and never unpickles; writing makes the whole folder appear at once.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalite.disk import sync
from megalite.errors import RunError, UserError
from megalite.progress import Progress

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Default size above which a folder is split, as in Hugging Face's own folders."""


class TensorFolder(Mapping[str, Tensor]):
    """Tensors by name, read from disk (CPU, stored dtype) when asked for. Raises UserError for a malformed folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_map(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.files.values())):
            with _opened(file) as tensors:
                held = set(tensors.keys())
                for name in (name for name, place in self.files.items() if place == file):
                    if name not in held:
                        raise UserError(
                            f"{file}: has no tensor {name}, which {INDEX} places there; fetch the folder again"
                        )
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self.files[name]) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; UserError when it is missing or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the folder of a whole model") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON; fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; fetch the file again")
    return value


def safe_file(folder: Path, name: object) -> Path:
    """`folder/name` if that is a plain file that lies in the folder (or in the blobs of a Hugging Face cache)."""
    path = folder / str(name)
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0") or path.name != name:
        raise UserError(f"{folder}: names the file {str(name)!r:.80}, which is no plain file name; refused")
    root = folder.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise UserError(f"{path}: is a link out of its folder; refused. Copy the file into the folder")
    if not path.is_file():
        raise UserError(f"{path}: no such file; fetch the folder again")
    return path


def write_tensors(folder: Path, sizes: Mapping[str, int], tensor: Callable[[str], Tensor], shard_bytes: int) -> None:
    """Write tensors into `folder` (made by the caller), at most `shard_bytes` a file; one file's tensors in memory.

    `sizes` gives each tensor's size in bytes, in the order to write; `tensor` makes it when its file's turn comes.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    total = len(shards)
    files = [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    with Progress("writing tensors", sum(sizes.values()), "B") as bar:
        for file, names in zip(files, shards, strict=True):
            made: dict[str, Tensor] = {}
            for name in names:
                made[name] = tensor(name).contiguous()
                bar.advance(sizes[name])
            try:
                save_file(made, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise RunError(
                    f"{folder / file}: cannot be written ({error}); free space or choose another output"
                ) from None
    if total > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` by one rename when the block ends, and vanishes when it fails."""
    path = path.absolute()
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f"{path}: exists already; choose another output or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    part.mkdir()
    try:
        yield part
        for file in [*part.iterdir(), part]:
            sync(file)
        os.replace(part, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _weight_map(folder: Path) -> dict[str, Path]:
    """Where each tensor lies."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a model")
    if (folder / INDEX).exists():
        entries = read_json(safe_file(folder, INDEX)).get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise UserError(f"{folder / INDEX}: has no weight_map; fetch the file again")
        places = {str(file): safe_file(folder, file) for file in entries.values()}
        return {name: places[file] for name, file in entries.items()}
    if not (folder / SINGLE).exists():
        pickled = any(folder.glob("*.bin"))
        hint = "its .bin files are pickles, which can run code; convert them to safetensors" if pickled else "fetch it"
        raise UserError(f"{folder}: holds no {SINGLE} or {INDEX}; {hint}")
    file = safe_file(folder, SINGLE)
    with _opened(file) as tensors:
        return dict.fromkeys(tensors.keys(), file)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not a whole safetensors file ({' '.join(str(error).split())}); fetch it again"
        ) from None
