"""What each layout communicates in a step, as text beside this file: a refactor that changes it shows up in a diff.

python -m tests.parity.test_traces --write
"""

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.parity.layouts import Layout, Task, trained

TRACES = Path(__file__).parent / "traces"
LAYOUTS = {
    "dp": Layout(dp=2),
    "dp_zero_1": Layout(dp=2, zero=1),
    "dp_zero_2": Layout(dp=2, zero=2),
    "dp_zero_3": Layout(dp=2, zero=3),
    "tp": Layout(tp=2),
    "tp_sp": Layout(tp=2, sp=True),
    "tp_sp_overlap": Layout(tp=2, sp=True, overlap=True),
    "cp_ring": Layout(cp=2),
    "cp_ulysses": Layout(cp=2, cp_kind="ulysses"),
    "pp_1f1b": Layout(pp=2),
    "pp_zbv": Layout(pp=2, chunks=2, schedule="zbv"),
    "dp_tp_pp": Layout(dp=2, tp=2, sp=True, pp=2, zero=1),
    "hybrid_cp": Layout(cp=4, cp_kind="hybrid"),
}
CASES = {name: (layout, Task(steps=2)) for name, layout in LAYOUTS.items()} | {
    f"fp8_{recipe}": (Layout(tp=2, cp=2), Task("untied", steps=2, fp8=recipe)) for recipe in ("tensorwise", "delayed")
}
HEAD = "rank  times  phase     op              axes         bytes  dtype"


def trace(layout: Layout, task: Task) -> str:
    """Calls of one step on the first and the last rank: how often, in which phase, what, over which axes, how large."""
    ranks = trained(layout, task)
    lines = [f"# {layout}{'' if task.fp8 == 'none' else f', fp8 {task.fp8}'}, the second step", HEAD]
    for rank in (0, layout.world - 1):
        counted = Counter((c.phase, c.op, "×".join(c.axes), c.bytes, c.dtype) for c in ranks[rank]["calls"])
        lines += [
            f"{rank:<5} {times:<6} {phase:<9} {op:<15} {axes:<12} {size:<6} {dtype}"
            for (phase, op, axes, size, dtype), times in sorted(counted.items())
        ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_communicates_as_written_down(name: str) -> None:
    assert trace(*CASES[name]) == (TRACES / f"{name}.txt").read_text(), "python -m tests.parity.test_traces --write"


if __name__ == "__main__" and "--write" in sys.argv[1:]:
    TRACES.mkdir(exist_ok=True)
    for name, case in CASES.items():
        (TRACES / f"{name}.txt").write_text(trace(*case))
