"""What a pipeline stage sent is let go of during the step: memory must not grow with the number of microbatches."""

from unittest.mock import patch

from megalite.pipeline.runtime import _Step
from megalite.pipeline.schedule import Op
from tests.parity.layouts import SAMPLES, Layout, Task, train
from tests.ranks import run_ranks


def most_held(layout: Layout) -> int:
    """The most sends and receives that this rank held on to at once."""
    held, execute = [], _Step.execute

    def counting(step: _Step, op: Op) -> None:
        execute(step, op)
        held.append(len(step.handles))

    with patch.object(_Step, "execute", counting):
        train(layout, Task(steps=1))
    return max(held)


def test_sends_are_held_for_microbatches_in_flight_alone() -> None:
    assert SAMPLES == 8
    assert max(run_ranks(2, most_held, Layout(pp=2))) <= 4
