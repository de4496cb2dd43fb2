"""Resumed: kill -9 at any instant, start again, and metrics and weights are bit for bit those of the unbroken run."""

import json
import multiprocessing
import os
import random
import socket
import time
from pathlib import Path

import pytest
import torch

from megalite import Trainer, load_config
from megalite.checkpoint.dcp import load_tensors, read_metadata
from megalite.checkpoint.store import complete_steps
from megalite.parallel.boxes import Held
from megalite.world import leave
from tests.tiny_job import tiny_job

CONTEXT = multiprocessing.get_context("fork")
STEPS = 24
TIMING = ("tokens_per_s", "model_tflops", "mfu", "memory_gb", "step_s", "data_s")
JOB = (
    f"train.steps={STEPS}",
    "train.micro_batch=2",
    "train.eval_every=7",
    "train.eval_batches=2",
    "train.z_loss=1e-4",
    "optim.warmup_steps=5",
    "checkpoint.every=3",
)


def run_rank(rank: int, world: int, port: int, words: list[str]) -> None:
    """One rank of a run, as torchrun would start it."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    Trainer(load_config(*words, world_size=world)).fit()
    leave()


class Job:
    """The processes of one attempt; forked from a parent that has torch imported, so that a start costs little."""

    def __init__(self, run_dir: Path, world: int, *words: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = tiny_job(*JOB, f"run.dir={run_dir}", *words)
        self.ranks = [CONTEXT.Process(target=run_rank, args=(r, world, port, arguments)) for r in range(world)]
        for process in self.ranks:
            process.start()

    def kill(self, after: float, victim: int) -> bool:
        """SIGKILL one rank `after` seconds, then the rest as torchrun would; False: the run had already finished."""
        self.ranks[victim].join(after)
        finished = all(process.exitcode == 0 for process in self.ranks)
        for process in (self.ranks[victim], *self.ranks):
            process.kill()
        for process in self.ranks:
            process.join()
        return not finished

    def finish(self) -> None:
        for process in self.ranks:
            process.join(120)
            assert process.exitcode == 0, f"exit code {process.exitcode}"


def outcome(run_dir: Path) -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
    """What must not depend on kills: every metrics row without its timing, and every tensor of the last checkpoint."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in TIMING:
            del row[name]
    last = complete_steps(run_dir / "checkpoints")[-1]
    entries = read_metadata(last).state_dict_metadata
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load_tensors(last, {name: Held.whole(tensor) for name, tensor in tensors.items()})
    return rows, tensors


@pytest.mark.timeout(900)  # every kill is a start of the program
@pytest.mark.parametrize("world", [1, 2])
def test_twenty_kills_change_no_bit(tmp_path: Path, world: int) -> None:
    Job(tmp_path / "unbroken", world).finish()
    started = time.monotonic()
    Job(tmp_path / "again", world).finish()
    whole = time.monotonic() - started
    expected_rows, expected = outcome(tmp_path / "unbroken")
    assert [row["step"] for row in expected_rows] == list(range(1, STEPS + 1))

    chance = random.Random(world)
    kills, attempt = 0, 0
    while kills < 20:
        run_dir, broken = tmp_path / f"killed{attempt}", True
        while broken and kills < 20:
            broken = Job(run_dir, world).kill(chance.uniform(0.0, whole), chance.randrange(world))
            kills += broken
        Job(run_dir, world).finish()
        rows, tensors = outcome(run_dir)
        assert rows == expected_rows
        assert tensors.keys() == expected.keys()
        different = [name for name, value in expected.items() if not torch.equal(tensors[name], value)]
        assert not different, f"after {kills} kills these differ: {different[:5]}"
        attempt += 1


EXPERTS = ("model.moe.experts=4", "model.moe.bias_rate=0.01", "model.moe.aux_loss=0.1", "model.moe.aux_scope=global")


@pytest.mark.parametrize(("model", "layout"), [((), ()), (EXPERTS, ("parallel.ep=2",))], ids=["dense", "experts"])
def test_resume_at_another_world_size_sees_the_same_samples(
    model: tuple[str, ...], layout: tuple[str, ...], tmp_path: Path
) -> None:
    """Stop at step 12 on one process, go on with two: losses equal to summation order (fp64). Expert biases and the
    last load, which no gradient moves, go on too."""
    words = ("precision=fp64", *model)
    Job(tmp_path / "one", 1, *words).finish()
    Job(tmp_path / "two", 1, *words, "checkpoint.keep=0").finish()
    folder = tmp_path / "two" / "checkpoints"
    for step in complete_steps(folder)[4:]:
        step.rename(tmp_path / step.name)
    Job(tmp_path / "two", 2, *words, *layout).finish()
    rows, expected_tensors = outcome(tmp_path / "one")
    resumed, tensors = outcome(tmp_path / "two")
    for name, tensor in expected_tensors.items():
        if name.endswith(("expert_bias", "last_load")):
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-12)
            assert tensor.any(), name
    assert [row["step"] for row in resumed] == [row["step"] for row in rows]
    for name in ("loss", "grad_norm"):
        expected = [row[name] for row in rows]
        torch.testing.assert_close([row[name] for row in resumed], expected, rtol=1e-9, atol=0)
