"""Where a number first stopped being finite: a fault is put into one place of one rank, and every rank names it.

The module, whether forward or backward, the microbatch, the rank and the kind; on every axis that ranks lie along.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalite import Trainer, load_config
from megalite.parallel.parameter import local
from megalite.train.callback import StepMetrics
from tests.ranks import run_ranks
from tests.tiny_job import tiny_job

EXPERTS = ("model.moe.experts=4", "model.moe.ffn=32", "model.moe.aux_loss=0.01", "model.moe.shared_ffn=16")
JOB = ("debug.numerics=true", "train.steps=3", "train.micro_batch=2", "train.dry_run=false", "model.layers=4")
AT = 2
"""The step that is spoiled."""


def spoil(trainer: Trainer, kind: str, module: str, row: int) -> None:
    """Put a fault of `kind` into `module` of this rank, in step AT and this rank's microbatch `row`."""
    (found,) = {m for stage in trainer.stages for name, m in stage.named_modules() if name == module}

    def now() -> bool:
        return trainer.step == AT - 1 and trainer.pipeline.running.microbatch == row

    def broken(x: Tensor, value: float) -> Tensor:
        x = x.clone()
        x.view(-1)[7] = value
        return x

    def activation(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        return broken(y, torch.nan) if now() else y

    def gradient(_: nn.Module, __: Any, y: Tensor) -> None:
        if now():
            y.register_hook(lambda g: broken(g, torch.inf))

    def backward(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if now():
            arguments[0].register_hook(lambda g: broken(g, -torch.inf))

    def weight(_: nn.Module, __: Any) -> None:
        if trainer.step == AT - 1:
            local(found.weight).view(-1)[3] = torch.inf  # type: ignore[arg-type]

    hooks: dict[str, Callable[[], Any]] = {
        "activation": lambda: found.register_forward_hook(activation, prepend=True),
        "gradient": lambda: found.register_forward_hook(gradient, prepend=True),
        "backward": lambda: found.register_forward_pre_hook(backward),
        "weight": lambda: found.register_forward_pre_hook(weight, prepend=True),
        "sum": lambda: found.weight.register_hook(lambda g: broken(g, torch.nan) if now() else g),  # type: ignore[operator]
    }
    hooks[kind]()


def course(folder: Path, victims: list[int], kind: str, module: str, row: int, words: list[str]) -> list[StepMetrics]:
    trainer = Trainer(load_config(*tiny_job(*JOB, f"run.dir={folder}", *words)))
    if trainer.mesh.rank in victims:
        spoil(trainer, kind, module, row)
    return list(trainer)


KINDS = {
    "activation": ("forward", "output", "nan"),
    "weight": ("forward", "output", "inf"),
    "gradient": ("backward", "gradient of its output", "inf"),
    "backward": ("backward", "gradient of its input", "inf"),
    "sum": ("backward", "sum of its gradient", "nan"),
}


@pytest.mark.parametrize(
    ("kind", "module", "row", "weights"),
    [
        ("activation", "embedding", 0, []),
        ("activation", "blocks.0.attention.value", 3, []),
        ("activation", "final_norm", 1, []),
        ("weight", "blocks.2.attention_norm", 0, ["weight"]),
        ("weight", "blocks.1.mlp.down", 0, ["weight"]),
        ("gradient", "blocks.3.mlp.gate", 2, []),
        ("backward", "blocks.2.attention.output", 1, []),
        ("sum", "blocks.0.mlp.up", 1, []),
    ],
)
def test_one_process(tmp_path: Path, kind: str, module: str, row: int, weights: list[str]) -> None:
    rows = course(tmp_path, [0], kind, module, row, [])
    found = rows[AT - 1].numerics
    assert found is not None and (found["pass"], found["what"], found["kind"]) == KINDS[kind]
    summed = kind == "sum"
    assert found["module"] == (f"{module}.weight" if summed else module)
    assert found["layer"] == (int(module.split(".")[1]) if "blocks" in module else None)
    assert found["microbatch"] == (None if summed else row + 1)
    assert (found["rank"], found["ranks"], found["weights"]) == (0, [0], weights)
    assert 0 < found["share"] <= 1 and found["count"] >= 1
    assert [r.skipped for r in rows] == [False, True, kind == "weight"]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("numerics") for r in written] == [r.numerics for r in rows] and written[0].get("numerics") is None
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (told,) = [e["message"] for e in events if e["kind"] == "skip" and e["step"] == AT]
    assert f"first in {found['module']}, {found['pass']}: {found['what']}" in told


LAYOUTS = {
    "dp": ["parallel.dp=2"],
    "zero 2": ["parallel.dp=2", "parallel.zero=2"],
    "zero 3": ["parallel.dp=2", "parallel.zero=3"],
    "tp": ["parallel.tp=2"],
    "sp": ["parallel.tp=2", "parallel.sp=true"],
    "cp": ["parallel.cp=2"],
    "pp": ["parallel.pp=2"],
    "zero bubble": ["parallel.pp=2", "parallel.schedule=zbv", "parallel.chunks=2"],
    "ep": ["parallel.dp=2", "parallel.ep=2", *EXPERTS],
    "etp": ["parallel.tp=2", "parallel.etp=2", *EXPERTS],
}
ALL = [
    *(("activation", "blocks.2.attention.query", layout) for layout in LAYOUTS),
    *(("backward", "blocks.2.mlp.down", layout) for layout in ("zero 3", "tp", "sp", "cp", "zero bubble")),
    ("weight", "blocks.3.mlp.gate", "tp"),
    ("weight", "blocks.3.mlp.gate", "zero 3"),
    ("activation", "blocks.2.mlp.experts", "ep"),
    ("activation", "blocks.2.mlp.experts", "etp"),
    ("gradient", "blocks.2.mlp.experts", "ep"),
    ("sum", "blocks.2.mlp.down", "tp"),
]


@pytest.mark.parametrize(("kind", "module", "layout"), ALL)
def test_every_rank_names_the_one_that_is_broken(tmp_path: Path, kind: str, module: str, layout: str) -> None:
    words = LAYOUTS[layout]
    stages = 2 if "parallel.pp=2" in words else 1
    ranks = run_ranks(2, course, tmp_path, [1], kind, module, 1, words)
    spread = stages == 1 and "parallel.dp=2" in words
    for rows in ranks:
        assert [row.skipped for row in rows][:2] == [False, True]
        assert rows[AT - 1].numerics == ranks[0][AT - 1].numerics
    found = ranks[0][AT - 1].numerics
    assert (found["pass"], found["what"], found["kind"]) == KINDS[kind]
    assert found["module"] == (f"{module}.weight" if kind == "sum" else module)
    assert (found["rank"], found["ranks"]) == (1, [1])
    expected = 2 if kind != "weight" else 1
    assert found["microbatch"] == (None if kind == "sum" else 2 * expected if spread else expected)


@pytest.mark.parametrize("victim", [0, 3, 5])
def test_eight_ranks(tmp_path: Path, victim: int) -> None:
    """pp 2 x dp 2 x tp 2; which layers a rank has follows from its place."""
    words = ["parallel.pp=2", "parallel.dp=2", "parallel.tp=2", "parallel.sp=true"]
    module = f"blocks.{1 if victim < 4 else 3}.mlp.up"
    ranks = run_ranks(8, course, tmp_path, [victim], "activation", module, 1, words)
    found = [rows[AT - 1].numerics for rows in ranks]
    assert all(of == found[0] for of in found)
    assert (found[0]["module"], found[0]["ranks"]) == (module, [victim])
    assert found[0]["microbatch"] == 3 + victim // 2 % 2


def test_watching_changes_no_bit(tmp_path: Path) -> None:
    for number, words in enumerate(([], ["recompute=full"], EXPERTS, ["precision=fp16"])):
        courses = [
            course(tmp_path / f"{number}{on}", [], "", "", 0, [*words, f"debug.numerics={on}"])
            for on in ("true", "false")
        ]
        watched, plain = [[(row.loss, row.grad_norm) for row in rows] for rows in courses]
        assert watched == plain, words


def test_a_broken_copy_on_one_rank_is_not_overlooked(tmp_path: Path) -> None:
    """The norm's gradient is the same on tp ranks, so that one of them counts it: and the other's may break."""
    ranks = run_ranks(2, course, tmp_path, [1], "sum", "blocks.1.mlp_norm", 1, ["parallel.tp=2"])
    for rows in ranks:
        assert [row.skipped for row in rows] == [False, True, False]
        found = rows[AT - 1].numerics
        assert found is not None and (found["module"], found["ranks"]) == ("blocks.1.mlp_norm.weight", [1])


def test_a_skip_without_it_says_how_to_find_out(tmp_path: Path) -> None:
    rows = course(tmp_path, [0], "activation", "blocks.0.mlp.up", 0, ["debug.numerics=false"])
    assert rows[AT - 1].skipped and rows[AT - 1].numerics is None
    assert "debug.numerics=true names the module" in (tmp_path / "events.jsonl").read_text()
