"""Mistakes at the command line: each gives one clear line on stderr that names the key or file, and exit code 2."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

Megalite = Callable[..., Any]
SMALL = (
    *("model=tiny", "train.micro_batch=2", "train.global_batch=4", "train.steps=2", "train.final_eval=false"),
    *("data.tokenizer=bytes", "data.sequence_length=32", "data.max_bytes=20000", "train.dry_run=false"),
    *("log.report=false", "log.progress=none", "train.threads=1"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache={tmp_path_factory.mktemp('cache')}"


def assert_refused(answer: Any, *parts: str) -> None:
    assert answer.code == 2, answer.err
    assert "Traceback" not in answer.err
    assert answer.err.startswith("megalite")
    assert answer.err.count("\n") == 1, answer.err
    for part in parts:
        assert part in answer.err


CONFIGURATION = {
    "unknown verb": (["trian"], "unknown verb; nearest: train"),
    "planned verb": (["rehearse"], "planned, not in this version"),
    "no verb but a key": (["train.steps=1"], "unknown verb"),
    "unknown key": (["train", "model.hiden=8"], "nearest: model.hidden"),
    "unknown key behind a plus": (["train", "+train.stepz=8"], "nearest: train.steps"),
    "a key of another engine": (["train", "trainer.max_epochs=1"], "unknown key; nearest:"),
    "wrong type": (["train", "train.steps=many"], "train.steps=many: expects a whole number"),
    "fraction for a count": (["train", "model.layers=2.5"], "model.layers=2.5: expects a whole number"),
    "unknown choice of a group": (["train", "optim=adam"], "nearest: adamw"),
    "unknown experiment": (["train", "experiment=quikstart"], "nearest: quickstart"),
    "unknown choice of a key": (["train", "optim.schedule=cos"], "legal: cosine, wsd, linear, inverse_sqrt, constant"),
    "the same key twice": (["train", "train.seed=1", "train.seed=2"], "train.seed: given twice"),
    "an open quote": (["train", "train.steps='5"], "cannot be read"),
    "a list without multirun": (["train", "train.seed=1,2"], "--multirun"),
    "a word that is no override": (["train", "quickstart"], "expects key=value"),
    "unknown flag": (["train", "--steps", "5"], "--steps: unknown flag"),
    "flag without a value": (["train", "--config-dir"], "needs a value"),
    "missing configuration folder": (["train", "--config-dir", "nowhere"], "no such folder"),
    "missing configuration file": (["train", "--config-dir", ".", "--config-name", "mine"], "mine.yaml: no such file"),
    "batch not divisible": (["train", "train.global_batch=10"], "nearest: 8 or 12"),
    "ranks that are not there": (["train", "parallel.dp=3", "train.global_batch=12"], "this job has 1"),
    "ranks for experts that are not there": (
        ["train", "parallel.ep=2"],
        "parallel.ep=2: spreads experts, and the model has none",
    ),
    "key heads beside latents": (
        ["train", "model.mla.kv_rank=8", "model.kv_heads=3"],
        "model.kv_heads=3: model.mla gives",
    ),
    "tokens past the end": (["train", "model.mtp=512"], "model.mtp=512: looks past the end of a sequence"),
    "more ranks than processes": (["train", "parallel.tp=2"], "parallel.tp=2: pp 1 x cp 1 x tp 2 is 2 ranks a replica"),
    "heads that do not divide": (["train", "model.heads=7"], "nearest: 4, 6, 8"),
    "warm-up longer than the run": (["train", "train.steps=5", "optim.warmup_steps=9"], "at most 5"),
    "negative learning rate": (["train", "optim.lr=-1"], "optim.lr=-1.0: too small"),
    "bad split": (["train", "data.split=most"], "data.split=most"),
    "run name outside runs/": (["train", "run.name=../x"], "run.name=../x"),
    "no word for yes": (["train", "debug.numerics=maybe"], "debug.numerics=maybe: expects true or false"),
    "nowhere to rewind to": (
        ["train", "train.spike_rewinds=2"],
        "train.spike_rewinds=2: needs checkpoints to go back to",
    ),
    "fewer rewinds than none": (["train", "train.spike_rewinds=-1"], "train.spike_rewinds=-1: too small; at least 0"),
    "measured less often than never": (["train", "log.statistics=-5"], "log.statistics=-5: too small; at least 0"),
    "products of another engine": (
        ["train", "log.statistics=5", "parallel.engine=deepspeed", "parallel.zero=1"],
        "log.statistics=5: not built for parallel.engine=deepspeed",
    ),
    "modules that a compiler has melted": (
        ["train", "debug.numerics=true", "train.compile=true"],
        "debug.numerics=true: not with train.compile",
    ),
    "positions too few": (["train", "model=gpt2", "data.sequence_length=2048"], "at most 1024"),
}


@pytest.mark.parametrize("mistake", CONFIGURATION)
def test_configuration(mistake: str, megalite: Megalite, folder: Path) -> None:
    words, part = CONFIGURATION[mistake]
    assert_refused(megalite(*words), part)
    assert list(folder.iterdir()) == []


def test_several_mistakes_are_several_lines(megalite: Megalite, folder: Path) -> None:
    answer = megalite("train", "train.global_batch=10", "model.heads=7", "parallel.sp=true")
    assert (answer.code, answer.err.count("\n")) == (2, 3)


def test_a_file_with_mistakes_of_the_users(megalite: Megalite, folder: Path) -> None:
    Path("mine.yaml").write_text("train: {stepz: 5}\n")
    assert_refused(megalite("train", "--config-dir", ".", "--config-name", "mine"), "train.stepz: unknown key")
    Path("mine.yaml").write_text("train: [")
    assert_refused(megalite("train", "--config-dir", ".", "--config-name", "mine"), "mine.yaml: cannot be read")


def test_half_an_environment_of_torchrun(megalite: Megalite, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert_refused(megalite("train", *SMALL), "WORLD_SIZE")


DATA = {
    "missing dataset": (["data.path=nowhere/text", "data.tokenizer=bpe"], "data.path: nowhere/text.idx"),
    "missing dataset of a blend": (["data.blend={nowhere/a: 1}", "data.tokenizer=bpe"], "data.blend: nowhere/a.idx"),
    "missing validation set": (["data.validation={v: nowhere/v}"], "data.validation.v: nowhere/v.idx"),
    "missing tokenizer": (["data.tokenizer=nowhere.json"], "nowhere.json"),
    "vocabulary smaller than the tokenizer": (["model.vocab=100"], "model.vocab"),
    "missing checkpoint": (["checkpoint.resume=nowhere"], "nowhere"),
}


@pytest.mark.parametrize("mistake", DATA)
def test_data(mistake: str, megalite: Megalite, folder: Path, cache: str) -> None:
    words, part = DATA[mistake]
    kept = [word for word in SMALL if word.split("=")[0] not in {w.split("=")[0] for w in words}]
    assert_refused(megalite("train", *kept, cache, *words), part)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {}}', "\x00\xff"])
def test_a_file_that_is_no_tokenizer(content: str, megalite: Megalite, folder: Path, cache: str) -> None:
    Path("tokenizer.json").write_text(content)
    words = [word for word in SMALL if not word.startswith("data.tokenizer")]
    assert_refused(megalite("train", *words, cache, "data.tokenizer=tokenizer.json"), "tokenizer.json")


@pytest.mark.parametrize("index", [b"", b"MMIDIDX\x00\x00", b"PK\x03\x04 something else", os.urandom(200)])
def test_a_file_that_is_no_index(index: bytes, megalite: Megalite, folder: Path, cache: str) -> None:
    Path("text.bin").write_bytes(bytes(100))
    Path("text.idx").write_bytes(index)
    assert_refused(megalite("train", *SMALL, cache, "data.path=text"), "text.idx")


def test_a_corpus_without_documents(megalite: Megalite, folder: Path, cache: str) -> None:
    Path("empty.bin").write_bytes(b"")
    header = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([8])
    Path("empty.idx").write_bytes(header + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + bytes(8))
    assert_refused(megalite("train", *SMALL, cache, "data.path=empty"), "data.path: no tokens")


def test_a_run_folder_that_cannot_be_written(megalite: Megalite, folder: Path, cache: str) -> None:
    Path("taken").write_text("a file")
    assert_refused(megalite("train", *SMALL, cache, "run.dir=taken/run"), "run.dir", "taken/run")
    assert_refused(megalite("train", *SMALL, cache, "run.dir=taken"), "run.dir")
    assert_refused(megalite("train", *SMALL, cache, "run.dir=/proc/run"), "run.dir: cannot write to /proc/run")


def test_a_read_only_run_folder(megalite: Megalite, folder: Path, cache: str) -> None:
    Path("locked").mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere; only the file system itself can refuse
        refused = subprocess.run(["chattr", "+i", "locked"], capture_output=True, check=False).returncode
        if refused:
            pytest.skip("root, and this file system has no immutable folders")
    try:
        assert_refused(megalite("train", *SMALL, cache, "run.dir=locked/run"), "run.dir: cannot write to locked/run")
    finally:
        subprocess.run(["chattr", "-i", "locked"], capture_output=True, check=False)


def test_a_disk_too_full_for_a_checkpoint(
    megalite: Megalite, folder: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert_refused(megalite("train", *SMALL, cache), "run.dir: a checkpoint needs", "free space")


def test_a_disk_that_is_full_already(folder: Path, cache: str) -> None:
    """Writes fail for real: no file may grow beyond 1,000 bytes."""
    code = "import sys; from megalite.cli import main; sys.exit(main(sys.argv[1:]))"
    answer = subprocess.run(
        [sys.executable, "-c", code, "train", *SMALL, cache],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert_refused(SimpleNamespace(code=answer.returncode, err=answer.stderr), "run.dir: cannot write to runs/default")


@pytest.fixture
def trained(megalite: Megalite, folder: Path, cache: str) -> Path:
    answer = megalite("train", *SMALL, cache, "run.dir=run")
    assert answer.code == 0, answer.err
    return folder / "run"


def test_mistakes_with_a_trained_run(megalite: Megalite, trained: Path, cache: str) -> None:
    again = ("train", *SMALL, cache, "run.dir=run")
    assert_refused(megalite(*again, "checkpoint.resume=none"), "run.dir: run already holds a run")
    kept = tuple(word for word in again if not word.startswith(("train.global_batch", "train.steps")))
    assert_refused(megalite(*kept, "train.steps=2", "train.global_batch=8"), "train.global_batch", "4")
    assert_refused(megalite(*kept, "train.steps=1", "train.global_batch=4"), "train.steps")
    assert_refused(megalite(*again, "train.seed=7"), "train.seed")


def test_a_damaged_checkpoint(megalite: Megalite, trained: Path, cache: str) -> None:
    (checkpoint,) = (trained / "checkpoints").glob("step_*")
    shards = max(checkpoint.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)
    again = ("train", *(word for word in SMALL if word != "train.steps=2"), cache, "run.dir=run", "train.steps=3")
    assert_refused(megalite(*again), shards.name, "damaged")
    shards.write_bytes(content[:100])
    assert_refused(megalite(*again), shards.name, "damaged")
    shards.unlink()
    assert_refused(megalite(*again), shards.name, "missing")


READERS = {
    "evaluate nothing": (["eval"], "run"),
    "evaluate a missing run": (["eval", "run=nowhere"], "nowhere"),
    "generate from a missing run": (["generate", "nowhere"], "nowhere"),
    "generate with a bad temperature": (["generate", "nowhere", "temperature=-1"], "temperature=-1.0"),
    "report on a missing run": (["report", "nowhere"], "nowhere"),
    "report on an empty folder": (["report", "."], "."),
    "import a missing model": (["checkpoint", "import", "source=nowhere", "output=out"], "nowhere"),
    "export a missing checkpoint": (["checkpoint", "export", "checkpoint=nowhere", "output=out"], "nowhere"),
    "an unknown action": (["checkpoint", "exprot"], "nearest: export"),
    "an unknown option": (["eval", "rum=x"], "nearest: run"),
    "build from a missing file": (["data", "build", "input=nowhere.txt", "output=out"], "nowhere.txt"),
    "build from an empty file": (["data", "build", "input=empty.txt", "output=out"], "not one document"),
    "build from broken JSONL": (["data", "build", "input=broken.jsonl", "output=out"], "broken.jsonl"),
    "build with another field": (["data", "build", "input=rows.jsonl", "output=out"], "body"),
    "build from a broken archive": (["data", "build", "input=broken.txt.gz", "output=out"], "broken.txt.gz"),
    "build into a full disk": (["data", "build", "input=good.txt", "output=/dev/full/out"], "/dev/full"),
    "inspect a missing dataset": (["data", "inspect", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("mistake", READERS)
def test_other_verbs(mistake: str, megalite: Megalite, folder: Path) -> None:
    Path("empty.txt").write_text("")
    Path("good.txt").write_text("some text\n" * 100)
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("rows.jsonl").write_text(json.dumps({"body": "a"}) + "\n")
    Path("broken.txt.gz").write_bytes(b"\x1f\x8b" + np.random.default_rng(0).bytes(50))
    before = sorted(folder.iterdir())
    words, part = READERS[mistake]
    assert_refused(megalite(*words), part)
    assert sorted(folder.iterdir()) == before


def test_there_are_enough_of_them() -> None:
    assert len(CONFIGURATION) + len(DATA) + len(READERS) >= 45
