"""report.html: one self-contained page about one run, made from the run folder alone (also of a run still going)."""

import html
import json
import statistics
import time
from pathlib import Path
from typing import Any

from megalite.disk import replace_text
from megalite.progress import duration, quantity
from megalite.report.experts import experts_block
from megalite.report.page import page, section, table, tiles
from megalite.report.run_folder import Row, RunFolder, number, read_run
from megalite.report.statistics import statistics_block
from megalite.report.svg import Series, bar_chart, line_chart, smoothed

MAX_EVENTS = 300
SMOOTH_FROM = 60
"""Curves with at least this many points get a smoothed line over the raw one."""


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html (atomically) and return its path. Raises UserError when it is no run folder."""
    run = read_run(Path(run_dir))
    target = run.path / "report.html"
    replace_text(target, render(run))
    return target


def summary(run_dir: Path) -> list[str]:
    """The same result in a few plain lines for a terminal: last losses, then bits per byte beside the baselines."""
    run = read_run(Path(run_dir))
    lines = [f"{label:<39}{value}" for value, label in _headlines(run)]
    rows, notes = _compression(run)
    if len(rows) > 1:
        lines += ["bits per byte of the validation text:", *(f"  {label:<26}{bits:.4f}" for label, bits, _ in rows)]
        lines += [f"  {note}" for note in notes]
    return lines


def render(run: RunFolder) -> str:
    """The whole page as text."""
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    curves = "".join(_card(*chart) for chart in _charts(run.metrics))
    body = [
        f"<h1>{html.escape(run.name)}</h1>",
        f'<p class="lead">{html.escape(_lead(run))}</p>',
        tiles(_headlines(run)),
        section("Validation bits per byte", _baseline_block(run)),
        f'<h2>Curves</h2><div class="grid2">{curves}</div>' if curves else "",
        section("Experts", experts_block(run.metrics)),
        section("Numbers", statistics_block(run.metrics)),
        section(
            "Sampled text", f'<div class="scroll"><pre>{html.escape(run.sample)}</pre></div>' if run.sample else ""
        ),
        section("The run", table(_facts(run.environment))),
        section("Events", _events(run.events)),
        section("Configuration", _details("config.yaml", run.config_text)),
        f"<footer>{html.escape(f'Written by megalite on {now} from {run.path}')}</footer>",
    ]
    return page(f"{run.name}: megalite run", "\n".join(part for part in body if part))


def _lead(run: RunFolder) -> str:
    facts = run.facts
    parts = [str(facts.get("model", "")), _count(facts.get("parameters"), "parameters"), str(facts.get("layout", ""))]
    parts += [str(facts.get("precision", "")), str(facts.get("device", ""))]
    return ", ".join(part for part in parts if part)


def _count(value: Any, unit: str) -> str:
    return quantity(value, unit) if isinstance(value, (int, float)) and value else ""


def _headlines(run: RunFolder) -> list[tuple[str, str]]:
    """(value, label) of the numbers a reader looks for first."""
    if not run.metrics:
        return []
    last = run.metrics[-1]
    items: list[tuple[str, str]] = []

    def add(value: float | None, pattern: str, label: str) -> None:
        if value is not None:
            items.append((pattern.format(value), label))

    add(_latest(run.metrics, "loss"), "{:.4f}", "training loss")
    add(_latest(run.metrics, "val_loss"), "{:.4f}", "validation loss")
    add(_latest(run.metrics, "val_bits_per_byte"), "{:.4f}", "validation bits/byte")
    items.append((f"{last['step']:,}", "steps"))
    skipped = sum(row.get("skipped") is True for row in run.metrics)
    items.append((f"{skipped:,}" if skipped else "", "steps skipped (not finite)"))
    add(_latest(run.metrics, "rewinds"), "{:.0f}", "spikes left behind (rewinds)")
    items.append((_count(last.get("tokens"), ""), "tokens"))
    add(_median(run.metrics, "tokens_per_s"), "{:,.0f}", "tokens/s (median)")
    add(_median(run.metrics, "mfu"), "{:.1%}", "MFU (median)")
    foreseen = number(run.facts, "predicted_memory_gb")
    predicted = f" ({foreseen:.2f} predicted)" if foreseen else ""
    add(max(_curve(run.metrics, "memory_gb")[1], default=None), "{:.2f} GB", f"peak memory a rank{predicted}")
    seconds = sum(number(row, "step_s") or 0.0 for row in run.metrics)
    logged_share = len(run.metrics) / max(run.metrics[-1]["step"], 1)
    if seconds and logged_share > 0:
        items.append((duration(seconds / min(logged_share, 1.0)), "time in steps"))
    return [item for item in items if item[0]]


def _latest(rows: list[Row], name: str) -> float | None:
    return next((value for row in reversed(rows) if (value := number(row, name)) is not None), None)


def _median(rows: list[Row], name: str) -> float | None:
    values = [value for row in rows[1:] or rows if (value := number(row, name)) is not None]
    return statistics.median(values) if values else None


def _curve(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], value) for row in rows if (value := number(row, name)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _charts(rows: list[Row]) -> list[tuple[str, list[Series], bool]]:
    """(title, curves, logarithmic y) in the order shown."""
    loss = _smooth_pair("training loss", *_curve(rows, "loss"), 0)
    validation = Series("validation loss", *_curve(rows, "val_loss"), colour=1, dots=True)
    norm_x, norm_y = _curve(rows, "grad_norm")
    spiky = bool(norm_y) and min(norm_y) > 0 and max(norm_y) / min(norm_y) > 20
    return [
        ("Loss (nats a token)", [*loss, validation], False),
        ("Gradient norm before clipping", _smooth_pair("gradient norm", norm_x, norm_y, 3), spiky),
        ("Learning rate", [Series("learning rate", *_curve(rows, "lr"), colour=2)], False),
        ("Tokens per second", _smooth_pair("tokens/s", *_curve(rows, "tokens_per_s"), 0), False),
    ]


def _smooth_pair(name: str, x: list[float], y: list[float], colour: int) -> list[Series]:
    if len(x) < SMOOTH_FROM:
        return [Series(name, x, y, colour)]
    return [
        Series(name, x, y, colour, faint=True),
        Series(f"{name} (smoothed)", x, smoothed(y, max(len(x) // 40, 5)), colour),
    ]


def _card(title: str, curves: list[Series], log: bool) -> str:
    chart = line_chart(title, curves, log=log)
    if not chart:
        return ""
    shown = [curve for curve in curves if curve.x and not curve.faint]
    keys = "".join(f'<i class="k{curve.colour}"></i>{html.escape(curve.name)}' for curve in shown)
    key = f'<span class="key">{keys}</span>' if len(shown) > 1 else ""
    scale = " (logarithmic)" if log else ""
    return f'<div class="card"><h3>{key}{html.escape(title)}{scale}</h3>{chart}<div class="read"></div></div>'


def _compression(run: RunFolder) -> tuple[list[tuple[str, float, bool]], list[str]]:
    """(what, bits per byte, is it this run), best first; and what must be known to compare them.

    Baselines are of one whole validation set, so this model stands beside them only with an evaluation of just that.
    """
    measured = run.baselines
    order = measured.get("order", 5)
    labels = (("kneser_ney", f"Kneser-Ney {order}-gram (bytes)"), ("gzip", "gzip -9"))
    rows = [(label, bits, False) for name, label in labels if (bits := number(measured, name)) is not None]
    if not rows:
        latest = _latest(run.metrics, "val_bits_per_byte")
        return ([] if latest is None else [("this model", latest, True)]), ["Lower is better."]
    name, size = measured.get("validation"), number(measured, "validation_bytes")
    notes = [
        f"Of the whole of '{name}', {quantity(size, 'B')} of text; lower is better." if size else "Lower is better."
    ]
    whole = _whole_evaluation(run)
    if whole is None:
        notes.append(
            f"This model is not among them: no evaluation read all of '{name}'; train.final_eval=true does, at the end."
        )
    else:
        step, bits = whole
        rows.append(("this model" if step == run.metrics[-1]["step"] else f"this model at step {step}", bits, True))
    counted, given = number(measured, "train_bytes"), number(measured, "train_bytes_whole")
    if counted and given and counted < given:
        sizes = f"{quantity(counted, 'B')} of {quantity(given, 'B')}"
        notes.append(f"The {order}-gram counted the first {sizes} of training text.")
    return sorted(rows, key=lambda row: row[1]), notes


def _whole_evaluation(run: RunFolder) -> tuple[int, float] | None:
    """(step, bits per byte) of the latest evaluation that read all of the set that the baselines were measured on."""
    tokens = number(run.baselines, "validation_tokens")
    if tokens is None:
        return None
    wanted = {"kind": "evaluation", "name": run.baselines.get("validation"), "tokens": tokens}
    whole = [(event.get("step"), event.get("bits_per_byte")) for event in run.events if wanted.items() <= event.items()]
    found = ((row["step"], number(row, "val_bits_per_byte")) for row in reversed(run.metrics))
    return next(((step, bits) for step, bits in found if bits is not None and (step, bits) in whole), None)


def _baseline_block(run: RunFolder) -> str:
    rows, notes = _compression(run)
    if not rows:
        return ""
    return (
        bar_chart("Validation bits per byte", rows, "bits/byte") + f'<p class="note">{html.escape(" ".join(notes))}</p>'
    )


def _facts(environment: Row) -> list[tuple[str, str]]:
    """environment.json as rows: nested names joined by a dot, one row per line of a list."""
    rows: list[tuple[str, str]] = []
    for name, value in environment.items():
        if isinstance(value, dict):
            prefix = "" if name == "facts" else f"{name}."
            rows += [(f"{prefix}{inner}", text) for inner, text in _facts(value)]
        elif isinstance(value, list):
            rows += [(name if place == 0 else "", _plain(item)) for place, item in enumerate(value)]
        else:
            rows.append((name, _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _events(events: list[Row]) -> str:
    if not events:
        return ""
    rows = []
    for event in events[-MAX_EVENTS:]:
        seconds = number(event, "time")
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds and 0 <= seconds < 1e11 else ""
        rest = {name: value for name, value in event.items() if name not in ("time", "step", "kind")}
        details = ", ".join(f"{name}: {_plain(value)}" for name, value in rest.items())
        cells = (when, _plain(event.get("step")), _plain(event.get("kind")), details)
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>time</th><th>step</th><th>what</th><th>details</th></tr>"
    left_out = f"<p>The last {MAX_EVENTS} of {len(events)}.</p>" if len(events) > MAX_EVENTS else ""
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>{left_out}'


def _details(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>" if text else ""
