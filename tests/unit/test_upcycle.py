"""Upcycling: the model with experts computes what the dense one does, and its experts part when it is trained."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite import Trainer, load_config
from megalite.checkpoint.huggingface.folder import open_huggingface
from megalite.checkpoint.model_folder import load_model, save_model
from megalite.checkpoint.stored_model import StoredModel, empty_model
from megalite.checkpoint.upcycle import upcycled
from megalite.cli import main
from megalite.config.schema import ModelConfig, MoEConfig
from megalite.errors import UserError
from megalite.parallel.parameter import materialize
from tests.tiny_job import tiny_job

DENSE = ModelConfig(layers=2, hidden=16, heads=2, ffn=24, qk_norm=True, family="qwen3")
FORMS: dict[str, dict[str, Any]] = {
    "gated": {},
    "plain": {"activation": "gelu", "mlp_bias": True, "family": "none"},
    "gated with biases": {"mlp_bias": True, "norm_place": "sandwich"},
}


def random_model(config: ModelConfig, folder: Path) -> StoredModel:
    """With biases and norms that are not what they begin as, in float64."""
    model = empty_model(config, 257, 64)
    materialize(model, torch.device("cpu"), 0, torch.float64)
    for number, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        parameter.data += 0.3 * noise
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return StoredModel(config, 257, 64, torch.float64, weights.__getitem__, folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("experts", "top_k", "granularity"), [(4, 2, 1), (3, 1, 1), (3, 2, 4), (2, 1, 3), (1, 1, 1)])
def test_it_computes_what_the_dense_model_does(
    tmp_path: Path, form: str, experts: int, top_k: int, granularity: int
) -> None:
    dense = random_model(dataclasses.replace(DENSE, **FORMS[form]), tmp_path)
    save_model(dense, tmp_path / "dense")
    save_model(upcycled(dense, experts, top_k, granularity), tmp_path / "moe")
    before, _ = load_model(tmp_path / "dense")
    after, stored = load_model(tmp_path / "moe")
    assert stored.config.moe.experts == experts * granularity
    tokens = torch.randint(0, 257, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, given = before.logits(before(tokens)), after.logits(after(tokens))
        assert (given - wanted).abs().max() <= 1e-12 * wanted.abs().max()
        router = after.blocks["0"].mlp.router
        x = torch.randn(19, 16, dtype=torch.float64)
        chosen = (x @ router.weight.T).topk(top_k * granularity).indices // granularity
        assert all(len(set(row)) == top_k for row in chosen.tolist())


def test_experts_part_in_a_training_that_starts_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dense run, upcycled by the command line, trained on from the folder: the first loss is the dense model's."""
    job = tiny_job("precision=fp64", "train.steps=3", "optim.lr=1e-2")
    Trainer(load_config(*job, f"run.dir={tmp_path / 'dense'}")).fit()
    folder = tmp_path / "moe"
    assert main(["checkpoint", "upcycle", str(tmp_path / "dense"), str(folder), "experts=4", "granularity=2"]) == 0
    assert f"{folder}: written (none)" in capsys.readouterr().out
    assert main(["checkpoint", "inspect", str(folder)]) == 0
    *_, words = capsys.readouterr().out.strip().splitlines()
    dense, _ = load_model(tmp_path / "dense")
    again = dict(word.split("=", 1) for word in [*job, *shlex.split(words), f"run.dir={tmp_path / 'run'}"])
    trainer = Trainer(load_config(*(f"{name}={value}" for name, value in again.items())))
    batch = trainer.data.train.batch(range(8))
    losses = [metrics.loss for metrics in trainer]
    with torch.no_grad():
        first = dense.loss(batch.tokens, batch.targets).nll_sum / (batch.targets >= 0).sum()
    assert losses[0] == pytest.approx(first.item(), rel=1e-12) and losses[-1] < losses[0]
    trained, stored = load_model(tmp_path / "run")
    assert stored.config.moe == MoEConfig(experts=8, top_k=4, ffn=32, scale=2.0)
    up = trained.blocks["0"].mlp.experts.up
    assert not torch.allclose(up[0], up[2], rtol=1e-3) and not torch.allclose(up[0], up[4], rtol=1e-3)
    del trainer  # The same words again go on with the run's own checkpoint.
    assert Trainer(load_config(*(f"{name}={value}" for name, value in again.items()))).step == 3


def test_a_run_that_is_another_model_is_refused(tmp_path: Path) -> None:
    save_model(random_model(ModelConfig(layers=2, hidden=32, heads=2, ffn=64), tmp_path), tmp_path / "model")
    words = tiny_job(f"checkpoint.resume={tmp_path / 'model'}", f"run.dir={tmp_path / 'run'}", "model.ffn=32")
    with pytest.raises(UserError, match=r"model.ffn: 32, but .* is a model with 64; set it so"):
        Trainer(load_config(*words))
    assert not (tmp_path / "run").exists()
    words = tiny_job(
        f"checkpoint.resume={tmp_path / 'model'}", f"run.dir={tmp_path / 'run'}", "model.vocab=300"
    )  # fmt: skip
    with pytest.raises(UserError, match=r"model.vocab: 300, but .* has 257 rows; set model.vocab=257"):
        Trainer(load_config(*words))


def test_a_hugging_face_form_where_there_is_one(tmp_path: Path) -> None:
    model = upcycled(random_model(DENSE, tmp_path), 4, 2)
    save_model(model, tmp_path / "moe")
    assert main(["checkpoint", "export", f"checkpoint={tmp_path / 'moe'}", f"output={tmp_path / 'theirs'}"]) == 0
    held = open_huggingface(tmp_path / "theirs")
    assert held.config.family == "qwen3_moe"
    for name in model.shapes():
        assert torch.equal(held.tensor(name), model.tensor(name))


@pytest.mark.parametrize(
    ("changes", "arguments", "line"),
    [
        ({}, (2, 3, 1), "top_k=3: there are 2 experts"),
        ({}, (4, 2, 5), "granularity=5: does not divide the 24 inner values; nearest: 3, 4, 6"),
        ({"moe": MoEConfig(experts=2)}, (4, 2, 1), "has experts already"),
    ],
)
def test_what_cannot_be_upcycled(
    tmp_path: Path, changes: dict[str, Any], arguments: tuple[int, int, int], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        upcycled(random_model(dataclasses.replace(DENSE, **changes), tmp_path), *arguments)
    assert line in str(caught.value)
