"""A schedule as a Gantt chart: a lane a rank, a box an op, in boxes and labels that SVG and PNG both draw.

Blue is forward, green a whole backward, teal an input gradient, yellow a weight gradient; the lighter, the later the
stage of the rank. Bubbles are what stays grey. An overlapped pair shares its time, one op above the other.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass

from megalite.pipeline.schedule.measure import Cost
from megalite.pipeline.schedule.ops import Kind, Schedule
from megalite.pipeline.schedule.simulate import Event

Colour = tuple[int, int, int]

COLOURS: dict[Kind, Colour] = {
    Kind.F: (66, 114, 178), Kind.B: (68, 148, 92), Kind.I: (58, 158, 160), Kind.W: (226, 176, 58),
    Kind.RECOMPUTE: (150, 110, 180),
}  # fmt: skip
NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}
IDLE, INK, PAPER, FAINT = (232, 234, 238), (30, 34, 42), (255, 255, 255), (120, 126, 138)
LEFT, RIGHT, TOP, LANE, GAP, FOOT = 64, 84, 64, 26, 6, 30
WIDTH = 1280


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    colour: Colour
    label: str = ""
    title: str = ""


@dataclass(frozen=True)
class Label:
    """`x`, `y`: the start (or the middle, or the end) of the text's base line. `small`: a tick, not a heading."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    small: bool = True


@dataclass(frozen=True)
class Picture:
    """Everything in units of a pixel, the origin at the upper left."""

    width: int
    height: int
    boxes: list[Box]
    labels: list[Label]


def paint(schedule: Schedule, events: Sequence[Event], cost: Cost) -> Picture:
    """The chart of a simulated run, 1280 pixels wide, with both bubbles and each rank's peak of activations."""
    scale = (WIDTH - LEFT - RIGHT) / cost.makespan
    boxes: list[Box] = []
    labels = [*_heading(schedule, cost), Label(WIDTH - RIGHT + 8, TOP - 8, "activations")]
    tops = [TOP + rank * (LANE + GAP) for rank in range(schedule.pp)]
    for rank, top in enumerate(tops):
        boxes.append(Box(LEFT, top, WIDTH - LEFT - RIGHT, LANE, IDLE))
        labels.append(Label(LEFT - 8, top + LANE / 2 + 4, f"rank {rank}", "end"))
        labels.append(Label(WIDTH - RIGHT + 8, top + LANE / 2 + 4, f"{cost.until_weights[rank]:g}"))
    below = False  # the second of an overlapped pair comes next
    for event in events:
        op = event.op
        if op.kind not in COLOURS:
            continue
        height = LANE / (2 if below or op.overlaps_next else 1)
        box = Box(
            x=LEFT + event.start * scale,
            y=tops[event.rank] + (height if below else 0),
            width=(event.end - event.start) * scale,
            height=height,
            colour=_shade(COLOURS[op.kind], schedule.stages_of(event.rank).index(op.stage), schedule.chunks),
            label=str(op.microbatch),
            title=f"{op}: stage {op.stage}, microbatch {op.microbatch}, {event.start:g} to {event.end:g}",
        )
        boxes.append(box)
        below = op.overlaps_next
    bottom = TOP + schedule.pp * (LANE + GAP)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if cost.makespan / step <= 25)
    ticks = range(0, int(cost.makespan) + 1, every)
    labels += [Label(LEFT + tick * scale, bottom + 14, str(tick), "middle") for tick in ticks]
    return Picture(WIDTH, bottom + FOOT, boxes + _legend(schedule), labels + _legend_names(schedule))


def _heading(schedule: Schedule, cost: Cost) -> list[Label]:
    chunks = f", {schedule.chunks} stages a rank" if schedule.chunks > 1 else ""
    bubble = f"bubble {cost.bubble_to_ideal:.1%} of ideal, {cost.bubble_to_makespan:.1%} of makespan"
    name = f"{schedule.name}: {schedule.pp} ranks{chunks}, {schedule.microbatches} microbatches"
    return [Label(LEFT, 22, f"{name}; {bubble}", small=False)]


def _kinds(schedule: Schedule) -> list[Kind]:
    used = {op.kind for row in schedule.rows for op in row}
    return [kind for kind in NAMES if kind in used]


def _legend(schedule: Schedule) -> list[Box]:
    return [Box(LEFT + 140 * place, 36, 12, 12, COLOURS[kind]) for place, kind in enumerate(_kinds(schedule))]


def _legend_names(schedule: Schedule) -> list[Label]:
    return [Label(LEFT + 140 * place + 18, 46, NAMES[kind]) for place, kind in enumerate(_kinds(schedule))]


def _shade(colour: Colour, chunk: int, chunks: int) -> Colour:
    """Towards white for later stages of the rank, by up to half of the way."""
    share = 0.5 * chunk / max(1, chunks - 1)
    red, green, blue = (round(part + (255 - part) * share) for part in colour)
    return red, green, blue


def ink_on(colour: Colour) -> Colour:
    """White or dark, whichever can be read on the colour (relative luminance, ITU-R BT.709)."""
    red, green, blue = colour
    return PAPER if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 140 else INK


def svg(picture: Picture) -> str:
    """The picture as a file of its own; each op shows its stage, microbatch and times under the pointer."""
    width, height = picture.width, picture.height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        '<g font-family="system-ui, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="{_hex(PAPER)}"/>',
    ]
    for box in picture.boxes:
        shape = f'<rect x="{box.x:.2f}" y="{box.y:g}" width="{max(box.width - 0.6, 0.4):.2f}" height="{box.height:g}"'
        title = f"<title>{html.escape(box.title)}</title>" if box.title else ""
        text = ""
        if fits(box):
            size = min(11, box.height - 2)
            text = (
                f'<text x="{box.x + box.width / 2:.2f}" y="{box.y + box.height / 2 + size * 0.36:.2f}"'
                f' font-size="{size:g}" text-anchor="middle" fill="{_hex(ink_on(box.colour))}">{box.label}</text>'
            )
        parts.append(f'<g>{title}{shape} fill="{_hex(box.colour)}"/>{text}</g>')
    for label in picture.labels:
        style = f'font-size="11" fill="{_hex(FAINT)}"' if label.small else f'font-size="15" fill="{_hex(INK)}"'
        text = html.escape(label.text)
        parts.append(f'<text x="{label.x:.2f}" y="{label.y:g}" text-anchor="{label.anchor}" {style}>{text}</text>')
    return "\n".join([*parts, "</g>", "</svg>", ""])


def fits(box: Box) -> bool:
    """Whether the label of a box has room in it."""
    return bool(box.label) and box.width >= 7 * len(box.label) + 2


def chrome_trace(schedule: Schedule, events: Sequence[Event]) -> str:
    """The run for chrome://tracing or Perfetto: a thread a rank; one unit of time is shown as a millisecond."""
    shown = [
        {
            "name": str(event.op), "cat": event.op.kind.name, "ph": "X", "pid": 0, "tid": event.rank,
            "ts": event.start * 1000, "dur": (event.end - event.start) * 1000,
            "args": {"stage": event.op.stage, "microbatch": event.op.microbatch},
        }
        for event in events
    ]  # fmt: skip
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(schedule.pp)
    ]
    return json.dumps({"traceEvents": [*names, *shown]})


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
