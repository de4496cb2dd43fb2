"""The launch scripts: valid shell, and the command they would run."""

import os
import subprocess
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
