"""Rules of the layout: each can fail, with one clear line that names legal values; and what a valid layout promises."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import layout, stages
from megalite.config.build import build
from megalite.config.load import load_config
from megalite.config.rules import Job
from megalite.config.schema import Config
from megalite.config.validate import derived, violations
from megalite.mesh import Mesh
from megalite.pipeline.schedule import Kind, make_schedule
from megalite.pipeline.schedule.named import RECIPES
from megalite.pipeline.schedule.text import write_csv

SECTIONS = {
    "heads": "model", "kv_heads": "model", "head_dim": "model", "ffn": "model", "vocab": "model", "hidden": "model",
    "depth": "model.layers", "micro_batch": "train", "global_batch": "train", "deterministic": "train",
    "sequence_length": "data", "optim": "optim.name", "mode": "recompute", "every": "recompute.layers",
}  # fmt: skip


def changed(**values: Any) -> Config:
    """The default configuration (8 layers, 6 heads of 64, ffn 1024, sequences of 512) with keys set.

    A name without a place in SECTIONS is a key of parallel.
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = SECTIONS.get(name, "parallel").partition(".")
        tree.setdefault(section, {})[key or name] = value
    return build(Config, tree)


Case = tuple[dict[str, Any], int | None, list[str], list[dict[str, Any]]]
CASES: list[Case] = [
    # keys set, world size, parts of the one line, and changes that the line promises to be legal
    ({"dp": 0}, None, ["parallel.dp=0", "-1"], [{"dp": 1}, {"dp": -1}]),
    ({"dp": -2}, 2, ["parallel.dp=-2", "-1"], [{"dp": -1}]),
    (
        {"dp": 3, "global_batch": 12},
        2,
        ["parallel.dp=3", "this job has 2", "set parallel.dp=2 or -1", "start 3"],
        [{"dp": 2, "global_batch": 16}, {"dp": -1, "global_batch": 16}],
    ),
    ({"tp": 2}, 1, ["parallel.tp=2", "2 ranks a replica", "this job's 1", "nearest: 1;", "start 2"], [{"tp": 1}]),
    (
        {"pp": 4, "tp": 2, "global_batch": 48},
        12,
        ["parallel.pp=4", "nearest: 2, 3, 6", "start 8 or 16"],
        [{"pp": 2}, {"pp": 3}, {"pp": 6}],
    ),
    ({"pp": 4, "tp": 2, "dp": 2}, 4, ["parallel.pp=4", "nearest: 1, 2", "start 16"], [{"pp": 2, "dp": 1}]),
    ({"pp": 2, "cp": 4}, 3, ["parallel.cp=4", "set smaller axes", "start 8"], [{"pp": 1, "cp": 1, "global_batch": 12}]),
    ({"order": "tp,dp,cp"}, None, ["parallel.order=tp,dp,cp", "pp,dp,cp,tp"], [{"order": "pp,dp,cp,tp"}]),
    ({"order": "tp,tp,pp,cp"}, None, ["parallel.order"], [{"order": "tp, dp, pp, cp"}]),
    (
        {"global_batch": 10},
        None,
        ["train.global_batch=10", "nearest: 8 or 12", "micro_batch=1, 2, 5"],
        [{"global_batch": 8}, {"global_batch": 12}, {"micro_batch": 1}, {"micro_batch": 2}, {"micro_batch": 5}],
    ),
    ({}, 3, ["train.global_batch=8", "nearest: 12"], [{"global_batch": 12}]),
    ({"micro_batch": 3}, 2, ["micro_batch 3 x dp 2 = 6", "6 or 12"], [{"global_batch": 6}, {"global_batch": 12}]),
    ({"tp": 4}, None, ["parallel.tp=4", "model.heads 6", "nearest: 1, 2"], [{"tp": 1}, {"tp": 2}]),
    (
        {"tp": 6, "kv_heads": 4, "heads": 12, "ffn": 768},
        None,
        ["parallel.tp=6: neither divides model.kv_heads 4", "nearest: 1, 2, 4"],
        [{"tp": 1}, {"tp": 2}, {"tp": 4}],
    ),
    (
        {"tp": 8, "kv_heads": 1, "heads": 8, "head_dim": 4},
        None,
        ["parallel.tp=8: does not divide the 4 rows of keys", "nearest: 1, 2, 4"],
        [{"tp": 4}],
    ),
    (
        {"tp": 2, "ffn": 1023},
        None,
        ["parallel.tp=2: does not divide model.ffn 1023", "nearest: 1, 3"],
        [{"tp": 3}, {"tp": 1}],
    ),
    ({"tp": 2, "vocab": 1}, None, ["parallel.tp=2: is more than the 1 rows"], [{"tp": 1}]),
    ({"sp": True}, None, ["parallel.sp=true", "parallel.tp is 1"], [{"sp": False}, {"tp": 2}]),
    (
        {"sp": True, "tp": 2, "micro_batch": 1, "sequence_length": 511},
        None,
        ["parallel.sp=true: parallel.tp 2", "511 tokens", "510 or 512"],
        [{"sequence_length": 510}, {"sequence_length": 512}, {"sp": False}],
    ),
    (
        {"sp": True, "tp": 3, "cp": 2, "micro_batch": 2, "ffn": 768},
        None,
        ["parallel.sp=true", "512 tokens", "504 or 516"],
        [{"sequence_length": 504}, {"sequence_length": 516}],
    ),
    ({"overlap": True, "tp": 2}, None, ["parallel.overlap=true", "parallel.sp"], [{"sp": True}, {"overlap": False}]),
    (
        {"cp": 4, "sequence_length": 500},
        None,
        ["data.sequence_length=500", "2 x parallel.cp 4 = 8", "496 or 504", "parallel.cp=1, 2, 5"],
        [{"sequence_length": 496}, {"sequence_length": 504}, {"cp": 2}, {"cp": 5, "global_batch": 20}],
    ),
    (
        {"cp": 4, "sequence_length": 7},
        None,
        ["sequence_length=7", "nearest: 8;", "parallel.cp=1"],
        [{"sequence_length": 8}],
    ),
    (
        {"cp": 4, "cp_kind": "ulysses"},
        None,
        ["parallel.cp=4: does not divide the 6 heads", "nearest: 2, 3, 6", "cp_kind=ring"],
        [{"cp": 2}, {"cp": 3, "sequence_length": 510}, {"cp_kind": "ring"}],
    ),
    (
        {"cp": 4, "ulysses": 2},
        None,
        ["parallel.ulysses=2: only", "cp_kind=hybrid"],
        [{"ulysses": 0}, {"cp_kind": "hybrid"}],
    ),
    (
        {"cp": 4, "cp_kind": "hybrid", "ulysses": 3},
        None,
        ["parallel.ulysses=3: does not divide parallel.cp 4", "nearest: 1, 2"],
        [{"ulysses": 1}, {"ulysses": 2}],
    ),
    (
        {"cp": 4, "cp_kind": "hybrid", "ulysses": 4},
        None,
        ["parallel.ulysses=4: does not divide the 6 heads", "nearest: 1, 2"],
        [{"ulysses": 2}, {"cp_kind": "ring", "ulysses": 0}],
    ),
    ({"pp": 16}, None, ["parallel.pp=16", "16 stages for 8 layers", "at most 8"], [{"pp": 8}]),
    (
        {"pp": 2, "chunks": 8, "schedule": "interleaved"},
        None,
        ["parallel.chunks=8", "16 stages for 8 layers", "at most 4"],
        [{"chunks": 4}],
    ),
    ({"pp": 2, "layers": "4,4,0"}, None, ["parallel.layers=4,4,0: lists 3 stages", "expects 2"], [{"layers": "4,4"}]),
    (
        {"pp": 2, "layers": "4,3"},
        None,
        ["parallel.layers=4,3: sums to 7", "8"],
        [{"layers": "5,3"}, {"layers": "[4,4]"}],
    ),
    (
        {"pp": 2, "layers": "even"},
        None,
        ["parallel.layers=even: expects auto, null, or 2 numbers"],
        [{"layers": "auto"}],
    ),
    ({"pp": 2, "layers": ""}, None, ["parallel.layers=: expects"], [{"layers": None}]),
    ({"pp": 4, "layers": "4,0*2,4"}, None, ["parallel.layers=4,0*2,4: at least 1"], [{"layers": "0,4*2,0"}]),
    ({"pp": 2, "layers": "9,-1"}, None, ["parallel.layers=9,-1: at least 1"], [{"layers": "8,0"}]),
    (
        {"pp": 2, "schedule": "rows.csv"},
        None,
        ["parallel.schedule=rows.csv: no such file"],
        [{"schedule": "1f1b"}],
    ),
    ({"pp": 2, "schedule": "1f1d"}, None, ["parallel.schedule=1f1d: unknown", "nearest: 1f1b", "FILE.csv"], []),
    ({"pp": 2, "schedule": "zbv"}, None, ["parallel.chunks=1: zbv", "set 2"], [{"chunks": 2}]),
    ({"pp": 2, "chunks": 2}, None, ["parallel.chunks=2: 1f1b", "set 1"], [{"chunks": 1}, {"schedule": "interleaved"}]),
    ({"pp": 2, "schedule": "v_half", "chunks": 3}, None, ["parallel.chunks=3: v_half"], [{"chunks": 2}]),
    ({"pp": 2, "group_size": 2}, None, ["parallel.group_size=2: only", "interleaved", "set 0"], [{"group_size": 0}]),
    ({"pp": 2, "in_flight": 2}, None, ["parallel.in_flight=2: only", "zb_auto", "set 0"], [{"schedule": "zb_auto"}]),
    (
        {"pp": 4, "chunks": 2, "schedule": "interleaved", "group_size": 3, "micro_batch": 1},
        None,
        ["parallel.group_size=3", "8 microbatches", "rest of 2", "nearest: 4, 8"],
        [{"group_size": 4}, {"group_size": 8}, {"group_size": 0}],
    ),
    (
        {"zero": 3, "pp": 2, "schedule": "zb_h1"},
        None,
        ["parallel.zero=3", "zb_h1"],
        [{"zero": 2}, {"schedule": "1f1b"}],
    ),
    (
        {"zero": 3, "optim": "muon"},
        None,
        ["parallel.zero=3: not built for optim=muon"],
        [{"zero": 2}, {"optim": "adamw"}],
    ),
    (
        {"zero": 3, "deterministic": "layout"},
        None,
        ["parallel.zero=3", "train.deterministic=layout"],
        [{"zero": 2}, {"deterministic": "true"}],
    ),
    ({"shard_ranks": 2}, None, ["parallel.shard_ranks=2: has no effect", "zero=3"], [{"zero": 3}, {"shard_ranks": 0}]),
    (
        {"zero": 3, "shard_ranks": 5, "cp": 2, "global_batch": 24},
        12,
        ["parallel.shard_ranks=5: does not divide the 12 ranks of dp 6 x cp 2", "nearest: 3, 4, 6"],
        [{"shard_ranks": 3}, {"shard_ranks": 0}],
    ),
    (
        {"tp": 2, "engine": "deepspeed", "zero": 1},
        None,
        ["parallel.tp=2: parallel.engine=deepspeed", "legal: 1"],
        [{"tp": 1}],
    ),
    (
        {"pp": 2, "engine": "deepspeed", "zero": 1},
        None,
        ["parallel.pp=2: parallel.engine=deepspeed"],
        [{"engine": "megalite"}],
    ),
    (
        {"engine": "deepspeed", "zero": 1, "deterministic": "layout"},
        None,
        ["train.deterministic=layout: not with parallel.engine=deepspeed"],
        [{"deterministic": "true"}, {"engine": "megalite"}],
    ),
    ({"offload": True}, None, ["parallel.offload=true: needs parallel.engine=deepspeed"], [{"offload": False}]),
    ({"every": 9}, None, ["recompute.layers=9", "8 layers"], [{"every": 8}]),
    ({"every": 2, "mode": "none"}, None, ["recompute.layers=2: has no effect"], [{"every": 1}, {"mode": "full"}]),
]


@pytest.mark.parametrize(("values", "world", "parts", "remedies"), CASES, ids=["-".join(case[0]) for case in CASES])
def test_one_violation_one_line_and_its_remedies(
    values: dict[str, Any], world: int | None, parts: list[str], remedies: list[dict[str, Any]]
) -> None:
    (line,) = violations(changed(**values), world)
    for part in parts:
        assert part in line
    assert "\n" not in line
    for remedy in remedies:
        assert violations(changed(**(values | remedy)), world) == [], remedy


def test_every_rule_can_fail() -> None:
    rules = [*layout.RULES, *stages.RULES]
    failing = {
        rule.__name__ for values, world, *_ in CASES for _, rule in rules if list(rule(Job(changed(**values), world)))
    }
    assert failing == {rule.__name__ for _, rule in rules}


def test_two_mistakes_two_lines() -> None:
    lines = violations(changed(tp=4, engine="deepspeed", zero=1, ep=2, schedule="none", global_batch=7), 6)
    keys = [line.split("=")[0] for line in lines]
    assert keys == ["parallel.tp", "parallel.tp", "parallel.tp", "parallel.ep", "parallel.schedule"]
    assert "batch" not in " ".join(lines), "what is left for dp is not known, so nothing is said about the batch"


def test_a_csv_is_read_and_its_sizes_compared(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(write_csv(make_schedule("zb_h1", 2, 1, 2)))
    assert violations(changed(schedule=str(file), pp=2)) == []
    assert "apart from the backward" in violations(changed(schedule=str(file), pp=2, zero=3))[0]
    lines = violations(changed(schedule=str(file), pp=4, micro_batch=1))
    assert [line.split(": ")[1].split(";")[0] for line in lines] == [
        "is written for 2 parallel.pp, but this job has 4",
        "is written for 2 microbatches (train.global_batch / train.micro_batch / dp), but this job has 8",
    ]
    for op, rows, said in (
        ("0UNSHARD", "0UNSHARD,0F0,0B0,0RESHARD", "gathers weights layer by layer"),
        ("0RECOMPUTE0", "0F0,0RECOMPUTE0,0B0", "recompute.mode"),
    ):
        file.write_text(rows)
        line, *_ = violations(changed(schedule=str(file), global_batch=1, micro_batch=1))
        assert line.startswith(f"parallel.schedule={file}: has {op}; ") and said in line
    file.write_text("0F0,0X0\n")
    (line,) = violations(changed(schedule=str(file)))
    assert line.startswith(f"parallel.schedule={file}: line 1, entry 2, '0X0'")


@pytest.mark.parametrize("name", RECIPES)
def test_which_schedules_split_the_backward(name: str) -> None:
    schedule = make_schedule(name, 2, RECIPES[name].chunks[0], 4)
    assert (name in stages.SPLIT_BACKWARD) == any(op.kind == Kind.W for row in schedule.rows for op in row)


@pytest.mark.parametrize(("experiment", "world"), [("llama3_8b", 8), ("llama3_70b", 64), ("llama3_405b", 16384)])
def test_published_layouts_fit_their_clusters(experiment: str, world: int) -> None:
    config = load_config(f"experiment={experiment}", world_size=world)
    job = Job(config, world)
    assert job.dp * job.inner == world
    if experiment == "llama3_405b":
        assert (job.dp, job.accumulation) == (128, 16)
        listed = job.stage_layers
        assert listed is not None and (listed[0], listed[-1], sum(listed)) == (0, 0, 126)


def test_truth_values_of_yaml_are_choices_of_deterministic(tmp_path: Path) -> None:
    assert build(Config, {"train": {"deterministic": False}}).train.deterministic == "false"
    (tmp_path / "mine.yaml").write_text("train: {deterministic: on}")
    assert load_config(config_dir=tmp_path, config_name="mine").train.deterministic == "true"
    assert load_config("train.deterministic=layout").train.deterministic == "layout"


def test_derived_values() -> None:
    hybrid = changed(cp=4, cp_kind="hybrid", heads=6, zero=3)
    values = derived(hybrid, 8)
    assert (values["parallel.ulysses"], values["parallel.dp"], values["parallel.shard_ranks"]) == (2, 2, 8)
    assert derived(changed(pp=3), 3)["parallel.layers"] == "2,3,3"
    assert not {key for key in derived(changed(cp=4)) if key.startswith("parallel.")}


sizes = st.sampled_from([1, 1, 1, 2, 3, 4])


@settings(max_examples=400, deadline=None)
@given(
    dp=st.sampled_from([-1, 1, 2, 3]), tp=sizes, cp=sizes, pp=sizes, schedule=st.sampled_from(list(RECIPES)),
    more_chunks=st.sampled_from([0, 0, 0, 1]), replicas=st.sampled_from([None, 1, 2, 1.5]), micro=st.integers(1, 3),
    microbatches=st.sampled_from([1, 4, 6, 8, 1.5]), heads=st.sampled_from([4, 12, 24]), ffn=st.sampled_from([768, 7]),
    kv=st.sampled_from([None, 1, 2, 4]), length=st.sampled_from([48, 96, 100]), group=st.sampled_from([0, 0, 0, 2, 4]),
    kind=st.sampled_from(["ring", "ulysses", "hybrid"]), ulysses=st.sampled_from([0, 0, 0, 2]), sp=st.booleans(),
    layers=st.sampled_from([None, None, "auto", "3,5", "2*4"]),
)  # fmt: skip
def test_what_a_valid_layout_promises(
    dp: int, tp: int, cp: int, pp: int, schedule: str, more_chunks: int, replicas: float | None, micro: int,
    microbatches: float, heads: int, ffn: int, kv: int | None, length: int, group: int, kind: str, ulysses: int,
    sp: bool, layers: str | None,
) -> None:  # fmt: skip
    world = None if replicas is None else int(replicas * tp * cp * pp)
    batch = int(microbatches * micro * (dp if dp > 0 else replicas or 1))
    chunks = RECIPES[schedule].chunks[0] + more_chunks
    config = changed(
        dp=dp, tp=tp, cp=cp, pp=pp, chunks=chunks, schedule=schedule, cp_kind=kind, ulysses=ulysses, sp=sp and tp > 1,
        layers=layers, group_size=group, heads=heads, kv_heads=kv, head_dim=16, ffn=ffn, micro_batch=micro,
        global_batch=batch, sequence_length=length,
    )  # fmt: skip
    lines = violations(config, world)
    assert all("\n" not in line and ": " in line for line in lines)
    if lines:
        return
    job = Job(config, world)
    Mesh({"pp": pp, "dp": job.dp, "cp": cp, "tp": tp}, ulysses=job.ulysses, order=job.order)
    assert world is None or job.dp * job.inner == world
    assert job.accumulation * micro * job.dp == batch
    assert heads % (tp * job.ulysses) == 0 and job.kv_heads * 16 % tp == 0 and ffn % tp == 0
    assert tp % job.kv_heads == 0 or job.kv_heads % tp == 0
    assert cp % job.ulysses == 0
    assert cp == 1 or length % (2 * cp) == 0
    assert not config.parallel.sp or (tp > 1 and micro * length // cp % tp == 0)
    assert sum(job.stage_layers or [8]) == 8
    assert len(job.stage_layers or range(job.stages)) == job.stages <= 8
    made = make_schedule(schedule, pp, chunks, job.accumulation, group=group or None)
    assert (len(made.rows), made.stages) == (pp, job.stages)
