"""The part of a run's report about narrow numbers: what they cost in each layer, over the steps that were measured."""

import html
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from megalite.report.run_folder import Row
from megalite.report.svg import Series, heat_map, line_chart

BLOCK = re.compile(r"(blocks|mtp)\.(\d+)\.")
FULL_DB = 60.0
"""Signal over noise that leaves a cell empty."""
FACTORS = ("input", "weight", "gradient")
PRODUCTS = ("output", "input_gradient", "weight_gradient")
Pick = tuple[Sequence[str], Sequence[str]]
"""(parts of a module's record, names in them)."""


def statistics_block(rows: Sequence[Row]) -> str:
    """A heat map of layers and steps for each kind of loss, the worst module of a layer in each cell; and the scales of
    whole tensors. "" where nothing was measured."""
    measured = [(row["step"], layers) for row in rows if (layers := _layers(row))]
    if not measured:
        return ""
    maps: list[tuple[str, Pick, Callable[[Sequence[float]], float], Callable[[float], float], str]] = [
        ("Signal over noise of products, dB (deep: little)", (PRODUCTS, ("sqnr_db",)), min, _little, "{:.1f} dB"),
        ("Share that becomes zero", ((*FACTORS, *PRODUCTS), ("underflow",)), max, _decades, "{:.2e}"),
        (
            "Share that is cut off or becomes inf",
            ((*FACTORS, *PRODUCTS), ("saturation", "overflow")),
            max, _decades, "{:.2e}",
        ),
    ]  # fmt: skip
    parts = [_map(measured, *chosen) for chosen in maps]
    return "".join(part for part in parts if part) + _scales(measured)


def _layers(row: Row) -> dict[str, list[Any]]:
    """Layer -> its modules' records; a row may hold anything."""
    statistics = row.get("statistics")
    found: dict[str, list[Any]] = {}
    for name, record in statistics.items() if isinstance(statistics, dict) else ():
        if isinstance(record, dict) and (block := BLOCK.match(str(name))):
            layer = f"layer {block[2]}" if block[1] == "blocks" else f"mtp {block[2]}"
            found.setdefault(layer, []).append(record)
    return found


def _values(records: Sequence[Any], pick: Pick) -> list[float]:
    parts = [record.get(part) for record in records for part in pick[0]]
    values = [part.get(name) for part in parts if isinstance(part, dict) for name in pick[1]]
    return [float(x) for x in values if isinstance(x, (int, float)) and math.isfinite(x)]


def _map(
    measured: Sequence[tuple[Any, dict[str, list[Any]]]], title: str, pick: Pick,
    worst: Callable[[Sequence[float]], float], depth: Callable[[float], float], words: str,
) -> str:  # fmt: skip
    names = list(dict.fromkeys(layer for _, layers in measured for layer in layers))
    cells = {name: [_values(layers.get(name, ()), pick) for _, layers in measured] for name in names}
    if not any(of for row in cells.values() for of in row):
        return ""
    rows = [(name, [worst(of) if of else math.nan for of in row]) for name, row in cells.items()]

    def text(place: int, value: float) -> str:
        return f"step {measured[place][0]}: {words.format(value) if math.isfinite(value) else 'none'}"

    return heat_map(title, rows, lambda value: depth(value) if math.isfinite(value) else 0.0, text)


def _little(decibel: float) -> float:
    return 1.0 - decibel / FULL_DB


def _decades(share: float) -> float:
    """0 for one in a million and less, 1 for all."""
    return 1.0 + math.log10(share) / 6 if share > 0 else 0.0


def _scales(measured: Sequence[tuple[Any, dict[str, list[Any]]]]) -> str:
    """The mean over modules of each kind's scale, where tensors have one."""
    curves = []
    for colour, kind in enumerate(FACTORS):
        found = [
            (step, _values([r for of in layers.values() for r in of], ((kind,), ("scale",))))
            for step, layers in measured
        ]
        points = [(float(step), math.exp(sum(map(math.log, of)) / len(of))) for step, of in found if of and min(of) > 0]
        curves.append(Series(kind, [x for x, _ in points], [y for _, y in points], colour, dots=True))
    title = "Scale of a tensor, geometric mean of the modules (logarithmic)"
    chart = line_chart(title, curves, log=True)
    keys = "".join(f'<i class="k{curve.colour}"></i>{curve.name}' for curve in curves)
    head = f'<h3><span class="key">{keys}</span>{html.escape(title)}</h3>'
    return f'<div class="card">{head}{chart}<div class="read"></div></div>' if chart else ""
