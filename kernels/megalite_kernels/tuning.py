"""Tiles that were measured on a GPU, for who hands them to an op: `attention(…, tuned=Tuned.load(path, device))`.

Without, tiles are pure functions of chip, dtype and shape. gpu/tune.py measures; here they are kept, in a JSON file
with a key for each op, GPU, Triton's version, dtype and shape, whose sizes are rounded up to powers of two.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

OPTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "attention": (("M", "N", "num_warps", "num_stages"),) * 3,
    "grouped_gemm": (("BM", "BN", "BK", "num_warps", "num_stages"), ("BD", "BF", "BK", "num_warps", "num_stages")),
}
"""Op -> the options of each of its kernels: forward, backward by keys and by queries; rows, weights."""


def part(op: str, tiles: Sequence[int] | None, number: int) -> dict[str, Any] | None:
    """The options of an op's kernel among the values of all of them, one after another; None: to be chosen."""
    if tiles is None:
        return None
    before = sum(len(names) for names in OPTIONS[op][:number])
    names = OPTIONS[op][number]
    return dict(zip(names, tiles[before : before + len(names)], strict=True))


@dataclass(frozen=True)
class Tuned:
    """`machine`: GPU and Triton, as in the keys of the entries that are read; those of others are kept."""

    machine: str
    entries: dict[str, list[int]]

    def tiles(self, op: str, dtype: torch.dtype, sizes: Sequence[int]) -> list[int] | None:
        return self.entries.get(self.key(op, dtype, sizes))

    def with_tiles(self, op: str, dtype: torch.dtype, sizes: Sequence[int], tiles: list[int]) -> "Tuned":
        return replace(self, entries=self.entries | {self.key(op, dtype, sizes): tiles})

    def key(self, op: str, dtype: torch.dtype, sizes: Sequence[int]) -> str:
        bucket = " ".join(str(1 << max(0, size - 1).bit_length()) for size in sizes)
        return f"{op} | {self.machine} | {str(dtype).removeprefix('torch.')} | {bucket}"

    @staticmethod
    def load(path: Path, device: torch.device) -> "Tuned":
        """What a file says of the GPU at `device`; nothing where there is no file yet. Raises ValueError."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        machine = f"{name}, Triton {version('triton')}"
        try:
            entries = json.loads(path.read_text())
            wrong = _wrong(entries)
        except FileNotFoundError:
            return Tuned(machine, {})
        except (OSError, ValueError) as error:
            wrong = " ".join(str(error).split())
        if wrong:
            raise ValueError(f"{path}: no record of tuned tiles ({wrong}); delete it or name another file")
        return Tuned(machine, entries)

    def save(self, path: Path) -> None:
        lines = (f"{json.dumps(key)}: {json.dumps(tiles)}" for key, tiles in sorted(self.entries.items()))
        beside = path.with_name(path.name + ".new")
        beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        beside.replace(path)


def _wrong(entries: Any) -> str | None:
    """What is wrong with what a file holds; None: nothing."""
    if not isinstance(entries, dict):
        return "it holds no object"
    for key, tiles in entries.items():
        op = key.split(" | ")[0]
        if op not in OPTIONS:
            return f"{op!r} is no op that is tuned"
        count = sum(map(len, OPTIONS[op]))
        if not isinstance(tiles, list) or len(tiles) != count or not all(type(x) is int and x > 0 for x in tiles):
            return f"{op} has {count} whole numbers above 0, not {tiles}"
    return None
