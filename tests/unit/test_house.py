"""The house rules that a program can check: floors, file sizes, light imports, and one spelling for each thing."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("megalite/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("kernels/**/*.[ch]")])
PYTHON = [path for path in SOURCES if path.suffix == ".py"]

SPELLINGS = {
    "world_sz": "world_size",
    "worldsize": "world_size",
    "seqlen": "sequence_length",
    "seq_len": "sequence_length",
    "seq_length": "sequence_length",
    "bsz": "micro_batch",
    "batch_sz": "micro_batch",
    "mbs": "micro_batch",
    "gbs": "global_batch",
    "micro_batch_size": "micro_batch",
    "global_batch_size": "global_batch",
    "lr_rate": "lr",
    "learning_rate": "lr",
    "num_layers": "layers",
    "n_layers": "layers",
    "hidden_size": "hidden",
    "num_heads": "heads",
    "n_heads": "heads",
    "num_kv_heads": "kv_heads",
    "ffn_size": "ffn",
    "intermediate_size": "ffn",
    "vocab_size": "vocab",
    "grad_clip": "clip",
    "clip_grad": "clip",
    "warmup": "warmup_steps",
    "max_steps": "steps",
    "num_steps": "steps",
    "ckpt": "checkpoint",
    "cfg_path": "config_dir",
    "loss_val": "loss",
    "gradnorm": "grad_norm",
    "toks": "tokens",
    "tok_per_sec": "tokens_per_s",
    "tokens_per_sec": "tokens_per_s",
    "tokens_per_second": "tokens_per_s",
}
"""Spelling -> the house's word. Strings (other projects' field names) are not looked at."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_modules_say_what_they_are_for(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), "first lines of a module say what it is for"


def identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_one_spelling_for_each_thing(path: Path) -> None:
    found = set(identifiers(ast.parse(path.read_text(encoding="utf-8")))) & SPELLINGS.keys()
    assert not found, ", ".join(f"{word} is {SPELLINGS[word]} here" for word in sorted(found))


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_no_global_statements_and_no_leftovers(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(text)))
    assert "TODO" not in text
    assert "FIXME" not in text


def test_floors_hold() -> None:
    checker = Path(sys.executable).with_name("lint-imports")
    if not checker.exists():
        pytest.skip("import-linter is not installed (extra dev)")
    answer = subprocess.run([checker, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout[-3000:]


def test_every_module_stands_on_a_floor() -> None:
    """A new top-level module has to be given its place in pyproject.toml."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = {name.strip(" ()").split(".")[0] for layer in contracts[0]["layers"] for name in layer.split(":")}
    modules = {path.stem for path in (ROOT / "megalite").glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for path in (ROOT / "megalite").glob("*/__init__.py")}
    assert modules | packages == floors
