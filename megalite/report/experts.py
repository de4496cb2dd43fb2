"""The part of a run's report about its experts: how evenly they were used, by layer and over time."""

import html
import math
from collections.abc import Sequence
from typing import Any

from megalite.report.run_folder import Row
from megalite.report.svg import Series, heat_map, line_chart


def experts_block(rows: Sequence[Row]) -> str:
    """Curves of imbalance, dropped slots and entropy, then each expert's load in the last step; "" without experts."""
    routed = [(row["step"], layers) for row in rows if (layers := _layers(row))]
    if not routed:
        return ""
    steps = [float(step) for step, _ in routed]
    worst = [max(layer["imbalance"] for layer in layers.values()) for _, layers in routed]
    dropped = [max(layer["dropped"] for layer in layers.values()) for _, layers in routed]
    entropy = [_mean([layer["entropy"] for layer in layers.values()]) for _, layers in routed]
    charts = [
        ("Largest load over the mean, worst layer", [Series("imbalance", steps, worst)]),
        ("Entropy of the router's scores, mean of layers (1: even)", [Series("entropy", steps, entropy, colour=2)]),
    ]
    if any(dropped):
        charts.append(("Share of slots dropped, worst layer", [Series("dropped", steps, dropped, colour=3)]))
    cards = "".join(
        f'<div class="card"><h3>{html.escape(title)}</h3>{line_chart(title, curves)}<div class="read"></div></div>'
        for title, curves in charts
    )
    step, layers = routed[-1]
    even = [(f"layer {name}", [x * len(layer["load"]) for x in layer["load"]]) for name, layer in layers.items()]
    title = f"Load of each expert in step {step} (1: even)"
    # Twice the even share is full.
    load = heat_map(title, even, lambda times: times / 2, lambda expert, times: f"expert {expert}: {times:.2f}")
    return f'<div class="grid2">{cards}</div>{load}'


def _layers(row: Row) -> dict[str, Any]:
    """The whole layers of a row, which may hold anything."""
    experts = row.get("experts")
    layers = experts.get("layers") if isinstance(experts, dict) else None
    return {str(name): layer for name, layer in layers.items() if _whole(layer)} if isinstance(layers, dict) else {}


def _whole(layer: Any) -> bool:
    if not isinstance(layer, dict) or not isinstance(layer.get("load"), list) or not layer["load"]:
        return False
    values = [*layer["load"], *(layer.get(name) for name in ("imbalance", "dropped", "entropy"))]
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
