"""Progress is silent at first, plain when piped, drawn on a terminal, and never coloured under NO_COLOR."""

import io

import pytest

from megalite.progress import Progress, duration, quantity


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def work(stream: io.StringIO, delay: float, interval: float = 0.0, **options: bool) -> str:
    with Progress("tokenizing", total=4e6, unit="B", stream=stream, delay=delay, interval=interval, **options) as bar:
        for _ in range(4):
            bar.advance(1e6)
    return stream.getvalue()


def test_nothing_in_the_first_two_seconds() -> None:
    assert work(Terminal(), delay=2.0) == work(io.StringIO(), delay=2.0) == ""


def test_plain_lines_when_piped() -> None:
    text = work(io.StringIO(), delay=0.0)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert "\r" not in text
    assert lines[0].startswith("tokenizing: 1.00 MB of 4.00 MB (25%), ")
    assert lines[0].endswith(" left")
    assert lines[-1].startswith("tokenizing: 4.00 MB in 0:0")


def test_a_line_only_every_interval() -> None:
    assert len(work(io.StringIO(), delay=0.0, interval=60.0).splitlines()) == 2


def test_a_bar_on_a_terminal() -> None:
    text = work(Terminal(), delay=0.0)
    assert "━" in text
    assert "100%" in text


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[38" in work(Terminal(), delay=0.0)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[38" not in work(Terminal(), delay=0.0)


def test_dumb_terminals_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in work(Terminal(), delay=0.0)


def test_other_ranks_are_silent() -> None:
    assert work(io.StringIO(), delay=0.0, show=False) == ""


def test_without_total_and_after_an_error() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress("reading [x]", unit="rows", stream=stream, delay=0.0) as bar:
        bar.advance(3)
        raise RuntimeError
    assert stream.getvalue().startswith("reading [x]: 3 rows, ")
    assert len(stream.getvalue().splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0, "", "0"), (7, "", "7"), (820, "", "820"), (2125, "", "2.12k"), (18.9e6, "", "18.9M"), (405e9, "", "405B"),
     (999.96e6, "", "1.00B"), (11.44e6, "B", "11.4 MB"), (512, "B", "512 B"), (83.2e9, "B", "83.2 GB"),
     (3, "rows", "3 rows"), (0.5, "", "0.50")],
)  # fmt: skip
def test_quantity(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01"), (200000, "2d 07h"),
     (float("inf"), "?"), (float("nan"), "?"), (-3, "0:00")],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
