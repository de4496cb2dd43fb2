"""`megalite doctor` as a user runs it, and each thing it can find wrong."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalite.cli import main
from megalite.train import doctor
from megalite.train.doctor import Check
from megalite.train.selftest import run_selftest

COMMAND = [sys.executable, "-m", "megalite", "doctor"]


def test_json(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "--json"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    names = {check["name"] for check in report["checks"]}
    assert names >= {
        "python",
        "torch",
        "cpu",
        "compiler",
        "cache",
        "compile locks",
        "wandb",
        "matmul peak",
        "two processes",
    }
    assert {check["state"] for check in report["checks"]} <= {"ok", "note", "warn"}


def test_lines_and_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("torch", "ok", "2.13.0"), Check("triton", "note", "not [installed]", "pip install triton")]
    monkeypatch.setattr("megalite.cli.doctor.run_checks", lambda: iter(checks))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "ok    torch          2.13.0" in out
    assert "not [installed]\n" in out
    assert "-> pip install triton" in out
    assert out.endswith("ready to train\n")
    assert "\x1b" not in out
    checks.append(Check("cache", "fail", "read-only", "set data.cache"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("not ready: cache\n")
    assert main(["doctor", "--jsno"]) == 2
    assert "--json" in capsys.readouterr().err


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.1.0+cpu", "numpy": None, "rich": "13rc1"}
    monkeypatch.setattr(doctor, "installed", lambda name: versions.get(name, "999.0"))
    found = {check.name: check for check in doctor.packages()}
    assert found["torch"].state == found["numpy"].state == "fail"
    assert "older than 2.13" in found["torch"].text
    assert "pip install 'numpy>=1.26'" in found["numpy"].cure
    assert found["tokenizers"].state == "ok"


def test_optional_packages_say_what_they_enable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    found = {check.name: check for check in doctor.optional_packages()}
    assert found["wandb"] == Check("wandb", "note", "not installed; it enables: log.wandb", "pip install wandb")


def test_stale_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert [check.state for check in doctor.jit_locks()] == ["ok"]
    old, fresh = (tmp_path / "extensions" / name / "lock" for name in ("old", "fresh"))
    held, free = (tmp_path / "inductor" / "locks" / name for name in ("held.lock", "free.lock"))
    for path in (old, fresh, held, free):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [check.state for check in doctor.jit_locks()] == ["ok"]
    for path in (old, held, free):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    with open(held) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = list(doctor.jit_locks())
    assert [(check.name, check.state) for check in found] == [("stale lock", "warn"), ("held lock", "warn")]
    assert str(old) in found[0].cure
    assert str(held) in found[1].text


def test_unwritable_cache_is_a_hard_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert [check.name for check in doctor.cache()] == ["cache", "here"]
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert [(check.name, check.state) for check in doctor.cache()] == [("cache", "fail"), ("here", "warn")]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert [check.state for check in doctor.compiler()] == ["warn"]


def test_a_broken_network_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    problem = run_selftest()
    assert problem.startswith("rank 0: ")
    assert "\n" not in problem


def test_a_hanging_rank_is_ended() -> None:
    started = time.monotonic()
    assert "no answer within 0.1 s" in run_selftest(timeout=0.1)
    assert time.monotonic() - started < 10
