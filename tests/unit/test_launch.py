"""The launch scripts: valid shell, and the command they would run. And the ranks that the command starts itself."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def shown(tmp_path: Path) -> dict[str, str]:
    """An environment in which torchrun prints its words instead of running."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_local(shown: dict[str, str]) -> None:
    command = [LAUNCH / "local.sh", "experiment=quickstart"]
    out = subprocess.run(command, env={**shown, "NPROC": "3"}, capture_output=True, text=True, check=True).stdout
    assert out.split() == "--standalone --nproc-per-node 3 -m megalite train experiment=quickstart".split()


def test_multinode(shown: dict[str, str]) -> None:
    command = [LAUNCH / "multinode.sh", "model=tiny"]
    refused = subprocess.run(command, env=shown, capture_output=True, text=True)
    assert refused.returncode != 0 and "number of nodes" in refused.stderr
    told = {**shown, "NODES": "2", "HEAD": "a:1", "JOB": "j"}
    out = subprocess.run(command, env=told, capture_output=True, text=True, check=True).stdout
    assert "--nnodes 2" in out and "--rdzv-endpoint a:1" in out and out.endswith("-m megalite train model=tiny\n")


def ranks(script: str, count: int, grace_s: float = 60) -> "subprocess.Popen[str]":
    """A process that runs `script`, in which `rank` is known, as every rank of a world; one pipe for all they print."""
    body = f"import json, os, signal, sys\nrank = int(os.environ.get('RANK', -1))\n{script}"
    start = f"""
import sys
from megalite.cli.train import run_ranks
assert "torch" not in sys.modules and "hydra" not in sys.modules
sys.exit(run_ranks([sys.executable, "-c", sys.argv[1]], {count}, {grace_s}))"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", start, body], **pipes, text=True)


WAITING = "os.write(1, b'ready\\n')\nsignal.pause()"
PATIENT = f"signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'asked\\n'), sys.exit(0)))\n{WAITING}"


def test_ranks_know_who_they_are() -> None:
    names = "['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT']"
    told = f"os.write(1, json.dumps({{name: os.environ.get(name) for name in {names}}}).encode() + b'\\n')"
    out, _ = ranks(told, 3).communicate()
    found = sorted((json.loads(line) for line in out.splitlines()), key=lambda told: told["RANK"])
    assert [(told["RANK"], told["LOCAL_RANK"]) for told in found] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert {(told["WORLD_SIZE"], told["LOCAL_WORLD_SIZE"], told["MASTER_ADDR"]) for told in found} == {
        ("3", "3", "127.0.0.1")
    }
    assert len({told["MASTER_PORT"] for told in found}) == 1
    out, _ = ranks(told, 1).communicate()
    assert set(json.loads(out).values()) == {None}, "one rank is a plain process"


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(7 if rank == 1 else 0)", 7, ""),
        (f"if rank == 1: sys.exit(7)\n{PATIENT}", 7, ""),
        (f"if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n{PATIENT}", 137, "rank 1 was killed by SIGKILL"),
    ],
    ids=["all end", "one fails", "one fails and others go on", "one is killed"],
)
def test_the_first_failure_ends_all_and_is_the_exit_code(end: str, code: int, said: str) -> None:
    job = ranks(end, 3)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, said in err) == (code, True)
    assert bool(err) == bool(said), "what a rank has said itself is not repeated"


def test_a_rank_that_will_not_end_is_killed() -> None:
    deaf = f"if rank == 1: sys.exit(3)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{WAITING}"
    job = ranks(deaf, 2, grace_s=0.1)
    job.communicate(timeout=60)
    assert job.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_go_on_to_every_rank(number: signal.Signals) -> None:
    job = ranks(f"signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))\n{PATIENT}", 2)
    assert job.stdout is not None
    assert [job.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    job.send_signal(number)
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, out.splitlines()) == (0, ["asked", "asked"])


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_ranks_do_not_outlive_a_killed_launcher() -> None:
    job = ranks(PATIENT, 2)
    assert job.stdout is not None
    for _ in range(2):
        job.stdout.readline()
    job.kill()
    assert job.stdout.read().splitlines() == ["asked", "asked"], "the pipe ends when no rank holds it"
    job.wait()
