"""Rules of what watches a run's numbers: each can fail, and what it recommends is legal."""

from typing import Any

import pytest

from megalite.config.rules import Job
from megalite.config.validate import violations
from megalite.config.watch import RULES
from tests.unit.test_config_rules import changed, one_violation

NUMERICS = {"debug__numerics": True}
STATISTICS = {"log__statistics": 50}
DEEPSPEED = {"parallel__engine": "deepspeed", "parallel__zero": 1}
MEGALITE = {"parallel__engine": "megalite"}
LIMIT, EVERY = "train__spike_rewinds", "checkpoint__every"
REWINDS = {LIMIT: 2, EVERY: 50}
CASES: list[tuple[dict[str, Any], list[str], list[dict[str, Any]]]] = [
    (
        {**NUMERICS, "train__compile": True},
        ["debug.numerics=true: not with train.compile"],
        [{"train__compile": False}],
    ),
    (
        {**NUMERICS, **DEEPSPEED},
        ["debug.numerics=true: not built for parallel.engine=deepspeed"],
        [{"debug__numerics": False}, MEGALITE],
    ),
    (
        {**STATISTICS, "train__compile": True},
        ["log.statistics=50: not with train.compile"],
        [{"train__compile": False}, {"log__statistics": 0}],
    ),
    (
        {**STATISTICS, "precision__fp8": "nvfp4"},
        ["log.statistics=50: not built for precision.fp8=nvfp4"],
        [{"log__statistics": 0}, {"precision__fp8": "mxfp8"}],
    ),
    (
        {**STATISTICS, **DEEPSPEED},
        ["log.statistics=50: not built for parallel.engine=deepspeed"],
        [{"log__statistics": 0}, MEGALITE],
    ),
    ({**REWINDS, EVERY: 0}, ["train.spike_rewinds=2: needs checkpoints"], [{EVERY: 100}, {LIMIT: 0}]),
    ({**REWINDS, **DEEPSPEED}, ["train.spike_rewinds=2: not built for parallel.engine"], [{LIMIT: 0}, MEGALITE]),
]


@pytest.mark.parametrize(("values", "parts", "remedies"), CASES, ids=["-".join(case[1][:1]) for case in CASES])
def test_one_violation_one_line_and_its_remedies(
    values: dict[str, Any], parts: list[str], remedies: list[dict[str, Any]]
) -> None:
    one_violation(values, parts, remedies)


def test_products_in_pieces_are_not_measured() -> None:
    values = {**STATISTICS, "parallel__tp": 2, "parallel__sp": True, "parallel__overlap": True}
    (line,) = violations(changed(**values), 2)
    assert "log.statistics=50: not with parallel.overlap" in line
    assert violations(changed(**(values | {"parallel__overlap": False})), 2) == []


def test_every_rule_can_fail() -> None:
    failing = {rule.__name__ for values, *_ in CASES for _, rule in RULES if list(rule(Job(changed(**values), 1)))}
    assert failing == {rule.__name__ for _, rule in RULES}
