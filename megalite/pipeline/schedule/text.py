"""Schedules as CSV text, in the form of torch.distributed.pipelining: a line a rank, an op an entry (`2F0`).

Computation alone, or with sends and receives; an overlapped pair is `(0F3;1B2)OVERLAP_F_B`; empty entries are skipped.
"""

import re
from pathlib import Path

from megalite.errors import UserError
from megalite.pipeline.schedule.check import problems
from megalite.pipeline.schedule.ops import COMPUTE, OF_A_STAGE, Kind, Op, Schedule
from megalite.pipeline.schedule.simulate import units

ENTRY = re.compile(rf"(\d+)({'|'.join(sorted(Kind, key=len, reverse=True))})(\d*)")
PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)OVERLAP_F_B")


def write_csv(schedule: Schedule) -> str:
    """The text of a schedule; `read_csv` gives the same rows back."""
    lines = [",".join(_entry(unit) for unit in units(row)) for row in schedule.rows]
    return "\n".join(lines) + "\n"


def _entry(unit: tuple[Op, ...]) -> str:
    return str(unit[0]) if len(unit) == 1 else f"({unit[0]};{unit[1]})OVERLAP_F_B"


def load_csv(path: Path | str) -> Schedule:
    """The schedule in a file, checked. Raises UserError with a line for each problem."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write one, or take a schedule by name") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text; expects a line a rank, an op an entry, such as 0F0,0B0") from None
    return read_csv(text, str(path))


def read_csv(text: str, name: str) -> Schedule:
    """The schedule of a text, checked; `name` stands in the lines of a UserError. Sizes follow from the ops."""
    lines = [line for line in text.splitlines() if line.strip()]
    rows, wrong = [], []
    for number, line in enumerate(lines):
        row: list[Op] = []
        for place, entry in enumerate(line.split(",")):
            try:
                row += _ops(entry.strip())
            except ValueError as error:
                wrong.append(f"{name}: line {number + 1}, entry {place + 1}, {entry.strip()!r}: {error}")
        rows.append(tuple(row))
    if wrong:
        raise UserError(*wrong)
    schedule = _sized(rows, name)
    found = problems(schedule)
    if found:
        raise UserError(*(f"{name}: {line}" for line in found[:10]))
    return schedule


def _ops(entry: str) -> list[Op]:
    """The op of an entry, the two of an overlapped pair, none of an empty one."""
    if not entry:
        return []
    if pair := PAIR.fullmatch(entry):
        (first,), (second,) = _ops(pair[1].strip()), _ops(pair[2].strip())
        if first.kind != Kind.F or second.kind not in COMPUTE - {Kind.F}:
            raise ValueError("an overlapped pair is a forward and then a backward, such as (0F3;1B2)OVERLAP_F_B")
        return [Op(first.kind, first.stage, first.microbatch, overlaps_next=True), second]
    match = ENTRY.fullmatch(entry)
    if not match:
        raise ValueError("not an op; write stage, kind and microbatch, such as 2F0, 2I0, 2W0, 2B0 or 2SEND_F0")
    kind, microbatch = Kind(match[2]), int(match[3]) if match[3] else None
    if (microbatch is None) != (kind in OF_A_STAGE):
        raise ValueError(f"{kind} has {'no' if kind in OF_A_STAGE else 'a'} microbatch")
    return [Op(kind, int(match[1]), microbatch)]


def _sized(rows: list[tuple[Op, ...]], name: str) -> Schedule:
    """Ranks, stages and microbatches from the forwards in the rows. Raises UserError where they make no pipeline."""
    forwards = [(rank, op) for rank, row in enumerate(rows) for op in row if op.kind == Kind.F]
    if not forwards:
        raise UserError(f"{name}: has no forward; a line a rank, an op an entry, such as 0F0,0B0")
    holder: dict[int, int] = {}
    for rank, op in forwards:
        if holder.setdefault(op.stage, rank) != rank:
            raise UserError(f"{name}: stage {op.stage} is on ranks {holder[op.stage]} and {rank}; keep one")
    stages = max(holder) + 1
    missing = [str(stage) for stage in range(stages) if stage not in holder]
    if missing:
        raise UserError(f"{name}: no rank has a forward of stage {', '.join(missing)}; stages count from 0")
    chunks, rest = divmod(stages, len(rows))
    placement = tuple(holder[stage] for stage in range(stages))
    if rest or any(placement.count(rank) != chunks for rank in range(len(rows))):
        raise UserError(f"{name}: {stages} stages on {len(rows)} ranks; every rank needs as many stages as any other")
    microbatches = max(op.microbatch or 0 for _, op in forwards) + 1
    return Schedule(name, len(rows), chunks, microbatches, placement, tuple(rows))
