"""The trainer's promises on one process: accumulation, skipped steps, dry run, interruption, what it leaves behind."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalite import Trainer, load_config
from megalite.checkpoint.store import complete_steps
from megalite.errors import RunError, UserError
from megalite.mesh import Mesh
from megalite.train.callback import StepMetrics
from tests.tiny_job import tiny_job


def trainer(folder: Path, *words: str) -> Trainer:
    return Trainer(load_config(*tiny_job("precision=fp64", f"run.dir={folder}", *words)))


def train(folder: Path, *words: str) -> list[StepMetrics]:
    return list(trainer(folder, *words))


def test_accumulation_does_not_change_the_step(tmp_path: Path) -> None:
    whole = train(tmp_path / "a", "train.micro_batch=8", "train.z_loss=1e-3")
    for micro in (1, 2, 4):
        parts = train(tmp_path / str(micro), f"train.micro_batch={micro}", "train.z_loss=1e-3")
        for name in ("loss", "grad_norm", "z_loss"):
            expected = [getattr(row, name) for row in whole]
            torch.testing.assert_close([getattr(row, name) for row in parts], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("mode", ["activation", "selective", "full"])
def test_recompute_changes_no_bit(tmp_path: Path, mode: str) -> None:
    plain = train(tmp_path / "a", "precision=fp32", "recompute=none")
    again = train(tmp_path / "b", "precision=fp32", f"recompute={mode}")
    assert [(r.loss, r.grad_norm) for r in plain] == [(r.loss, r.grad_norm) for r in again]


def test_dry_run_leaves_no_trace(tmp_path: Path) -> None:
    with_dry = train(tmp_path / "a", "precision=fp32", "train.dry_run=true")
    without = train(tmp_path / "b", "precision=fp32", "train.dry_run=false")
    assert [(r.loss, r.grad_norm) for r in with_dry] == [(r.loss, r.grad_norm) for r in without]


def test_non_finite_steps_are_skipped_said_and_limited(tmp_path: Path) -> None:
    made = trainer(tmp_path, "train.nonfinite_limit=3", "train.steps=9", "train.dry_run=false")
    steps = iter(made)
    first = next(steps)
    weights = {name: held.parts[0][1].clone() for name, held in made.optimizer.state_tensors().items()}
    loss = made.stages[0].loss
    made.stages[0].loss = lambda *a, **k: type(out := loss(*a, **k))(out.nll_sum * float("nan"), out.z_sum)  # type: ignore[assignment]
    assert (first.skipped, next(steps).skipped, next(steps).skipped) == (False, True, True)
    assert all(torch.equal(weights[name], held.parts[0][1]) for name, held in made.optimizer.state_tensors().items())
    with pytest.raises(RunError, match=r"train\.nonfinite_limit: 3 steps"):
        next(steps)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "skip"] == [2, 3, 4]


def test_sigterm_saves_and_the_next_start_goes_on(tmp_path: Path) -> None:
    made = trainer(tmp_path, "train.steps=6")
    done = []
    for row in made:
        done.append(row.step)
        if row.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    assert done == [1, 2, 3], "the step after the signal agrees to stop"
    assert [path.name for path in complete_steps(tmp_path / "checkpoints")] == ["step_00000003"]
    del made
    assert [row.step for row in train(tmp_path, "train.steps=6")] == [4, 5, 6]


def test_a_run_without_checkpoints_leaves_none_when_it_is_stopped(tmp_path: Path) -> None:
    for row in (made := trainer(tmp_path, "train.steps=6", "checkpoint.every=null")):
        if row.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    assert made.step == 3 and not complete_steps(tmp_path / "checkpoints")


def test_sigterm_leaves_an_evaluation(tmp_path: Path) -> None:
    made = trainer(tmp_path, "train.steps=6", "train.eval_every=2", "train.eval_batches=0")
    plain, batches = made.pipeline.evaluate, []

    def evaluated(batch: Any) -> Any:
        batches.append(batch)
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(batch)

    made.pipeline.evaluate = evaluated  # type: ignore[method-assign]
    assert [row.step for row in made] == [1, 2]
    assert len(batches) == 1, "the next batch is not begun"
    assert [path.name for path in complete_steps(tmp_path / "checkpoints")] == ["step_00000002"]
    del made
    assert [row.step for row in train(tmp_path, "train.steps=6")] == [3, 4, 5, 6]


def test_run_folder(tmp_path: Path) -> None:
    config = load_config(*tiny_job(f"run.dir={tmp_path}"))
    rows = list(Trainer(config))
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in written] == [row.loss for row in rows], "full precision"
    assert {"step", "tokens", "loss", "grad_norm", "lr", "tokens_per_s", "model_tflops", "mfu"} <= written[0].keys()
    assert {"memory_gb", "step_s", "data_s"} <= written[0].keys()
    again = load_config(config_dir=tmp_path, config_name="config")
    assert again == config, "config.yaml repeats the run"
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["facts"]["backends"]


def test_two_trainers_never_share_a_folder(tmp_path: Path) -> None:
    first = trainer(tmp_path)
    with pytest.raises(UserError, match="another process trains in"):
        trainer(tmp_path)
    assert first.step == 0


def test_a_used_folder_is_refused_when_asked(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        trainer(tmp_path, "checkpoint.resume=none")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("train.seed=9",), "train.seed: 9, but .* was trained with 1234"),
        (("train.global_batch=4",), "train.global_batch: 4, but"),
        (("train.steps=3",), "train.steps: 3, but .* already has 4"),
        (("model.hidden=64",), "model.hidden: 64, but .* is a model with 32"),
        (("optim=muon",), "optim.name: muon, but .* was trained with adamw"),
        (("checkpoint.resume=/nowhere",), "checkpoint.resume: no folder"),
    ],
)
def test_resume_refuses_what_it_cannot_continue(tmp_path: Path, words: tuple[str, ...], line: str) -> None:
    train(tmp_path)
    with pytest.raises(UserError, match=line):
        trainer(tmp_path, *words)


def test_metrics_are_a_value(tmp_path: Path) -> None:
    row = train(tmp_path, "train.steps=1")[0]
    assert replace(row, step=2).step == 2 and row.tokens == 8 * 32


def test_a_refused_or_finished_start_leaves_the_record_alone(tmp_path: Path) -> None:
    train(tmp_path)
    record = {name: (tmp_path / name).read_bytes() for name in ("config.yaml", "environment.json", "metrics.jsonl")}
    with pytest.raises(UserError, match=r"train\.seed"):
        trainer(tmp_path, "train.seed=9")
    assert train(tmp_path, "optim.lr=0.05") == [], "finished: nothing to train"
    assert {name: (tmp_path / name).read_bytes() for name in record} == record
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert any("already finished" in event.get("message", "") for event in events)


def test_a_failed_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        trainer(tmp_path / "new", "data.path=/nowhere/at/all")
    assert not (tmp_path / "new").exists()


def test_resuming_says_what_changed(tmp_path: Path) -> None:
    train(tmp_path)
    assert [row.step for row in train(tmp_path, "train.steps=6", "optim.lr=0.05", "log.every=2")] == [5, 6]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    resumed = next(event for event in events if event["kind"] == "resume")
    assert resumed["changed"] == ["train.steps: 4 -> 6", "optim.lr: 0.0003 -> 0.05"]


def test_changed_data_is_refused_on_resume(tmp_path: Path) -> None:
    train(tmp_path)
    for words in (("data.sequence_length=16",), ("data.max_bytes=100000",)):
        with pytest.raises(UserError, match="other samples, or in another order"):
            trainer(tmp_path, *words, "train.steps=8")


def test_branching_off_keeps_the_new_course(tmp_path: Path) -> None:
    """Back to step 2: the abandoned course is set aside, restarts go on with the new one, and keep=1 keeps it."""
    words = ("train.steps=6", "checkpoint.every=1", "checkpoint.keep=0")
    train(tmp_path, *words)
    folder = tmp_path / "checkpoints"
    back = (*words[:2], "checkpoint.keep=1", f"checkpoint.resume={folder / 'step_00000002'}", "optim.lr=0.01")
    branch = iter(trainer(tmp_path, *back))
    assert (next(branch).step, next(branch).step) == (3, 4)
    branch.close()  # type: ignore[attr-defined]
    assert [path.name for path in complete_steps(folder)] == ["step_00000004"]
    assert len(list(folder.glob("*.abandoned"))) == 4
    del branch
    again = trainer(tmp_path, *back)
    assert again.start_step == 4, "the same words do not go back twice"
    assert [row.step for row in again] == [5, 6]


def test_restarted_jobs_go_on_whatever_resume_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path)
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [row.step for row in train(tmp_path, "checkpoint.resume=none", "train.steps=5")] == [5]


def test_evaluation_reads_the_same_text_whatever_the_microbatch(tmp_path: Path) -> None:
    words = ("train.eval_every=2", "train.eval_batches=2")
    seen = [
        [row.val_loss for row in train(tmp_path / str(micro), *words, f"train.micro_batch={micro}")]
        for micro in (1, 4, 8)
    ]
    for other in seen[1:]:
        torch.testing.assert_close([v for v in other if v], [v for v in seen[0] if v], rtol=1e-10, atol=0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_every_layout_reads_the_same_samples(ranks: int, micro: int) -> None:
    """Over all ranks and microbatches a step reads its own samples, each once: 8(step-1) .. 8 step - 1."""

    class Recorded:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def batch(self, samples: range) -> "Recorded":
            self.seen += samples
            return self

        def to(self, _device: object) -> "Recorded":
            return self

    config = load_config(*tiny_job(f"train.micro_batch={micro}"))
    for step in (1, 3):
        seen = []
        for rank in range(ranks):
            data = Recorded()
            mesh = Mesh({"pp": 1, "dp": ranks, "cp": 1, "tp": 1}, rank)
            view = SimpleNamespace(config=config, mesh=mesh, data=SimpleNamespace(train=data), device=None)
            Trainer._microbatches(view, step)  # type: ignore[arg-type]
            seen += data.seen
        assert sorted(seen) == list(range(8 * (step - 1), 8 * step))
