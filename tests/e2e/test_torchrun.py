"""Two processes under torchrun or our own start: the losses of one process. And a killed rank restarts by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.tiny_job import tiny_job


def start(run_dir: Path, *words: str, torchrun: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", *torchrun] if torchrun else []
    command = [sys.executable, *launcher, "-m", "megalite", "train", *tiny_job(f"run.dir={run_dir}", *words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True)


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_print_the_losses_of_one(tmp_path: Path) -> None:
    words = ("precision=fp64", "log.progress=lines")
    alone = start(tmp_path / "one", *words)
    assert alone.wait(120) == 0, alone.stdout.read() if alone.stdout else ""
    pair = start(tmp_path / "two", *words, torchrun=("--nproc-per-node", "2"))
    for run, job in (("two", pair), ("local", start(tmp_path / "local", "--nproc-per-node=2", *words))):
        output, _ = job.communicate(timeout=120)
        assert job.returncode == 0, output
        assert "dp 2" in output and output.count("step 4/4") == 1, "one rank speaks"
        for name in ("loss", "grad_norm"):
            expected = [row[name] for row in rows(tmp_path / "one")]
            torch.testing.assert_close([row[name] for row in rows(tmp_path / run)], expected, rtol=1e-11, atol=0)


def workers_of(launcher: int) -> list[int]:
    """Process ids of torchrun's ranks."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def test_a_killed_rank_restarts_the_job_from_its_checkpoint(tmp_path: Path) -> None:
    words = ("train.steps=400", "checkpoint.every=10", "precision=fp32")
    job = start(tmp_path, *words, torchrun=("--nproc-per-node", "2", "--max-restarts", "1"))
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "checkpoints").glob("step_000000[1-9]0")) and time.monotonic() < deadline:
            job.poll()
            assert job.returncode is None, "ended before a checkpoint"
            time.sleep(0.05)  # the outside view has no event to wait for
        os.kill(workers_of(job.pid)[-1], signal.SIGKILL)
        output, _ = job.communicate(timeout=200)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, output
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 401)), "no step twice, none missing"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events].count("resume") == 1
