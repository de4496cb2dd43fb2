"""What was measured: rows, as a table, CSV and JSON, and the comparison with a run that was saved before."""

import csv
import dataclasses
import datetime
import io
import itertools
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.errors import UserError
from megalite.progress import quantity

UNITS = {"flops": ("TFLOP/s", 1e12), "bytes": ("GB/s", 1e9)}


@dataclass
class Row:
    """Seconds, FLOP/s or bytes/s, bytes. None: not measured, for the reason in `status`."""

    op: str
    shape: str
    sizes: str
    sequence_length: int
    batch: int
    mode: str
    implementation: str
    status: str
    flops: float
    bytes: float
    of: str
    median: float | None = None
    low: float | None = None
    high: float | None = None
    calls: int | None = None
    rate: float | None = None
    of_peak: float | None = None
    memory: int | None = None
    error: float | None = None
    """The largest error of an output or gradient, as a share of what is allowed."""

    @property
    def case(self) -> tuple[Any, ...]:
        return self.op, self.shape, self.sizes, self.sequence_length, self.batch, self.mode

    @property
    def place(self) -> tuple[Any, ...]:
        return *self.case, self.implementation

    def ours(self) -> bool:
        return self.implementation.startswith("megalite")

    def __str__(self) -> str:
        return f"{self.op} seq={self.sequence_length} {self.mode}, {self.implementation}"


@dataclass
class Report:
    """`machine`: what a row can be compared within. `made`: versions, date, git revision, the peaks measured."""

    machine: dict[str, Any]
    made: dict[str, Any]
    rows: list[Row]


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"device": name, **threads, "dtype": str(dtype).removeprefix("torch.")}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def made_by(versions: dict[str, str | None]) -> dict[str, Any]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "revision": revision(), "versions": {**found, **versions}}


def revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def lines(report: Report, first_peer: str | None) -> list[str]:
    """What was measured, against what, and an aligned table of the rows."""
    row, peaks, how = report.rows[0], report.made["peaks"], report.machine
    threads = f", {how['threads']} thread" + "s" * (how["threads"] > 1) if "threads" in how else ""
    memory = "outputs and what is kept for backward" if threads else "what a call allocates at its peak"
    return [
        f"{row.op}, {row.shape}: {row.sizes}; {how['dtype']} on {how['device']}{threads}",
        f"at best, measured now: {peaks['flops'] / 1e12:.3g} TFLOP/s (product), {peaks['bytes'] / 1e9:.3g} GB/s (copy)",
        f"every call from a flushed cache, in turns with the others; memory: {memory}",
        "",
        *table(report.rows, first_peer),
    ]


def table(rows: Sequence[Row], first_peer: str | None) -> list[str]:
    """A line a row, aligned; the last column is the first peer's time over the row's, at the same place."""
    unit, scale = UNITS[rows[0].of]
    heads = ("seq", "batch", "mode", "implementation", "median", "20 % … 80 %", "calls", unit, "of peak", "memory")
    cells = [[*heads, f"vs {first_peer}" if first_peer else ""]]
    peer = {row.case: row.median for row in rows if row.implementation == first_peer}
    for row in rows:
        cells.append([str(row.sequence_length), str(row.batch), row.mode, row.implementation])
        if row.median is None or row.low is None or row.high is None or row.rate is None or row.of_peak is None:
            continue
        spread, memory = f"{duration(row.low)} … {duration(row.high)}", quantity(row.memory or 0, "B")
        cells[-1] += [duration(row.median), spread, str(row.calls), f"{row.rate / scale:.3g}", f"{row.of_peak:.0%}"]
        cells[-1] += [memory, _ratio(peer.get(row.case), row.median)]
    widths = [max(len(cell) for cell in column) for column in itertools.zip_longest(*cells, fillvalue="")]
    reasons = ["", *("" if row.median is not None else row.status for row in rows)]
    return [
        "  ".join([*map(_padded, range(len(line)), line, widths), reason]).rstrip()
        for line, reason in zip(cells, reasons, strict=True)
    ]


def _padded(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column in (2, 3) else cell.rjust(width)


def _ratio(theirs: float | None, ours: float) -> str:
    return "" if theirs is None else f"{theirs / ours:.2f}x"


def duration(seconds: float) -> str:
    """Three digits: 12.3 µs, 4.56 ms, 1.23 s."""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("µs", 1e-6))
    value = seconds / scale
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 2)}f} {unit}"


def as_csv(report: Report) -> str:
    """A line a row; what holds for all of them is repeated, so that files can be joined."""
    common = {**report.machine, **{key: report.made.get(key) for key in ("date", "revision")}}
    common["torch"] = report.made["versions"]["torch"]
    lines = [{**dataclasses.asdict(row), **common} for row in report.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_json(report: Report) -> str:
    return json.dumps(dataclasses.asdict(report), indent=1) + "\n"


def load(path: Path, key: str) -> Report:
    """A report as `as_json` wrote it. Raises UserError that names `key`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Report(values["machine"], values["made"], [Row(**row) for row in values["rows"]])
    except FileNotFoundError:
        raise UserError(f"{key}={path}: no such file; save one with json={path}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key}={path}: is no saved benchmark ({type(error).__name__}: {error})") from None


def comparable(old: Report, here: dict[str, Any], planned: Iterable[Row], key: str) -> None:
    """Raises UserError unless `old` was measured on this kind of machine and has one of the rows to come."""
    if old.machine != here:
        then, now = (" ".join(f"{name}={value}" for name, value in each.items()) for each in (old.machine, here))
        raise UserError(f"{key}: was measured with {then}, this is {now}; compare runs of one kind of machine")
    if not {row.place for row in old.rows if row.ours()} & {row.place for row in planned}:
        raise UserError(f"{key}: has none of these lines; save one with json=FILE")


def regressions(new: Iterable[Row], old: Iterable[Row], tolerance: float) -> tuple[list[str], int]:
    """(lines on those of megalite's rows that take more than 1 + `tolerance` times as long, rows compared)."""
    before = {row.place: row.median for row in old if row.median is not None}
    slower, compared = [], 0
    for row in filter(Row.ours, new):
        was = before.get(row.place)
        if was is None or row.median is None:
            continue
        compared += 1
        if row.median > was * (1 + tolerance):
            times = f"{duration(row.median)}, was {duration(was)}"
            slower.append(f"{row}: {times} ({row.median / was:.2f}x, allowed {1 + tolerance:.2f}x)")
    return slower, compared


def unmeasured(rows: Iterable[Row]) -> list[str]:
    """Lines on megalite's own that are wrong or failed."""
    return [f"{row}: {row.status}" for row in rows if row.ours() and row.median is None]
