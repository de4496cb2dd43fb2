"""Multi-token prediction by its definition: every document alone, every depth one token shorter, in float64."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megalite import Trainer, load_config
from megalite.checkpoint.stored_model import empty_model
from megalite.config.schema import MLAConfig, ModelConfig
from megalite.data.batch import Batch
from megalite.model.multi_token import counted, targets_ahead, tokens_ahead
from megalite.model.transformer import Transformer
from megalite.parallel.parameter import materialize
from tests.ranks import run_ranks
from tests.tiny_job import tiny_job

VOCAB, LENGTH = 23, 14
SMALL = ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, ffn=24, mtp=3, embedding_scale=2.0, init_std=0.2)
CONFIGS = {
    "untied": SMALL,
    "tied": replace(SMALL, tied_embeddings=True, logit_softcap=3.0, window=5, window_pattern=2),
    "latent": replace(SMALL, kv_heads=None, mla=MLAConfig(kv_rank=6, rope_dim=2)),
}


def build(config: ModelConfig) -> Transformer:
    model = empty_model(config, VOCAB, LENGTH)
    materialize(model, torch.device("cpu"), 0, torch.float64)
    return model


def batch() -> Batch:
    """Two rows; documents of 1, 2, 3 and more tokens; some targets that do not count."""
    generator = torch.Generator().manual_seed(5)
    tokens, targets = torch.randint(VOCAB, (2, 2, LENGTH), generator=generator)
    targets[0, 3] = targets[1, 9:11] = -100
    lengths = torch.tensor([[5, 1, 2, 6], [3, 4, 3, 4]])
    documents = torch.stack([torch.arange(4).repeat_interleave(row) for row in lengths]).int()
    return Batch(tokens, targets, documents)


def by_definition(model: Transformer, tokens: Tensor, targets: Tensor) -> list[Tensor]:
    """Summed losses of the depths 0, 1, … of one document [S]; what has no token ahead is not there at all."""
    hidden, sums = model(tokens[None]), []
    sums.append(cross_entropy(model.logits(hidden)[0], targets, reduction="sum", ignore_index=-100))
    for depth, module in enumerate(model.mtp.values(), start=1):
        if depth >= len(tokens):
            break
        seen = tokens[None, : len(tokens) - depth]
        embedded = model.embedding.weight[tokens[None, depth:]] * model.config.embedding_scale
        hidden = module(hidden[:, :-1], embedded, model._context(seen, None, None, hidden))
        logits = model.logits(hidden)[0]
        sums.append(cross_entropy(logits, targets[depth:], reduction="sum", ignore_index=-100))
    return sums


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_are_those_of_each_document_alone(config: ModelConfig, packed: bool) -> None:
    model, whole = build(config), batch()
    documents = whole.documents if packed else torch.zeros_like(whole.tokens)
    assert documents is not None
    wanted: Any = [0.0] * (1 + config.mtp)
    for row in range(len(whole.tokens)):
        for number in documents[row].unique():
            here = documents[row] == number
            for depth, total in enumerate(by_definition(model, whole.tokens[row, here], whole.targets[row, here])):
                wanted[depth] = wanted[depth] + total
    losses = model.loss(whole.tokens, whole.targets, whole.documents if packed else None, ahead=True)
    found = [losses.nll_sum, *losses.ahead_sums]
    parameters = dict(model.named_parameters())
    weights = torch.arange(1.0, 2.0 + config.mtp)
    ours, theirs = (
        torch.autograd.grad((torch.stack(sums) * weights).sum(), list(parameters.values())) for sums in (found, wanted)
    )
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-12, atol=0)
    for name, mine, his in zip(parameters, ours, theirs, strict=True):
        assert (mine - his).abs().max() <= 1e-10 * his.abs().max(), name


def test_what_lies_ahead() -> None:
    rows = torch.tensor([[1, 2, 3, 4, 5]])
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    assert tokens_ahead(rows, 2).tolist() == [[3, 4, 5, 0, 0]]
    assert targets_ahead(rows, None, 2).tolist() == [[3, 4, 5, -100, -100]]
    assert targets_ahead(rows, documents, 1).tolist() == [[2, -100, 4, 5, -100]]
    assert targets_ahead(rows, documents, 7).tolist() == [[-100] * 5]
    assert counted(Batch(rows, rows, documents), 2).tolist() == [5, 3, 1]


def test_evaluation_leaves_the_modules_out() -> None:
    model, whole = build(SMALL), batch()
    losses = model.loss(whole.tokens, whole.targets)
    assert losses.ahead_sums == ()
    losses.nll_sum.backward()
    assert all(parameter.grad is None for parameter in model.mtp.parameters())
    first, last = model.stage([0], True, False), model.stage([1], False, True)
    assert not first.mtp and last.mtp["1"] is model.mtp["1"]
    assert first.tied_weight is last.tied_weight is model.embedding.weight
    assert list(last.layers) == [1, 2, 3, 4]


def trained(*words: str) -> list[tuple[float, float | None, float]]:
    """Loss, loss of the modules and gradient norm of every step, on this rank."""
    config = load_config(*tiny_job("precision=fp64", "model.mtp=2", "train.steps=3", "data.packing=documents", *words))
    return [(row.loss, row.mtp_loss, row.grad_norm) for row in Trainer(config)]


def test_the_trainer_trains_logs_keeps_and_resumes(tmp_path: Path) -> None:
    here = (f"data.cache={tmp_path / 'cache'}", "train.steps=4")
    whole = trained(*here, f"run.dir={tmp_path / 'whole'}")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["mtp_loss"] for row in rows] == [ahead for _, ahead, _ in whole]
    assert all(ahead is not None and ahead > 3 for _, ahead, _ in whole) and whole[-1][1] < whole[0][1]  # type: ignore[operator]
    again = f"run.dir={tmp_path / 'again'}"
    trained(*here, again, "train.steps=2", "optim.schedule=constant")
    steady = trained(*here, f"run.dir={tmp_path / 'steady'}", "optim.schedule=constant")
    assert trained(*here, again, "optim.schedule=constant") == steady[2:]


def test_the_last_stage_has_the_embedding_too(tmp_path: Path) -> None:
    here = f"data.cache={tmp_path / 'cache'}"
    (alone,) = run_ranks(1, trained, here, f"run.dir={tmp_path / 'one'}")
    for layout in (
        ["parallel.pp=2"],
        ["parallel.pp=2", "parallel.chunks=2", "parallel.schedule=zbv", "model.layers=4"],
    ):
        if "model.layers=4" in layout:
            (alone,) = run_ranks(1, trained, here, f"run.dir={tmp_path / 'four'}", "model.layers=4")
        for rank in run_ranks(2, trained, here, f"run.dir={tmp_path / layout[-1]}", *layout):
            torch.testing.assert_close(rank, alone, rtol=1e-10, atol=0)
