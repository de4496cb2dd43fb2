"""A run with experts over two ranks leaves checkpoints that one process inspects, exports, samples from and goes on
with."""

import json
from pathlib import Path

import pytest
import torch

from megalite import Trainer, load_config
from megalite.checkpoint.model_folder import load_model
from megalite.cli import main
from megalite.world import leave
from tests.ranks import run_ranks
from tests.tiny_job import tiny_job

STEPS = 3
MIXTRAL = (
    "precision=fp64",
    "model.family=mixtral",
    "model.moe.experts=4",
    "model.moe.ffn=24",
    "model.moe.aux_loss=0.01",
)
MIXTRAL += ("model.moe.aux_scope=global", f"train.steps={STEPS}", "train.micro_batch=2")
DEEPSEEK = (
    "precision=fp64", "model.family=deepseek_v3", "model.norm_eps=1e-6", "model.mla.kv_rank=12", "model.mla.rope_dim=8",
    "model.moe.experts=8", "model.moe.ffn=16", "model.moe.shared_ffn=16", "model.moe.router=sigmoid",
    "model.moe.dense_layers=1", "model.moe.groups=2", "model.moe.top_groups=1", "model.moe.bias_rate=0.01",
    "train.micro_batch=2", f"train.steps={STEPS}",
)  # fmt: skip


def train(folder: str, words: tuple[str, ...], world: int) -> None:
    Trainer(load_config(*tiny_job(f"run.dir={folder}", *words), world_size=world)).fit()
    leave()


@pytest.mark.parametrize(
    ("words", "layout"),
    [
        (MIXTRAL, ("parallel.ep=2",)),
        (MIXTRAL, ("parallel.etp=2", "parallel.zero=1")),
        (DEEPSEEK, ("parallel.ep=2",)),
        (DEEPSEEK, ("parallel.pp=2",)),
    ],
    ids=["mixtral-ep", "mixtral-etp", "deepseek_v3-ep", "deepseek_v3-pp"],
)
def test_saved_by_two_used_by_one(
    tmp_path: Path, words: tuple[str, ...], layout: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    two, one, exported = tmp_path / "two", tmp_path / "one", tmp_path / "exported"
    run_ranks(2, train, str(two), words + layout, 2)
    train(str(one), words, 1)
    model, _ = load_model(two)
    wanted, _ = load_model(one)
    names = [name for name, _ in wanted.named_parameters()]
    assert any(name.endswith(("last_load", "expert_bias")) for name in names)
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-7, atol=1e-9, msg=name)
    assert main(["checkpoint", "export", f"checkpoint={two}", f"output={exported}"]) == 0
    loaded, _ = load_model(exported)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.logits(loaded(tokens)), model.logits(model(tokens)))
    capsys.readouterr()
    texts = []
    for folder in (two, exported):
        assert main(["generate", str(folder), "prompt=def ", "max_tokens=8", "tokenizer=bytes"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["checkpoint", "inspect", str(two)]) == 0
    assert f"step {STEPS}" in capsys.readouterr().out
    train(str(two), (*words, "train.steps=4"), 1)
    assert sorted(path.name for path in (two / "checkpoints").iterdir())[-1] == "step_00000004"


def test_started_by_two_from_a_model_folder(tmp_path: Path) -> None:
    """The weights of a Hugging Face folder start a run on two ranks as on one, at step 0."""
    train(str(tmp_path / "first"), MIXTRAL, 1)
    assert main(["checkpoint", "export", f"checkpoint={tmp_path / 'first'}", f"output={tmp_path / 'theirs'}"]) == 0
    words = (*MIXTRAL, f"checkpoint.resume={tmp_path / 'theirs'}", "train.seed=5")
    train(str(tmp_path / "one"), words, 1)
    run_ranks(2, train, str(tmp_path / "two"), (*words, "parallel.ep=2", "parallel.zero=1"), 2)
    rows = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "one", "two")
    ]
    assert rows[1] == pytest.approx(rows[2], rel=1e-9) and len(rows[1]) == STEPS
    assert rows[1][0] < rows[0][0] - 0.01
