"""What each layout communicates in a step, as text beside this file: a refactor that changes it shows up in a diff.

python -m tests.parity.test_traces --write
"""

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.parity.layouts import SCHEDULES, Layout, Task, trained

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
    **{f"pp_{name}": Layout(pp=2, chunks=chunks, schedule=name) for name, chunks in SCHEDULES},
    "dp_tp_pp": Layout(dp=2, tp=2, sp=True, pp=2, zero=1),
    "dp_cp_zero_1": Layout(dp=2, cp=2, zero=1),
    "tp_cp_pp": Layout(tp=2, sp=True, cp=2, pp=2),
    "hybrid_cp": Layout(cp=4, cp_kind="hybrid"),
}
EXPERTS = {
    "ep": Layout(dp=2, ep=2),
    "ep_all_gather": Layout(dp=2, ep=2, dispatcher="all_gather"),
    "ep_node": Layout(dp=4, ep=4, dispatcher="node", node_ranks=2),
    "ep_edp_zero_1": Layout(dp=4, ep=2, zero=1),
    "ep_etp_tp": Layout(dp=2, tp=2, sp=True, ep=2, etp=2),
    "ep_pp_zbv": Layout(dp=2, pp=2, chunks=2, schedule="zbv", ep=2),
}
CASES = (
    {name: (layout, Task(steps=2)) for name, layout in LAYOUTS.items()}
    | {name: (layout, Task("experts", steps=2)) for name, layout in EXPERTS.items()}
    | {
        f"fp8_{recipe}": (Layout(tp=2, cp=2), Task("untied", steps=2, fp8=recipe))
        for recipe in ("tensorwise", "delayed")
    }
)
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
