"""A cache whose builder is killed is absent, and the next one to ask builds it."""

import subprocess
import sys

import pytest

from megalite.data.files import cached_folder, load_array
from megalite.errors import UserError

BUILDER = """
import sys, time
from pathlib import Path
from megalite.data.files import cached_folder
def build(folder):
    (folder / "half").write_text("x")
    print("building", flush=True)
    time.sleep(60)
cached_folder(Path(sys.argv[1]), "data.cache", build)
"""


def test_killed_builder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BUILDER, str(tmp_path / "it")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"building\n"
    assert not (tmp_path / "it").exists()
    process.kill()
    process.wait()
    cached_folder(tmp_path / "it", "data.cache", lambda folder: (folder / "whole").write_text("y") and None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "it"]
    assert [path.name for path in (tmp_path / "it").iterdir()] == ["whole"]


def test_failing_builder(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached_folder(tmp_path / "it", "data.cache", lambda folder: 1 // 0)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_damaged_array(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00 damaged")
    with pytest.raises(UserError, match=r"data\.cache"):
        load_array(tmp_path / "a.npy")
