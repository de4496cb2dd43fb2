"""Rules of the precision policy: each can fail, and what it recommends is legal."""

from typing import Any

import pytest

from megalite.config.precision import RULES
from megalite.config.rules import Job
from tests.unit.test_config_rules import changed, one_violation

FP16, PURE, BF16 = ({"precision__name": name} for name in ("fp16", "bf16_pure", "bf16"))
DELAYED = {"precision__fp8": "delayed"}
SCALE = "precision__loss_scale"
CASES: list[tuple[dict[str, Any], list[str], list[dict[str, Any]]]] = [
    ({**FP16, SCALE: 1000.0}, ["precision.loss_scale=1000", "nearest: 1024"], [{SCALE: 1024.0}]),
    ({**FP16, SCALE: 2.0**33}, ["a power of two up to 2^32"], [{SCALE: 2.0**32}]),
    ({"precision__loss_scale_window": 5}, ["precision.loss_scale_window=5: has no effect"], [FP16]),
    ({**PURE, "parallel__zero": 3}, ["parallel.zero=3: not built"], [{"parallel__zero": 2}, BF16]),
    (
        {"precision__states": "int8", "parallel__engine": "deepspeed", "parallel__zero": 1},
        ["precision.states=int8: parallel.engine=deepspeed has its own"],
        [{"precision__states": "auto"}, {"parallel__engine": "megalite"}],
    ),
    ({"precision__fp8_history": 4}, ["precision.fp8_history=4: has no effect"], [DELAYED]),
    ({"precision__fp8_backward": "e4m3"}, ["precision.fp8_backward=e4m3: has no effect"], [DELAYED]),
    (
        {"precision__fp8": "nvfp4", "precision__fp8_backward": "e5m2"},
        ["precision.fp8_backward=e5m2: precision.fp8=nvfp4"],
        [{"precision__fp8_backward": "auto"}],
    ),
    ({"precision__fp8_skip": [0, 1]}, ["precision.fp8_skip=[0, 1]: has no effect"], [DELAYED]),
    (
        {**DELAYED, "precision__fp8_skip": [1]},
        ["precision.fp8_skip=[1]: expects two"],
        [{"precision__fp8_skip": [1, 0]}],
    ),
    (
        {**DELAYED, "precision__fp8_skip": [7, 1]},
        ["precision.fp8_skip=[7, 1]", "leaves none of 8 layers", "at most 7"],
        [{"precision__fp8_skip": [7, 0]}],
    ),
    (
        {
            **DELAYED,
            "model__mlp_bias": True,
            "model__moe__experts": 4,
            "model__moe__pad": True,
            "model__moe__capacity": 1.5,
        },
        ["model.moe.pad=true: with precision.fp8=delayed and model.mlp_bias"],
        [{"model__moe__pad": False}, {"model__mlp_bias": False}, {"precision__fp8": "none"}],
    ),
    ({"precision__fp8_dispatch": True}, ["precision.fp8_dispatch=true: has no effect"], [{"model__moe__experts": 4}]),
    ({**DELAYED, "train__compile": True}, ["train.compile=true: not built"], [{"train__compile": False}]),
    (
        {**DELAYED, "parallel__engine": "deepspeed", "parallel__zero": 1},
        ["precision.fp8=delayed: parallel.engine=deepspeed has none"],
        [{"precision__fp8": "none"}, {"parallel__engine": "megalite"}],
    ),
    (
        {**FP16, "parallel__engine": "deepspeed", "parallel__zero": 1},
        ["precision=fp16: parallel.engine=deepspeed has none"],
        [BF16, {"parallel__engine": "megalite"}],
    ),
]


@pytest.mark.parametrize(("values", "parts", "remedies"), CASES, ids=["-".join(case[1][:1]) for case in CASES])
def test_one_violation_one_line_and_its_remedies(
    values: dict[str, Any], parts: list[str], remedies: list[dict[str, Any]]
) -> None:
    one_violation(values, parts, remedies)


def test_every_rule_can_fail() -> None:
    failing = {rule.__name__ for values, *_ in CASES for _, rule in RULES if list(rule(Job(changed(**values), 1)))}
    assert failing == {rule.__name__ for _, rule in RULES}
