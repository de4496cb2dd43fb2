"""Rules of mixture-of-experts layers: one line for each violation, with what to set instead."""

from typing import Any

import pytest

from megalite.config.experts import RULES
from megalite.config.rules import Job
from megalite.config.validate import violations
from tests.unit.test_config_rules import changed

EIGHT = {"model__moe__experts": 8}
CASES: list[tuple[dict[str, Any], int | None, list[str]]] = [
    ({"parallel__ep": 2}, 2, ["parallel.ep=2", "the model has none", "model.moe.experts"]),
    ({"parallel__etp": 2}, 2, ["parallel.etp=2", "the model has none"]),
    (
        EIGHT | {"parallel__ep": 3, "train__global_batch": 12},
        3,
        ["parallel.ep=3", "model.moe.experts 8", "nearest: 1, 2, 4"],
    ),
    (
        EIGHT | {"parallel__etp": 3, "train__global_batch": 12},
        3,
        ["parallel.etp=3", "1024 inner values", "nearest: 1, 2, 4"],
    ),
    (EIGHT | {"parallel__ep": 4}, 2, ["parallel.ep=4", "does not divide the 2 ranks of a stage", "nearest: 1, 2"]),
    (EIGHT | {"parallel__ep": 2, "parallel__etp": 2}, 2, ["parallel.ep=2", "ep 2 x etp 2", "nearest: 1"]),
    (EIGHT | {"model__moe__groups": 3}, None, ["model.moe.groups=3", "nearest: 1, 2, 4"]),
    (EIGHT | {"model__moe__top_groups": 2}, None, ["model.moe.top_groups=2", "there are 1 groups"]),
    (EIGHT | {"model__moe__top_k": 9}, None, ["model.moe.top_k=9", "among 8 experts"]),
    (
        EIGHT | {"model__moe__groups": 4, "model__moe__top_groups": 1, "model__moe__top_k": 3},
        None,
        ["model.moe.top_k=3", "among 2 experts"],
    ),
    (EIGHT | {"model__moe__groups": 2, "model__moe__router": "sinkhorn"}, None, ["model.moe.groups=2", "softmax or"]),
    (EIGHT | {"model__moe__dense_layers": 8}, None, ["model.moe.dense_layers=8", "no layer of 8"]),
    (EIGHT | {"model__moe__shared_gate": True}, None, ["model.moe.shared_gate=true", "model.moe.shared_ffn"]),
    (EIGHT | {"model__moe__top_k": 1}, None, ["model.moe.normalize=true", "learns nothing", "set false"]),
    (
        EIGHT | {"model__moe__router": "expert_choice", "log__sample": "def"},
        None,
        ["log.sample", "cannot generate", "set null"],
    ),
    (EIGHT | {"model__moe__capacity": 0.0}, None, ["model.moe.capacity=0.0", "null takes all"]),
    (EIGHT | {"model__moe__pad": True}, None, ["model.moe.pad=true", "model.moe.capacity"]),
    (EIGHT | {"model__moe__drop": "position"}, None, ["model.moe.drop=position", "model.moe.capacity"]),
    (EIGHT | {"model__moe__aux_scope": "global"}, None, ["model.moe.aux_scope=global", "model.moe.aux_loss"]),
    (
        EIGHT | {"model__moe__router": "expert_choice", "model__moe__normalize": False},
        None,
        ["model.moe.normalize=false", "leave it out"],
    ),
    (EIGHT | {"model__moe__jitter": 1.0}, None, ["model.moe.jitter=1.0", "below 1"]),
    (EIGHT | {"model__moe__router": "sinkhorn", "model__moe__bias_rate": 0.1}, None, ["model.moe.bias_rate=0.1"]),
    (EIGHT | {"model__moe__router": "expert_choice", "model__moe__aux_loss": 0.1}, None, ["model.moe.aux_loss=0.1"]),
    (
        EIGHT | {"parallel__tp": 2, "train__micro_batch": 1, "data__sequence_length": 511},
        2,
        ["parallel.tp=2", "511 tokens", "routers", "nearest: 1"],
    ),
    ({"parallel__node_ranks": 2}, None, ["parallel.node_ranks=2", "set 0"]),
    (
        EIGHT | {"parallel__dispatcher": "node", "parallel__ep": 2},
        2,
        ["parallel.node_ranks=0", "2 ranks of ep x etp", "legal: 1, 2"],
    ),
    (EIGHT | {"parallel__engine": "deepspeed", "parallel__zero": 1}, None, ["parallel.engine=deepspeed", "megalite"]),
    (EIGHT | {"parallel__zero": 3, "parallel__shard_ranks": 2}, 2, ["parallel.shard_ranks=2", "set 0"]),
    (
        EIGHT | {"parallel__ep": 2, "train__deterministic": "layout"},
        2,
        ["train.deterministic=layout", "parallel.ep", "set true"],
    ),
]


@pytest.mark.parametrize(("values", "world", "parts"), CASES)
def test_one_violation_one_line(values: dict[str, Any], world: int | None, parts: list[str]) -> None:
    (line,) = violations(changed(**values), world)
    assert all(part in line for part in parts), line
    assert "\n" not in line


def test_every_rule_can_fail() -> None:
    covered = {
        rule.__name__ for values, world, _ in CASES for _, rule in RULES if list(rule(Job(changed(**values), world)))
    }
    assert covered == {rule.__name__ for _, rule in RULES}


def test_what_is_named_is_legal() -> None:
    for values in ({"parallel__ep": 2}, {"parallel__etp": 2}, {"parallel__tp": 2}, {"parallel__cp": 2}):
        assert violations(changed(**EIGHT, **values), 2) == []
