"""The machines that the CPU ops must serve: with a compiler and without, with bf16 hardware and without; and what is
found of the laws (E2) for docs/kernels.md."""

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from megalite_kernels import build, capability, dispatch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: kernels run there")
    parser.addoption("--laws", metavar="FILE", help="JSON of each op's laws, and whether they held")


LAWS = pytest.StashKey[dict[str, dict[str, bool]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A law holds if none of its tests failed, and one ran."""
    report = yield
    ops = [op for mark in item.iter_markers("law") for op in mark.args]
    if ops and (report.when == "call" or report.failed):
        law = getattr(item, "originalname", item.name).removeprefix("test_").replace("_", " ")
        for op in ops:
            of_op = item.config.stash.setdefault(LAWS, {}).setdefault(op, {})
            of_op[law] = of_op.get(law, True) and report.passed
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--laws", default=None)
    if file:
        Path(file).write_text(json.dumps(session.config.stash.get(LAWS, {})))


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--device cuda` (pytest tests/kernels --device cuda) whatever tests interpret runs on the GPU instead."""
    if request.config.getoption("--device", default="cpu") == "cpu":
        yield
        return
    from megalite_kernels.gpu.launch import elsewhere

    token = elsewhere.set("cuda")
    yield
    elsewhere.reset(token)


@pytest.fixture(params=["compiled", "no compiler", "bf16 hardware"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each implementation in turn; "bf16 hardware" claims an instruction set, so bf16 goes to PyTorch's product."""
    if request.param == "no compiler":
        monkeypatch.setattr(build, "COMPILERS", ())
    elif build.library().functions is None:
        pytest.skip(build.library().reason)
    hardware = "avx512_bf16" if request.param == "bf16 hardware" else None
    monkeypatch.setattr(capability, "bf16_matmul_hardware", lambda: hardware)
    _forget()
    yield request.param
    _forget()


def _forget() -> None:
    for remembered in (build.library, dispatch.this_machine, dispatch._decided):
        remembered.cache_clear()
