"""The command itself: verbs, help, errors and exit codes."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalite.cli import PROMISED, VERBS
from megalite.cli.job import parse_job
from megalite.cli.multirun import folder_name, job_words
from megalite.errors import RunError, UserError

Megalite = Callable[..., Any]


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from megalite.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'hydra', 'numpy', 'transformers', 'pyarrow', 'tokenizers'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    before = os.times()
    answer = python(code, "--help")
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 1.0, "seconds of processor time, so that a busy machine does not fail this"
    assert (answer.returncode, answer.stderr) == (0, "")
    assert all(f"  {verb} " in answer.stdout for verb in VERBS)


def test_import_is_light() -> None:
    code = (
        "import sys, megalite; megalite.load_config; assert megalite.__version__;"
        "heavy = {'torch', 'hydra', 'transformers', 'pyarrow', 'tokenizers', 'wandb', 'rich'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    assert python(code).stderr == ""


def test_what_the_package_promises_is_there() -> None:
    import megalite

    assert megalite.Trainer.__name__ == "Trainer"
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        megalite.Trainr  # noqa: B018


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, megalite: Megalite) -> None:
    answer = megalite(verb, "--help")
    assert answer.code == 0
    assert f"megalite {verb}" in answer.out


def test_unknown_and_planned_verbs(megalite: Megalite) -> None:
    assert megalite("trian") == (2, "", "megalite: trian: unknown verb; nearest: train, data, doctor\n")
    for verb in PROMISED:
        answer = megalite(verb, "x=1")
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith(f"megalite: {verb}: planned, not in this version")
    assert megalite("--version").code == 0
    assert "Usage" in megalite().out


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a: wrong", "b: too"), 2, "megalite fake: a: wrong\nmegalite fake: b: too\n"),
        (RunError("rank 3: lost"), 1, "megalite fake: rank 3: lost\n"),
        (KeyboardInterrupt(), 130, "megalite fake: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/full"), 2, "megalite fake: /full: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "megalite fake: /x: Permission denied"),
    ],
)
def test_errors_become_lines_and_codes(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, megalite: Megalite
) -> None:
    def run(arguments: list[str]) -> int:
        raise error

    monkeypatch.setitem(VERBS, "fake", ("fake_verb", "raises"))
    monkeypatch.setitem(sys.modules, "fake_verb", SimpleNamespace(run=run))  # type: ignore[arg-type]
    answer = megalite("fake")
    assert (answer.code, answer.out) == (code, "")
    assert answer.err.startswith(text)
    assert "Traceback" not in answer.err


def test_a_bug_keeps_its_traceback_and_a_user_error_shows_it_when_asked(
    monkeypatch: pytest.MonkeyPatch, megalite: Megalite
) -> None:
    def run(arguments: list[str]) -> int:
        raise ZeroDivisionError if not arguments else UserError("a: wrong")

    monkeypatch.setitem(VERBS, "fake", ("fake_verb", "raises"))
    monkeypatch.setitem(sys.modules, "fake_verb", SimpleNamespace(run=run))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        megalite("fake")
    for word in ("log.traceback=true", "log.traceback=True", "log.traceback=yes", "log.traceback='on'"):
        assert "Traceback" in megalite("fake", word).err
    for word in ("log.traceback=false", "log.traceback=maybe", "a=log.traceback=true"):
        assert "Traceback" not in megalite("fake", word).err


def test_a_configuration_file_can_ask_for_tracebacks(megalite: Megalite, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("log: {traceback: yes}\nmodel: {heads: 7}\n")
    words = ("config", "--config-dir", str(tmp_path), "--config-name", "mine")
    answer = megalite(*words)
    assert answer.code == 2
    assert "Traceback" in answer.err
    assert "Traceback" not in megalite(*words, "log.traceback=no").err
    assert "Traceback" not in megalite(*words, "train.stepz=1").err  # nothing could be composed, so nothing asked


def test_verbs_with_options_of_their_own_take_log_traceback_too(megalite: Megalite) -> None:
    answer = megalite("report", "nowhere", "log.traceback=true")
    assert "Traceback" in answer.err
    assert answer.err.splitlines()[-1].startswith("megalite report: nowhere: no such run folder")


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "megalite", "config", "experiment=quickstart"]
    answer = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_flags_of_hydra(megalite: Megalite, tmp_path: Path) -> None:
    answer = megalite("train", "--cfg", "job", "experiment=quickstart", "train.seed=5")
    assert answer.code == 0
    (tmp_path / "mine.yaml").write_text(answer.out)
    again = megalite("train", "--config-dir", str(tmp_path), "--config-name=mine", "--cfg=job")
    assert again.out == answer.out
    assert megalite("config", f"--config-dir={tmp_path}", "--config-name", "mine", "--world-size", "2").code == 0
    for words in (["--cfg", "all"], ["--config-dir", "/nope"], ["--nope"], ["--config-name"], ["--world-size", "0"]):
        answer = megalite("train", *words)
        assert (answer.code, answer.err.count("\n")) == (2, 1)


def test_config_prints_all_rules_at_once(megalite: Megalite) -> None:
    answer = megalite("config", "train.global_batch=7", "model.heads=7", "optim.beta1=1")
    assert answer.code == 2
    assert answer.err.count("\n") == 3
    assert "global_batch: 7" in answer.out


def test_multirun_gives_every_job_its_own_folder() -> None:
    job = parse_job(["-m", "experiment=quickstart", "optim.lr=1e-3,2e-3", "log.sample='a,b'"], "")
    assert job_words(job) == [
        ["experiment=quickstart", f"optim.lr={lr}", "log.sample='a,b'", f"run.dir=runs/quickstart/optim.lr={lr}"]
        for lr in ("0.001", "0.002")
    ]
    assert folder_name(["a=/x/y"]) != folder_name(["a=_x_y"])
    assert len(folder_name(["a=" + "x" * 500])) < 120
    with pytest.raises(UserError, match="expects a whole number"):
        job_words(parse_job(["-m", "train.seed=1,x"], ""))


def test_multirun_refuses_to_run_under_torchrun(monkeypatch: pytest.MonkeyPatch, megalite: Megalite) -> None:
    monkeypatch.setenv("RANK", "0")
    assert "not under torchrun" in megalite("train", "-m", "train.seed=1,2").err


def test_multirun_starts_the_jobs_one_after_another(
    monkeypatch: pytest.MonkeyPatch, megalite: Megalite, tmp_path: Path
) -> None:
    started: list[list[str]] = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(returncode=len(started) % 2)

    monkeypatch.setattr("megalite.cli.multirun.subprocess.run", run)
    assert megalite("train", "-m", "--nproc-per-node", "2", "train.seed=1,2", "run.name=s").code == 1
    assert [command[-1] for command in started] == ["run.dir=runs/s/train.seed=1", "run.dir=runs/s/train.seed=2"]
    assert started[0][started[0].index("--nproc-per-node") + 1] == "2"
