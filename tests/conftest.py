"""Fixtures that every kind of test may use."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from megalite.cli import main

# The same examples every time, and no limit on seconds: a busy machine must not fail a test.
settings.register_profile("house", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


class Answer(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


@pytest.fixture
def megalite(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command line in this process: `megalite("train", "train.steps=x")`."""

    def run(*words: str) -> Answer:
        capsys.readouterr()
        code = main(words)
        return Answer(code, *capsys.readouterr())

    return run
