"""Rules across keys: all violations at once, each with legal values, and what a valid configuration promises."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import rope
from megalite.config.build import build
from megalite.config.load import load_config
from megalite.config.rules import Job
from megalite.config.schema import Config
from megalite.config.tree import leaves
from megalite.config.validate import RULES, derived, violations
from megalite.errors import UserError

MLA = {"model__mla__kv_rank": 16}


def changed(**values: Any) -> Config:
    """The default configuration with keys set: train__steps=5."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        branch = tree
        *outer, last = path.split("__")
        for name in outer:
            branch = branch.setdefault(name, {})
        branch[last] = value
    return build(Config, tree)


def scaling(**entries: Any) -> dict[str, Any]:
    return {"model__rope__scaling": entries}


def one_violation(values: dict[str, Any], parts: list[str], remedies: list[dict[str, Any]]) -> None:
    """With `values` one process is refused by one line, which says all `parts`; each of `remedies` makes it legal."""
    (line,) = violations(changed(**values), 1)
    for part in parts:
        assert part in line
    for remedy in remedies:
        assert violations(changed(**(values | remedy)), 1) == [], remedy


def test_the_default_configuration_is_valid() -> None:
    assert violations(Config()) == []


@pytest.mark.parametrize(
    ("values", "world", "parts"),
    [
        ({"parallel__zero": 4}, None, ["parallel.zero=4: not a choice", "legal: 0, 1, 2, 3"]),
        ({"model__heads": 5}, None, ["model.heads=5", "nearest: 3, 4, 6", "model.head_dim"]),
        ({"model__kv_heads": 4}, None, ["model.kv_heads=4", "nearest: 2, 3, 6"]),
        ({"model__rope__fraction": 0.36}, None, ["model.rope.fraction=0.36", "rotates 23 of 64", "0.34375 or 0.375"]),
        ({"model__rope__fraction": 1.5}, None, ["model.rope.fraction=1.5", "at most 1"]),
        ({"model__rope__fraction": 0.0}, None, ["rotates 0 of 64", "0.03125"]),
        ({"model__head_dim": 1}, None, ["rotates 1 of 1", "make the head larger"]),
        ({"model__mtp": 512}, None, ["model.mtp=512", "at most 511"]),
        (
            {"model__mtp": 1, "parallel__engine": "deepspeed", "parallel__zero": 1},
            None,
            ["model.mtp=1: not built for parallel.engine=deepspeed"],
        ),
        ({"model__mla__q_rank": 8}, None, ["model.mla.q_rank=8: has no effect without model.mla.kv_rank"]),
        ({"model__mla__value_dim": 8}, None, ["model.mla.value_dim=8: has no effect"]),
        ({**MLA, "model__mla__rope_dim": 5}, None, ["model.mla.rope_dim=5", "nearest: 4 or 6"]),
        ({**MLA, "model__kv_heads": 3}, None, ["model.kv_heads=3", "null or 6"]),
        ({**MLA, "model__qk_norm": True}, None, ["model.qk_norm=true: not with model.mla"]),
        ({**MLA, "model__qkv_bias": True}, None, ["model.qkv_bias=true: not with model.mla"]),
        ({**MLA, "model__rope__fraction": 0.5}, None, ["model.rope.fraction=0.5", "set 1"]),
        ({**MLA, "parallel__tp": 4}, 4, ["parallel.tp=4: does not divide model.heads 6"]),
        (scaling(factor=2.0), None, ["model.rope.scaling={'factor': 2.0}: has no effect without rope_type"]),
        (scaling(rope_type="yarn", beta_fast=1.0), None, ["model.rope.scaling.beta_fast=1.0", "32 and 1"]),
        (scaling(rope_type="yarn", beta_fats=1.0), None, ["model.rope.scaling.beta_fats: unknown", "beta_fast"]),
        (scaling(rope_type="yarn", factor="much"), None, ["model.rope.scaling.factor=much: expects a number"]),
        (scaling(rope_type="yarn", factor=0.5), None, ["model.rope.scaling.factor=0.5: too small; at least 1"]),
        (scaling(rope_type="llama3", high_freq_factor=1.0), None, ["high_freq_factor=1.0"]),
        (scaling(rope_type="ntk") | {"model__position": "none"}, None, ["needs model.position=rope"]),
        ({"model__position": "learned", "model__max_positions": 256}, None, ["sequence_length=512", "at most 256"]),
        ({"model__window_pattern": 2}, None, ["model.window_pattern=2"]),
        ({"model__norm": "layernorm", "model__norm_zero_centered": True}, None, ["needs model.norm=rmsnorm"]),
        ({"model__logit_softcap": 0.0}, None, ["model.logit_softcap=0.0"]),
        ({"optim__warmup_steps": 2000}, None, ["optim.warmup_steps=2000", "at most 1000", "optim.warmup_steps=100"]),
        ({"train__steps": 5, "optim__warmup_steps": 20}, None, ["at most 5", "add for example optim.warmup_steps=0"]),
        (
            {"optim__schedule": "wsd", "optim__warmup_steps": 600, "optim__decay_steps": 500},
            None,
            ["optim.decay_steps=500", "at most 400", "add for example optim.decay_steps=400"],
        ),
        ({"optim__decay_steps": 5}, None, ["optim.decay_steps=5", "only optim.schedule=wsd"]),
        ({"optim__min_lr_ratio": 1.5}, None, ["optim.min_lr_ratio=1.5", "between 0 and 1"]),
        ({"optim__beta2": 1.0}, None, ["optim.beta2=1.0", "below 1"]),
        ({"optim__name": "adam"}, None, ["optim.name=adam", "nearest: adamw", "legal: adamw, muon, sgd"]),
        ({"optim__lr": -1.0}, None, ["optim.lr=-1.0: too small; at least 0"]),
        ({"data__split": "0.9,-0.2"}, None, ["data.split=0.9,-0.2", "0.95,0.05"]),
        ({"data__split": "most"}, None, ["data.split=most"]),
        ({"data__split": "0,1"}, None, ["data.split=0,1"]),
        ({"data__split": "nan,0.1"}, None, ["data.split=nan"]),
        ({"data__blend": {"a": 0.0}}, None, ["data.blend.a=0.0"]),
        ({"run__name": "../x"}, None, ["run.name=../x"]),
        ({"run__name": ""}, None, ["run.name="]),
        ({"train__profile_step": 1001}, None, ["train.profile_step=1001", "at most that"]),
        ({"train__seed": 2**32}, None, ["train.seed=4294967296", "at most 4294967295"]),
    ],
)
def test_one_violation_one_line(values: dict[str, Any], world: int | None, parts: list[str]) -> None:
    (line,) = violations(changed(**values), world)
    for part in parts:
        assert part in line
    assert "\n" not in line


def test_all_violations_come_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load_config("train.global_batch=7", "model.heads=7", "optim.beta1=2", "parallel.ep=2", "optim.schedule=cos")
    lines = caught.value.lines
    assert [line.split("=")[0] for line in lines] == [
        "optim.schedule",
        "train.global_batch",
        "parallel.ep",
        "model.heads",
        "optim.beta1",
    ]


def test_named_legal_values_are_legal() -> None:
    for values in ({"model__heads": 4}, {"model__heads": 5, "model__head_dim": 64}, {"model__kv_heads": 3}):
        assert violations(changed(**values)) == []


def test_rules_are_skipped_where_their_keys_are_already_wrong() -> None:
    assert len(violations(changed(train__micro_batch=0, train__global_batch=7))) == 1
    assert len(violations(changed(model__heads=0))) == 1


small = st.integers(1, 64)


@settings(max_examples=300, deadline=None)
@given(
    micro=st.integers(1, 8), batch=small, dp=st.sampled_from([-1, 1, 2, 3, 4]), world=st.none() | st.integers(1, 8),
    heads=st.integers(1, 12), kv=st.none() | st.integers(1, 12), hidden=st.integers(1, 256), dim=st.none() | small,
    fraction=st.floats(0, 1.2), position=st.sampled_from(["rope", "learned", "none"]), length=st.integers(1, 64),
    positions=st.none() | small, steps=st.integers(1, 50), warmup=st.integers(0, 60), decay=st.integers(0, 60),
    schedule=st.sampled_from(["cosine", "wsd", "linear", "inverse_sqrt", "constant"]),
)  # fmt: skip
def test_what_a_valid_configuration_promises(
    micro: int, batch: int, dp: int, world: int | None, heads: int, kv: int | None, hidden: int, dim: int | None,
    fraction: float, position: str, length: int, positions: int | None, steps: int, warmup: int, decay: int,
    schedule: str,
) -> None:  # fmt: skip
    config = changed(
        train={"micro_batch": micro, "global_batch": batch, "steps": steps},
        parallel={"dp": dp},
        model={
            "heads": heads,
            "kv_heads": kv,
            "hidden": hidden,
            "head_dim": dim,
            "position": position,
            "max_positions": positions,
            "rope": {"fraction": fraction},
        },
        data={"sequence_length": length},
        optim={"schedule": schedule, "warmup_steps": warmup, "decay_steps": decay},
    )
    lines = violations(config, world)
    assert all("\n" not in line and ": " in line for line in lines)
    if lines:
        return
    job, values = Job(config, world), derived(config, world)
    assert job.accumulation * micro * job.dp == batch
    assert job.accumulation >= 1
    assert world is None or job.dp * job.inner == world
    head_dim = values.get("model.head_dim", dim)
    assert head_dim >= 1
    assert dim is not None or head_dim * heads == hidden
    assert heads % values.get("model.kv_heads", kv) == 0
    assert position != "rope" or (int(head_dim * fraction) % 2 == 0 and 0 < fraction <= 1)
    assert position != "learned" or values.get("model.max_positions", positions) >= length
    assert warmup + (decay if schedule == "wsd" else 0) <= steps


def test_every_rule_can_fail() -> None:
    """A rule without a case above would be untested."""
    covered = {
        rule.__name__
        for mark in test_one_violation_one_line.pytestmark  # type: ignore[attr-defined]
        for values, world, _ in mark.args[1]
        for _, rule in [*RULES, *rope.RULES]
        if list(rule(Job(changed(**values), world)))
    }
    assert covered == {rule.__name__ for _, rule in [*RULES, *rope.RULES]}


def test_schema_is_small_and_documented() -> None:
    keys = leaves(Config)
    assert len(keys) <= 155
    for leaf in keys.values():
        assert leaf.help.endswith("."), leaf.path
        assert not leaf.choices or leaf.default in leaf.choices
