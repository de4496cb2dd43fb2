"""`megalite schedule`: what it prints and writes, the lines of bad input, and that it needs no torch."""

import json
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import pytest

from megalite.cli import main
from megalite.pipeline.schedule import NAMES, default_chunks, lower, make_schedule
from megalite.pipeline.schedule.measure import measure
from megalite.pipeline.schedule.text import load_csv


def test_prints_both_bubbles_and_the_memory_of_each_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "name=zbv", "pp=4", "microbatches=8"]) == 0
    text = capsys.readouterr().out
    assert "makespan 25.5, of work 24" in text
    assert "bubble 6.25% of the work (Narayanan et al. 2021), 5.88% of the makespan (Qi et al. 2024)" in text
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    assert rows == [[str(rank), f"{rank},{7 - rank}", "4", "4"] for rank in range(4)]
    assert "no deadlock even if each of 96 sends blocks" in text  # 2 directions, 8 microbatches, 6 crossings


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_by_name_with_times_and_transfer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", name, "pp=3", "microbatches=7", "F=0.9", "I=1.3", "W=0.4", "transfer=0.05"]) == 0
    stages = "2 stages" if default_chunks(name) == 2 else "1 stage"
    assert f"{name}: 3 ranks, {stages} a rank, 7 microbatches" in capsys.readouterr().out


def boxes(path: Path) -> list[str]:
    return [node.text or "" for node in ET.parse(path).iter("{http://www.w3.org/2000/svg}title")]


def test_svg_shows_every_op_once_at_its_time(tmp_path: Path) -> None:
    path = tmp_path / "picture.svg"
    assert main(["schedule", "dualpipev", "pp=2", "microbatches=4", f"out={path}"]) == 0
    found = boxes(path)
    schedule = make_schedule("dualpipev", 2, 2, 4)
    assert len(found) == sum(map(len, schedule.rows)) == len(set(found))
    assert "0F0: stage 0, microbatch 0, 0 to 0.5" in found
    last = max(float(title.rsplit(" ", 1)[1]) for title in found)
    assert last == measure(schedule).makespan


def test_png_has_the_colours_of_the_ops_where_they_run(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    assert main(["schedule", "1f1b", "pp=2", "microbatches=2", f"out={path}"]) == 0
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size]) == (zlib.crc32(body),)
        chunks[body[:4]] = body[4:]
        at += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 2)
    pixels = zlib.decompress(chunks[b"IDAT"])
    assert len(pixels) == height * (3 * width + 1)

    def at_time(rank: int, time: float) -> tuple[int, ...]:
        """The colour near the upper edge of the rank's lane at a time; the makespan is 9."""
        x, y = round((64 + (1280 - 64 - 84) * time / 9) * 2), (64 + rank * 32 + 2) * 2
        start = y * (3 * width + 1) + 1 + 3 * x
        return tuple(pixels[start : start + 3])

    forward, backward, idle = (66, 114, 178), (68, 148, 92), (232, 234, 238)
    assert [at_time(0, time) for time in (0.5, 1.5, 2.5, 4.5, 6.5, 8.5)] == [
        forward, forward, idle, backward, idle, backward,
    ]  # fmt: skip
    assert [at_time(1, time) for time in (0.5, 1.5, 2.5, 4.5, 6.5, 8.5)] == [
        idle, forward, backward, forward, backward, idle,
    ]  # fmt: skip


def test_chrome_trace_and_csv(tmp_path: Path) -> None:
    trace, rows, lowered = tmp_path / "t.json", tmp_path / "rows.csv", tmp_path / "lowered.csv"
    for path, more in ((trace, []), (rows, []), (lowered, ["lowered=true"])):
        assert main(["schedule", "zb_h1", "pp=3", "microbatches=4", f"out={path}", *more]) == 0
    schedule = make_schedule("zb_h1", 3, 1, 4)
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert sorted(event["name"] for event in events) == sorted(str(op) for row in schedule.rows for op in row)
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(1000 * measure(schedule).makespan)
    assert load_csv(rows).rows == schedule.rows
    assert load_csv(lowered).rows == lower(schedule).rows
    assert main(["schedule", f"file={lowered}"]) == 0
    assert main(["schedule", str(rows), "pp=3"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lowered.csv", "rows.csv", "t.json"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["zbw"], "name=zbw: unknown; nearest: zbv"),
        (["zbv", "chunks=3"], "chunks=3: zbv has 2 stages a rank; set 2, or name=interleaved"),
        (["1f1b", "pp=0"], "pp=0: at least 1"),
        (["1f1b", "F=0"], "F=0: a time; above 0"),
        (["1f1b", "I=nan"], "I=nan"),
        (["1f1b", "limit=3"], "limit=3: 1f1b has none; only zb_auto"),
        (["interleaved", "pp=4", "microbatches=6", "group=4"], "group=4: leaves a group of 2 of 6"),
        (["1f1b", "out=x.gif"], "out=x.gif: unknown kind of file; end it in .svg, .png, .json, .csv"),
        (["1f1b", "out=nowhere/x.svg"], "nowhere/x.svg"),
        (["none.csv"], "none.csv: no such file"),
        (["1f1b", "microbatch=3"], "microbatch: unknown key; nearest: microbatches"),
    ],
)
def test_bad_input_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert any(each.startswith("megalite schedule: ") and line in each for each in printed.err.splitlines()), printed


def test_a_file_and_sizes_that_it_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0B0\n1F0,1B0\n")
    assert main(["schedule", str(path), "pp=4"]) == 2
    assert f"pp=4: {path} is written for 2; leave it out" in capsys.readouterr().err


def test_answers_without_torch() -> None:
    code = "import sys; from megalite.cli import main; main(['schedule', 'zbv']); assert not {'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_the_documentation_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs/schedules.md").read_text()
    monkeypatch.chdir(tmp_path)

    def printed(*words: str) -> str:
        assert main(["schedule", *words]) == 0
        return capsys.readouterr().out

    command = next(line for line in text.splitlines() if line.startswith("`megalite schedule zbv")).split("`")[1]
    shown, example = text.split("```")[1].strip(), text.split("```")[3].strip()
    assert shown == printed(*command.split()[2:]).strip()
    rows = {line.split("`")[1]: line.rsplit("|", 2)[1].strip() for line in text.splitlines() if line.startswith("| `")}
    assert rows.keys() - {"parallel.schedule"} == set(NAMES)
    for name in NAMES:
        answer = printed(name, "pp=4", "microbatches=8")
        bubble = next(line.split()[1] for line in answer.splitlines() if line.startswith("bubble"))
        peak = max(float(line.split()[-1]) for line in answer.splitlines() if line[:1].isdigit() and line[1] == " ")
        assert rows[name] == f"{bubble}, {peak:g}"
    Path("mine.csv").write_text(example)
    assert "mine.csv: 2 ranks, 1 stage a rank, 3 microbatches" in printed("mine.csv")
