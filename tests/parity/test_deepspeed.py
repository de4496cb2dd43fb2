"""DeepSpeed on the same model, configuration and data: its losses and gradient norms are ours, and so are checkpoints.

float32: DeepSpeed has no float64. Sums are made in another order, so a step agrees to some 1e-7; bounds leave room for
what a few AdamW steps make of that. DeepSpeed keeps groups of a process for ever, so each job has fresh processes.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.config.load import load_config
from megalite.errors import UserError
from megalite.train import deepspeed_engine
from megalite.train.trainer import Trainer
from tests.ranks import POOL, run_ranks
from tests.tiny_job import tiny_job

JOB = ("precision=fp32", "train.global_batch=16", "train.micro_batch=4", "optim.clip=0.5", "optim.lr=0.01")
DEEPSPEED = "parallel.engine=deepspeed"


def rows(words: tuple[str, ...]) -> list[tuple[float, float]]:
    return [(step.loss, step.grad_norm) for step in Trainer(load_config(*tiny_job(*JOB, *words)), callbacks=[])]


def trained(*words: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step on two ranks; the throw-away microbatch before the first leaves no trace."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'megalite[deepspeed]'")
    deepspeed_engine.import_deepspeed(torch.device("cpu"))  # once, before the processes are forked
    POOL.stop()
    found: list[Any] = run_ranks(2, rows, words, timeout=200)
    POOL.stop()
    assert found[0] == found[1]
    return list(found[0])


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("zero", ["parallel.zero=1", "parallel.zero=2", "parallel.zero=3", "parallel.zero=3 offload"])
def test_losses_and_norms_are_ours(zero: str, optim: str, tmp_path: Path) -> None:
    level, *offload = zero.split()
    words = (f"optim.name={optim}", "checkpoint.every=null")
    ours = trained(*words, f"run.dir={tmp_path / 'ours'}")
    theirs = trained(
        *words, DEEPSPEED, level, f"run.dir={tmp_path / 'theirs'}", f"parallel.offload={str(bool(offload)).lower()}"
    )
    assert len(theirs) == 4
    for expected, found in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("zero", [1, 3])
def test_checkpoints_go_from_one_engine_to_the_other(zero: int, tmp_path: Path) -> None:
    engines = {"ours": ("parallel.zero=1",), "theirs": (DEEPSPEED, f"parallel.zero={zero}")}
    whole = trained(*engines["ours"], f"run.dir={tmp_path / 'whole'}", "checkpoint.every=2")
    for first, then in (("ours", "theirs"), ("theirs", "ours")):
        start = tmp_path / first
        trained(*engines[first], f"run.dir={start}", "checkpoint.every=2")
        resume = f"checkpoint.resume={start / 'checkpoints' / 'step_00000002'}"
        rest = trained(*engines[then], f"run.dir={tmp_path / f'{first}-{then}'}", resume)
        assert len(rest) == 2
        for expected, found in zip(whole[2:], rest, strict=True):
            assert found == pytest.approx(expected, rel=5e-6), f"from {first} to {then}"


@pytest.mark.parametrize("word", ["parallel.zero=0", "precision.name=fp64", "optim.name=muon", "parallel.tp=2"])
def test_what_deepspeed_has_not_is_one_line(word: str) -> None:
    chosen = dict(pair.split("=") for pair in ("parallel.zero=1", "precision.name=fp32", word))
    with pytest.raises(UserError) as caught:
        load_config(DEEPSPEED, *(f"{key}={value}" for key, value in chosen.items()))
    (line,) = caught.value.lines
    assert line.startswith(f"{word.replace('.name=fp', '=fp')}:")


def test_without_deepspeed_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"parallel\.engine=deepspeed: .*pip install 'megalite\[deepspeed\]'"):
        deepspeed_engine.import_deepspeed(torch.device("cpu"))
