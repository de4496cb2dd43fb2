"""The wheel alone, away from the checkout: configs, kernels and the command are inside."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs. Its dependencies are this environment's."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    for name in ("megalite", "configs", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(base), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = base.glob("megalite-*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(base / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return base / "site"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_everything_is_inside(installed: Path) -> None:
    for pattern in ("megalite/**/*.py", "configs/**/*.yaml", "kernels/megalite_kernels/**/*.[chp]*"):
        for path in ROOT.glob(pattern):
            if "__pycache__" in path.parts or path.suffix == ".so":
                continue
            inside = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT)
            inside = Path("megalite", *inside.parts) if inside.parts[0] == "configs" else inside
            assert (installed / inside).exists(), f"{inside} is missing from the wheel; see setup.py"


def test_nothing_else_is_inside(installed: Path) -> None:
    (wheel,) = installed.parent.glob("megalite-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"megalite", "megalite_kernels"}


def test_the_command_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    code = "import megalite, megalite.configs; print(megalite.__file__, megalite.configs.__file__)"
    answer = run(installed, tmp_path, "-c", code)
    assert answer.stdout.count(str(installed)) == 2, answer.stderr
    answer = run(installed, tmp_path, "-m", "megalite", "--help")
    assert (answer.returncode, answer.stderr) == (0, "")
    answer = run(installed, tmp_path, "-m", "megalite", "config", "experiment=quickstart")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "# configs/experiment/quickstart.yaml" in answer.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_console_script_answers(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "megalite"
    answer = run(installed, tmp_path, str(script), "--version")
    assert answer.stdout.startswith("megalite ")
