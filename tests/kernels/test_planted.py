"""Planted kernel bugs: each is switched on alone, and the level of evidence named beside it must see it."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
from megalite_kernels.gpu.chips import CHIPS
from megalite_kernels.gpu.sanitize import OutOfBounds
from megalite_kernels.validate import snapshot
from megalite_kernels.validate.cases import CASES, FAR, SWEEPS
from megalite_kernels.validate.faults import FAULTS, Fault
from megalite_kernels.validate.levels import exactness, reaches, safety
from triton.runtime.jit import JITFunction

from tests.kernels.support import in_a_fork

OPS_BEGIN = "@custom_op("
"""Where a file's operators begin: they are registered already, and what is planted lies before."""


def _mutant(fault: Fault, folder: Path) -> ModuleType:
    """The file up to its operators, with the fault, as a module of its own."""
    original = importlib.import_module(f"megalite_kernels.gpu.{fault.file}")
    assert original.__file__ is not None
    text = Path(original.__file__).read_text().partition(OPS_BEGIN)[0]
    assert "register_" not in text, "a fault would stay in the operators of this process"
    assert fault.old in text, f"{fault.name}: the text to replace is no longer in gpu/{fault.file}.py"
    path = folder / f"{fault.file}_planted.py"
    path.write_text(text.replace(fault.old, fault.new, 1))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def planted(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fault]:
    """The fault's kernels and functions in place of the right ones, wherever they are known by name."""
    fault: Fault = request.param
    original = importlib.import_module(f"megalite_kernels.gpu.{fault.file}")
    wrong = _mutant(fault, tmp_path)
    homes = [module for name, module in sys.modules.items() if name.startswith("megalite_kernels.gpu.")]
    homes.append(wrong)
    for name, value in vars(original).items():
        ours = getattr(value, "__module__", None) == original.__name__
        if ours and (isinstance(value, JITFunction) or callable(value)) and hasattr(wrong, name):
            for home in homes:
                if getattr(home, name, None) is value:
                    monkeypatch.setattr(home, name, getattr(wrong, name))
    yield fault


def _seen(fault: Fault) -> str:
    """What the level says of the planted fault; empty when it sees nothing."""
    cases = [case for case in CASES if case.op == fault.op and fault.case in case.name]
    if fault.level == "E3 far":
        try:
            in_a_fork(reaches, next(far for far in FAR if far.op == fault.op))
        except OutOfBounds as error:
            return str(error)
        return ""
    if fault.level == "E4":
        chip = CHIPS["sm_80"]
        sweep = next(sweep for sweep in SWEEPS if sweep.op == fault.op and fault.case in sweep.name)
        made = [snapshot.compile_for(launch, chip) for launch in snapshot.launches(sweep, chip)]
        return "; ".join(said for one in made for said in one.faults(chip))
    for case in cases:
        if fault.level == "E1":
            found = exactness(case, case.dtypes[0])
            if not found.right:
                return f"{case}: {found.worst:.0f} times the error that is allowed"
            continue
        try:
            safe = safety(case)
        except OutOfBounds as error:
            return str(error)
        moved = (safe.seen.loaded, safe.seen.stored, safe.seen.flops)
        formula = case.traffic and (case.traffic.loaded, case.traffic.stored, case.traffic.flops)
        if fault.level == "E3" and not safe.right:
            return str(safe)
        if fault.level == "E5" and formula and moved != formula:
            return f"{case}: moves {moved}, not {formula}"
    return ""


@pytest.mark.parametrize("planted", FAULTS, ids=lambda fault: fault.name, indirect=True)
def test_caught(planted: Fault) -> None:
    assert _seen(planted), f"{planted.level} does not see: {planted.name}"
