"""One tiny run from the command line, then everything a person does with its folder: look, report, generate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.cli import main

SECRET = "hunter2-must-not-be-kept"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run folder, what was printed) of eight steps."""
    folder = tmp_path_factory.mktemp("look")
    words = [
        "data.tokenizer=bytes", "data.max_bytes=100000", "data.split=0.99,0.01", f"data.cache={folder / 'cache'}",
        f"run.dir={folder / 'run'}", "model.layers=1", "model.hidden=32", "model.heads=2", "model.ffn=64",
        "data.sequence_length=64", "train.micro_batch=2", "train.global_batch=4", "train.steps=8", "log.every=2",
        "train.eval_every=4", "train.eval_batches=2", "train.final_eval=false", "train.threads=1",
        "log.sample=def ", "log.baselines=true", "log.tensorboard=true", "checkpoint.every=4", "train.profile_step=3",
    ]  # fmt: skip
    command = [sys.executable, "-m", "megalite", "train", *words]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "MY_API_KEY": SECRET, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_what_is_printed(run: tuple[Path, str]) -> None:
    folder, printed = run
    lines = printed.splitlines()
    assert "\x1b" not in printed
    assert lines[0].startswith("model ")
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["2/8", "4/8", "6/8", "8/8"]
    assert "validation loss" in printed
    assert "Kneser-Ney 5-gram" in printed
    assert lines[-1] == f"report: {folder / 'report.html'}"


def test_what_is_kept(run: tuple[Path, str]) -> None:
    folder, _ = run
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "environment.json", "metrics.jsonl", "events.jsonl", "report.html", "sample.txt",
        "baselines.json", "tokenizer.json", "timeline.json", "tensorboard", "checkpoints",
    }  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(row["tokens"] == row["step"] * 4 * 64 for row in rows)
    assert rows[1]["val_bits_per_byte"] > 0
    kinds = [json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()]
    assert kinds.count("save") == kinds.count("evaluation") == 2
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert SECRET.encode() not in kept


def test_report_verb(run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    assert "<svg" in (folder / "report.html").read_text()
    assert main(["report", str(folder / "absent")]) == 2


def test_generate_verb(run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run

    def text(*words: str) -> str:
        assert main(["generate", *words, "prompt=def ", "max_tokens=20"]) == 0
        return capsys.readouterr().out

    checkpoint = sorted((folder / "checkpoints").iterdir())[-1]
    first = text(f"checkpoint={folder}", "seed=3")
    assert first.startswith("def ")
    assert first == text(str(checkpoint), "seed=3")
    assert text(f"checkpoint={folder}", "temperature=0") == text(f"checkpoint={folder}", "temperature=0", "seed=9")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "checkpoint: is needed"),
        (["checkpoint=nowhere"], "checkpoint: nowhere is no folder"),
        (["{run}", "top_p=0"], "top_p=0: must lie above 0"),
        (["{run}", "temprature=1"], "nearest: temperature"),
        (["{run}", "temperature=-1"], "temperature"),
        (["{run}", "tokenizer=absent.json"], "absent.json"),
        (["{run}/.."], "no model"),
    ],
)
def test_generate_mistakes(
    run: tuple[Path, str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *(word.format(run=run[0]) for word in words)]) == 2
    assert message in capsys.readouterr().err
