"""Loss spikes: told from noise, said, and left behind with their data; killed after it, a run still does the same.

The poisoned batch has targets that the text never has.
"""

import json
import math
import random
import shutil
import signal
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite import Trainer, load_config
from megalite.checkpoint.store import complete_steps
from megalite.data.training import GptSamples
from megalite.errors import UserError
from megalite.train import spikes
from megalite.train.callback import StepMetrics
from megalite.train.spikes import FEWEST, WINDOW, Spikes
from tests.faults.test_resume import Job, outcome
from tests.ranks import run_ranks
from tests.tiny_job import tiny_job

BATCH = 8
JOB = (
    *("train.steps=36", "train.micro_batch=2", "optim.lr=0.003", "train.eval_every=0", "optim.schedule=constant"),
    *("checkpoint.every=5", "train.dry_run=false", "optim.warmup_steps=0"),
)
REWINDS = "train.spike_rewinds=2"
FACTOR = 3.5
"""Within so few steps the fall of the loss makes the deviation large."""


def poisoned(numbers: Sequence[int]) -> Any:
    """`GptSamples.batch` whose global batches of those `numbers`, from 1, are poisoned."""
    plain = GptSamples.batch

    def batch(self: GptSamples, samples: Sequence[int]) -> Any:
        made = plain(self, samples)
        bad = [sample // BATCH + 1 in numbers for sample in samples]
        made.targets[bad] = 250
        return made

    return batch


def course(
    folder: Path, numbers: Sequence[int], words: Sequence[str], stop_after: int = 0
) -> tuple[list[StepMetrics], int]:
    """The metrics, as they are yielded, and how many batches were skipped. `stop_after`: a step behind which the run is
    asked to stop, as a scheduler does; it does so after the next one."""
    plain, usual = GptSamples.batch, spikes.FACTOR
    GptSamples.batch, spikes.FACTOR = poisoned(numbers), FACTOR  # type: ignore[method-assign]
    try:
        trainer = Trainer(load_config(*tiny_job(*JOB, f"run.dir={folder}", *words)))
        rows = []
        for row in trainer:
            rows.append(row)
            if row.step == stop_after:
                signal.raise_signal(signal.SIGTERM)
        return rows, trainer.spikes.skipped
    finally:
        GptSamples.batch, spikes.FACTOR = plain, usual  # type: ignore[method-assign]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(rows: Sequence[Any]) -> list[tuple[float, float]]:
    return [(row.loss, row.grad_norm) for row in rows]


def test_only_what_stands_out_is_a_spike() -> None:
    """Beside the median and its deviation computed here; noise and a falling loss are none."""
    chance = random.Random(1)
    seen_so_far, losses = Spikes(factor=8), []
    for step in range(500):
        loss = 3 + 4 * math.exp(-step / 40) + chance.gauss(0, 0.05)
        norm = math.exp(chance.gauss(0, 0.2))
        assert seen_so_far.see(loss, norm) == "", step
        losses.append(loss)
    last = losses[-WINDOW:]
    median = statistics.median(last)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in last)
    for times, found in ((7.9, False), (8.1, True)):
        seen = Spikes(8, losses=seen_so_far.losses.copy(), norms=seen_so_far.norms.copy())
        assert bool(seen.see(median + times * deviation, 1.0)) == found
    assert "gradient norm" in Spikes(8, losses=seen_so_far.losses, norms=seen_so_far.norms).see(median, 100.0)


def test_a_few_steps_or_steps_all_alike_make_no_spike() -> None:
    seen_so_far = Spikes(factor=8)
    assert [seen_so_far.see(5.0 if n < FEWEST - 1 else 50.0, 1.0) for n in range(FEWEST)] == [""] * FEWEST
    alike = Spikes(factor=8)
    assert [alike.see(5.0 + 1e-3 * (n == 30), 1.0) for n in range(40)] == [""] * 40
    assert alike.see(5.1, 1.0)


def test_spikes_in_the_window_hide_no_other() -> None:
    seen_so_far = Spikes(factor=8)
    seen = [bool(seen_so_far.see(50.0 if n >= 60 else 5.0, 1.0)) for n in range(100)]
    assert seen == [n >= 60 for n in range(100)]


def test_without_rewinds_a_spike_is_said_and_trained_on(tmp_path: Path) -> None:
    rows, skipped = course(tmp_path / "a", [28], ["train.spike_rewinds=0"])
    plain, _ = course(tmp_path / "b", [28], [])
    assert numbers(rows) == numbers(plain) and skipped == 0
    assert [row.step for row in rows if row.spike] == [28] and plain[27].spike is None
    (event,) = events(tmp_path / "a", "spike")
    assert event["step"] == 28 and "loss" in event["message"] and "deviations above" in event["message"]
    assert [row["step"] for row in written(tmp_path / "a") if "spike" in row] == [28]


def test_a_rewind_is_the_run_that_never_saw_the_batch(tmp_path: Path) -> None:
    """From step 25, whose checkpoint is the last before the spike, batches 26 to 28 are left out. The other run reads
    them from a data order without those, so that nothing of the rewind is in it."""
    rows, skipped = course(tmp_path / "a", [28], [REWINDS])
    assert [row.step for row in rows] == [*range(1, 29), *range(26, 37)] and skipped == 3
    assert rows[27].spike is not None and [row.rewinds for row in rows] == [None] * 28 + [1] * 11
    (event,) = events(tmp_path / "a", "rewind")
    assert (event["step"], event["at"], event["skipped"]) == (25, 28, 3)
    assert event["message"] == "from step 28 back to 25 (1 of 2); batches 26 to 28 of the data are skipped"
    assert [row["step"] for row in written(tmp_path / "a")] == list(range(1, 37))

    plain = GptSamples.batch

    def shifted(self: GptSamples, samples: Sequence[int]) -> Any:
        return plain(self, [sample + 3 * BATCH * (sample >= 25 * BATCH) for sample in samples])

    GptSamples.batch = shifted  # type: ignore[method-assign]
    try:
        trainer = Trainer(load_config(*tiny_job(*JOB, f"run.dir={tmp_path / 'b'}", REWINDS)))
        assert numbers(list(trainer)) == numbers(rows[:25] + rows[28:])
    finally:
        GptSamples.batch = plain  # type: ignore[method-assign]


def test_a_stop_does_not_move_where_a_run_goes_back_to(tmp_path: Path) -> None:
    """It leaves a checkpoint of step 27, which an unbroken run would not have; after the rewind, one of step 26, and
    that of the course that was left is not gone on from."""
    words = [REWINDS, "checkpoint.keep=1"]
    whole, _ = course(tmp_path / "whole", [28], words)
    first, _ = course(tmp_path / "parted", [28], words, stop_after=26)
    assert steps_kept(tmp_path / "parted") == [25, 27] and first[-1].step == 27
    second, _ = course(tmp_path / "parted", [28], words, stop_after=28)
    assert steps_kept(tmp_path / "parted") == [25, 26] and [row.step for row in second] == [28, 26]
    rest, skipped = course(tmp_path / "parted", [28], words)
    assert numbers(first + second + rest) == numbers(whole) and skipped == 3
    assert [row.step for row in first + second + rest] == [row.step for row in whole]


def test_a_branch_that_was_stopped_goes_back_to_where_it_began(tmp_path: Path) -> None:
    words = [REWINDS, "checkpoint.keep=0", "checkpoint.every=25", "train.steps=30"]
    course(tmp_path / "first", [], words)
    (beginning, _) = complete_steps(tmp_path / "first" / "checkpoints")
    words.append(f"checkpoint.resume={beginning}")
    whole, _ = course(tmp_path / "whole", [28], words)
    first, _ = course(tmp_path / "parted", [28], words, stop_after=26)
    rest, skipped = course(tmp_path / "parted", [28], words)
    assert [row.step for row in first + rest] == [26, 27, 28, 26, 27, 28, 29, 30] and skipped == 3
    assert numbers(first + rest) == numbers(whole)


def test_without_the_checkpoint_to_go_back_to_it_goes_back_to_where_it_was_started_again(tmp_path: Path) -> None:
    words = [REWINDS, "checkpoint.keep=0"]
    course(tmp_path, [28], words, stop_after=26)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000025")
    rest, skipped = course(tmp_path, [28], words)
    assert [row.step for row in rest[:2]] == [28, 28] and skipped == 1


def steps_kept(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in complete_steps(folder / "checkpoints")]


@pytest.mark.parametrize(
    "words", [["parallel.dp=2", "parallel.zero=1"], ["parallel.pp=2"], ["parallel.zero=3"]], ids=str
)
def test_two_processes_rewind_together(tmp_path: Path, words: list[str]) -> None:
    one, _ = course(tmp_path / "one", [28], [REWINDS, "precision=fp64"])
    ranks = run_ranks(2, course, tmp_path / "two", [28], [REWINDS, "precision=fp64", *words])
    for rows, skipped in ranks:
        assert skipped == 3 and [row.step for row in rows] == [row.step for row in one]
        torch.testing.assert_close(numbers(rows), numbers(one), rtol=1e-9, atol=0)


def test_the_limit_of_rewinds(tmp_path: Path) -> None:
    rows, skipped = course(tmp_path, [28, 33, 40], [REWINDS, "train.steps=38"])
    assert skipped == 3 + 5 and rows[-1].rewinds == 2  # batch 33 is step 30's, right behind its checkpoint's turn
    assert [(event["at"], event["step"]) for event in events(tmp_path, "rewind")] == [(28, 25), (30, 25)]
    assert [event["rewinds"] for event in events(tmp_path, "spike")] == [True, True, False]


def test_without_a_checkpoint_it_goes_on(tmp_path: Path) -> None:
    rows, skipped = course(tmp_path, [28], [REWINDS, "checkpoint.every=30"])
    assert [row.step for row in rows] == list(range(1, 37)) and skipped == 0 and rows[27].spike


def test_too_little_data_is_said(tmp_path: Path) -> None:
    course(tmp_path, [28], [REWINDS, "train.steps=30"])
    with pytest.raises(UserError, match=r"train\.spike_rewinds: None leaves too little data .* set 2"):
        course(tmp_path, [28], ["train.steps=36"])


@pytest.mark.parametrize("world", [1, 2])
def test_killed_after_a_rewind_it_does_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Once before a checkpoint of the new course, once behind one."""
    monkeypatch.setattr(GptSamples, "batch", poisoned([28]))
    monkeypatch.setattr(spikes, "FACTOR", FACTOR)
    words = (*JOB, REWINDS, "train.final_eval=false")
    Job(tmp_path / "whole", world, *words).finish()
    expected_rows, expected = outcome(tmp_path / "whole")
    assert [row["step"] for row in expected_rows] == list(range(1, 37)) and expected_rows[-1]["rewinds"] == 1
    folder = tmp_path / "killed"
    for sign in ('"kind": "rewind"', "step_00000030"):
        job = Job(folder, world, *words)
        while job.ranks[0].is_alive() and not _said(folder, sign):
            job.ranks[0].join(0.01)
        assert job.kill(0.0, 0), "not before its end"
    Job(folder, world, *words).finish()
    rows, tensors = outcome(folder)
    assert rows == expected_rows
    assert [name for name, value in expected.items() if not torch.equal(tensors[name], value)] == []


def _said(folder: Path, sign: str) -> bool:
    path = folder / "events.jsonl"
    return path.exists() and sign in path.read_text()
