"""Line charts and bars as inline SVG text. Colours are CSS classes (s0, s1, ...) that the page defines, light and dark.

A chart carries its points in a `data-chart` attribute for the page's hover script, and a <title> for readers without.
"""

import html
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 28
MAX_POINTS = 700


@dataclass(frozen=True)
class Series:
    """One curve; x ascending, y finite. `faint`: the raw values behind a smoothed curve. `dots`: mark each point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    dots: bool = False


def line_chart(title: str, series: Sequence[Series], x_label: str = "step", log: bool = False) -> str:
    """An <svg> with axes, grid and hover data; an empty string when there is nothing to draw."""
    curves = [_thinned(curve) for curve in series if len(curve.x)]
    values = [value for curve in curves for value in curve.y]
    if not values:
        return ""
    log = log and min(values) > 0
    low_x, high_x = _span([place for curve in curves for place in curve.x])
    low, high = _span([math.log10(value) for value in values] if log else values, margin=0.04)

    def across(value: float) -> float:
        return LEFT + (value - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        value = math.log10(value) if log else value
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f"<title>{html.escape(title)}</title>", _text(LEFT - 8, HEIGHT - 10, x_label, "end")]
    for tick in log_ticks(low, high) if log else ticks(low, high):
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, short(tick), "end"))
    parts += [_text(across(tick), HEIGHT - 10, short(tick), "middle") for tick in ticks(low_x, high_x)]
    for curve in curves:
        points = [(across(x), up(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        css = f"curve s{curve.colour}" + (" faint" if curve.faint else "")
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class="{css}" d="{path}"/>')
        if curve.dots or len(points) == 1:
            parts += [f'<circle class="dot s{curve.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
    hover = [
        {"name": curve.name, "colour": curve.colour, "x": list(curve.x), "y": list(curve.y),
         "px": [round(across(x), 1) for x in curve.x], "py": [round(up(y), 1) for y in curve.y]}
        for curve in curves if not curve.faint
    ]  # fmt: skip
    data = html.escape(json.dumps(hover, separators=(",", ":")))
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-chart="{data}">{"".join(parts)}</svg>'


def bar_chart(title: str, rows: Sequence[tuple[str, float, bool]], unit: str) -> str:
    """Horizontal bars from zero: (label, value, is it ours); the value stands at the bar's end."""
    if not rows:
        return ""
    height, label_width = 34 * len(rows) + 4, 200
    longest = max(value for _, value, _ in rows) or 1.0
    parts = [f"<title>{html.escape(title)}</title>"]
    for place, (label, value, ours) in enumerate(rows):
        y, length = 34 * place + 6, max(value / longest * (WIDTH - label_width - 130), 1.0)
        colour = "s0" if ours else "other"
        weight = "bold" if ours else ""
        parts += [
            _text(0, y + 16, label, "start", f"label {weight}"),
            f'<rect class="bar {colour}" x="{label_width}" y="{y}" width="{length:.1f}" height="22" rx="3"/>',
            _text(label_width + length + 8, y + 16, f"{value:.4f} {unit}", "start", f"label {weight}"),
        ]
    return f'<svg class="bars" viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def heat_map(
    title: str, rows: Sequence[tuple[str, Sequence[float]]], depth: Callable[[float], float],
    words: Callable[[int, float], str],
) -> str:  # fmt: skip
    """A row of cells for each (label, values), as deep as `depth` says, from 0 to 1; `words`: of a cell's place in its
    row and its value."""
    label_width, cell_height = 80, max(6, min(22, 600 // len(rows)))
    parts = [f"<title>{html.escape(title)}</title>", _text(0, 14, title, "start", "label bold")]
    for place, (label, values) in enumerate(rows):
        width, y = (WIDTH - label_width) / len(values), 22 + place * cell_height
        if cell_height >= 12:
            parts.append(_text(0, y + cell_height - 5, label, "start"))
        for number, value in enumerate(values):
            parts.append(
                f'<rect class="bar s0" x="{label_width + number * width:.1f}" y="{y}" width="{width:.2f}"'
                f' height="{cell_height - 1}" fill-opacity="{min(max(depth(value), 0), 1):.2f}">'
                f"<title>{html.escape(label)}, {html.escape(words(number, value))}</title></rect>"
            )
    height = 26 + cell_height * len(rows)
    return f'<svg class="bars" viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Mean over a window of about `span` values around each; narrower towards the ends, so that it never lags."""
    sums = list(itertools.accumulate(values, initial=0.0))
    result = []
    for place in range(len(values)):
        reach = min(span // 2, place, len(values) - 1 - place)
        result.append((sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1))
    return result


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values inside [low, high], about `wanted` of them."""
    raw = (high - low) / wanted
    scale = 10.0 ** math.floor(math.log10(raw))
    step = scale * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * scale >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in the range (given as log10), with 2 and 5 between them when there are few."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 3 else (1, 2, 5) if high - low > 0.7 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)
    every = math.ceil(len(decades) / 8)
    marks = [factor * 10.0**power for power in decades[::every] for factor in factors]
    return [mark for mark in marks if low <= math.log10(mark) <= high]


def short(value: float) -> str:
    """A tick label: 1500 is 1.5k, 0.0003 is 3e-4."""
    if value == 0:
        return "0"
    for suffix, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale * 0.99999:
            return f"{value / scale:.4g}{suffix}"
    if abs(value) >= 1e-3:
        return f"{value:.4g}"
    mantissa, power = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


def _text(x: float, y: float, text: str, anchor: str, css: str = "tick") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _span(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(high), 1e-30):
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    return low - margin * (high - low), high + margin * (high - low)


def _thinned(curve: Series) -> Series:
    """At most MAX_POINTS points: of each bucket the lowest and the highest stay, so that spikes stay visible."""
    if len(curve.x) <= MAX_POINTS:
        return curve
    size = math.ceil(len(curve.x) / (MAX_POINTS // 2))
    kept: list[int] = []
    for start in range(0, len(curve.x), size):
        bucket = range(start, min(start + size, len(curve.x)))
        ends = {min(bucket, key=curve.y.__getitem__), max(bucket, key=curve.y.__getitem__)}
        kept += sorted(ends | ({bucket[-1]} if bucket[-1] == len(curve.x) - 1 else set()))
    x, y = [curve.x[place] for place in kept], [curve.y[place] for place in kept]
    return Series(curve.name, x, y, curve.colour, curve.faint, curve.dots)
