"""A run on eight ranks says what one process says: losses, norms, validation, the sample; then `megalite eval`."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from megalite import Trainer, load_config
from megalite.cli import main
from megalite.world import leave
from tests.ranks import run_ranks
from tests.tiny_job import tiny_job

JOB = (
    *("precision=fp64", "model.layers=4", "model.heads=4", "train.micro_batch=1", "train.steps=4"),
    *("train.eval_every=2", "train.eval_batches=3", "log.sample=def main(", "train.dry_run=true"),
)
LAYOUTS = {
    "tp 2 pp 2 cp 2": ("parallel.tp=2", "parallel.pp=2", "parallel.cp=2"),
    "dp 2 tp 2 sp pp 2 zbv zero 1": (
        *("parallel.dp=2", "parallel.tp=2", "parallel.sp=true", "parallel.pp=2", "parallel.zero=1"),
        *("parallel.schedule=zbv", "parallel.chunks=2"),
    ),
}
NUMBERS = ("loss", "grad_norm", "val_loss", "val_bits_per_byte")


def train(folder: str, words: tuple[str, ...], world: int) -> None:
    Trainer(load_config(*tiny_job(f"run.dir={folder}", *JOB, *words), world_size=world)).fit()
    leave()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(str(folder), (), 1)
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: row[name] for name in NUMBERS if row.get(name) is not None} for row in map(json.loads, lines)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_ranks_say_what_one_says(tmp_path: Path, alone: Path, layout: str) -> None:
    run_ranks(8, train, str(tmp_path), LAYOUTS[layout], 8)
    found, expected = rows(tmp_path), rows(alone)
    assert [len(row) for row in expected] == [2, 4, 2, 4]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-11)
    assert (tmp_path / "sample.txt").read_text() == (alone / "sample.txt").read_text() != ""


def evaluated(folder: str, *words: str) -> str:
    """What this process prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["eval", folder, "batches=3", *words]) == 0
    return printed.getvalue()


def test_a_finished_run_is_evaluated_again(alone: Path) -> None:
    """By one process, by two, on other layouts: the loss of the run's last line."""
    wanted, line = rows(alone)[-1], evaluated(str(alone))
    assert f"loss {wanted['val_loss']:.6f}" in line and f"{wanted['val_bits_per_byte']:.4f} bits" in line
    assert run_ranks(2, evaluated, str(alone)) == [line, ""]
    assert run_ranks(4, evaluated, str(alone), "parallel.tp=2", "parallel.pp=2")[0] == line
    assert run_ranks(2, evaluated, str(alone), "parallel.cp=2")[0] == line


@pytest.mark.parametrize("precision", [("precision=bf16",), ("precision=fp8_delayed", "model.moe.experts=4")], ids=str)
def test_a_run_is_evaluated_in_its_own_precision(tmp_path: Path, precision: tuple[str, ...]) -> None:
    words = [word for word in JOB if not word.startswith(("precision=", "log.sample"))]
    Trainer(load_config(*tiny_job(f"run.dir={tmp_path}", *words, *precision))).fit()
    assert f"loss {rows(tmp_path)[-1]['val_loss']:.6f}" in evaluated(str(tmp_path))


def test_a_checkpoint_is_verified(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = (alone / "checkpoints").iterdir()
    assert main(["checkpoint", "verify", str(checkpoint)]) == 0
    damaged = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    tensors = max(damaged.iterdir(), key=lambda file: file.stat().st_size)
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(damaged)]) == 2
    assert f"{tensors}: damaged" in capsys.readouterr().err
