"""`megalite data` as a user types it, without torch."""

import subprocess
import sys

import pytest

from megalite.cli import main


@pytest.fixture
def text(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.txt").write_text(f"document {i}\n" * 50)
    return str(tmp_path / "in")


def test_build_and_inspect(text, tmp_path, capsys):
    prefix = str(tmp_path / "out" / "corpus")
    assert main(["data", "build", f"input={text}", f"output={prefix}", "vocab=300"]) == 0
    assert "3 documents" in capsys.readouterr().out
    assert main(["data", "inspect", prefix]) == 0
    said = capsys.readouterr().out
    assert "3 documents, 3 sequences" in said and "uint16" in said and "document 0" in said
    assert main(["data", "build", f"input={text}", f"output={prefix}"]) == 2
    assert "exists" in capsys.readouterr().err


def test_tokenizer(text, tmp_path, capsys):
    path = str(tmp_path / "my.tokenizer.json")
    assert main(["data", "tokenizer", f"input={text}/*.txt", f"output={path}", "vocab=270"]) == 0
    assert main(["data", "build", f"input={text}", f"output={tmp_path}/b", f"tokenizer={path}"]) == 0
    capsys.readouterr()
    assert main(["data", "inspect", f"{tmp_path}/b", f"tokenizer={path}"]) == 0
    assert "document 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bild"], "unknown action"),
        (["build", "output=x"], "input"),
        (["build", "input=/nowhere", "output=x"], "does not exist"),
        (["build", "inptu=a", "output=x"], "nearest"),
        (["build", "input={text}", "output=x", "tokenizer=/nowhere.json"], "cannot read"),
        (["build", "input={text}", "output=x", "format=csv"], "format"),
        (["build", "input={text}", "output=x", "format=jsonl"], "not JSON"),
        (["build", "input={text}", "output=x", "vocab=3"], "vocab"),
        (["inspect", "nowhere"], "nowhere.idx does not exist"),
        (["tokenizer", "input={text}", "output=x.txt"], "must end in tokenizer.json"),
    ],
)
def test_mistakes_are_lines_and_exit_code_2(text, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *(word.format(text=text) for word in words)]) == 2
    error = capsys.readouterr().err
    assert says in error and all(line.startswith("megalite data: ") for line in error.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_needs_no_torch():
    code = "import sys, megalite.cli.data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
