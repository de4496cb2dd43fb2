"""Fixtures that every kind of test may use."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings

from megalite.cli import main

# The same examples every time, and no limit on seconds: a busy machine must not fail a test.
settings.register_profile("house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their size: compressed ones may hold the time, and all workers must collect the same names."""
    return f"{argname}{len(val)}" if isinstance(val, bytes) else None


class Answer(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def torch_as_started() -> Iterator[None]:
    """What a test or a training sets for its process is gone before the next test of this worker."""
    yield
    filling: Any = torch.utils.deterministic
    torch.use_deterministic_algorithms(False)
    filling.fill_uninitialized_memory = True
    torch.set_default_dtype(torch.float32)
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture
def megalite(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command line in this process: `megalite("train", "train.steps=x")`."""

    def run(*words: str) -> Answer:
        capsys.readouterr()
        code = main(words)
        return Answer(code, *capsys.readouterr())

    return run
