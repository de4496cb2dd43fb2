"""report.html: well formed, fetches nothing, escapes everything, and survives whatever a run folder holds."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megalite.errors import UserError
from megalite.report.experts import experts_block
from megalite.report.run_report import summary, write_report
from megalite.report.statistics import statistics_block
from megalite.report.svg import MAX_POINTS, Series, bar_chart, line_chart, log_ticks, short, smoothed, ticks

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)> \"' & http://evil.example/x.js"
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Checks nesting; collects tags with attributes, and all visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def make_run(folder: Path, steps: int = 200) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        row = {
            "step": step, "tokens": step * 512, "loss": 2 + 6 / step, "grad_norm": 1 + 40 / step, "lr": 1e-3 / step,
            "tokens_per_s": 1000.0 + step, "mfu": 0.4, "memory_gb": 1.25, "step_s": 0.5,
        }  # fmt: skip
        if step % 50 == 0:
            row |= {"val_loss": 2.1 + 6 / step, "val_bits_per_byte": 1.0 + 5 / step}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9')
    events: list[dict[str, Any]] = [{"time": 1.8e9, "step": 3, "kind": "skip", "why": HOSTILE}]
    whole = {"kind": "evaluation", "step": steps, "name": "text", "tokens": 9000, "bits_per_byte": 1.0 + 5 / steps}
    events += [whole | {"name": "other", "tokens": 8000, "bits_per_byte": 0.5}, whole, {"kind": "end", "step": None}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.yaml").write_text(f"run:\n  name: {HOSTILE}\n")
    facts = {"model": HOSTILE, "parameters": 1234, "backends": ["a", HOSTILE], "threads": 2, "nothing": None}
    environment = {"facts": facts, "versions": {"torch": "2.13.0"}, "git_revision": "abc"}
    (folder / "environment.json").write_text(json.dumps(environment))
    measured = {"gzip": 1.9, "kneser_ney": 2.1, "order": 5, "validation_bytes": 600000, "validation": "text"}
    measured |= {"validation_tokens": 9000, "train_bytes": 64_000_000, "train_bytes_whole": 64_000_000}
    (folder / "baselines.json").write_text(json.dumps(measured))
    (folder / "sample.txt").write_text(HOSTILE)
    return folder


def test_everything_is_shown(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "quick"))
    page = Page(path.read_text())
    assert path.name == "report.html"
    assert not list(tmp_path.glob("quick/*.tmp"))
    for part in (
        "quick", "validation bits/byte", "this model", "gzip -9", "Kneser-Ney 5-gram (bytes)", "1.0250", "1.9000",
        "2.1000 bits/byte", "Loss (nats a token)", "Gradient norm before clipping (logarithmic)", "Learning rate",
        "Tokens per second", "torch", "config.yaml", "skip", HOSTILE,
    ):  # fmt: skip
        assert part in page.text, part
    assert sum(tag == "svg" for tag, _ in page.tags) == 5


def test_nothing_is_fetched_and_nothing_injected(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run")).read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "use", "image")
        for name, value in attributes.items():
            assert name not in ("src", "href", "xlink:href", "srcset", "action", "poster"), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    script = "".join(re.findall(r"<script>(.*?)</script>", text, re.DOTALL))
    for word in ("url(", "@import", "http:", "https:", "//"):
        assert word not in style
    for word in ("fetch(", "XMLHttpRequest", "import(", "http:", "https:", "innerHTML", "eval("):
        assert word not in script
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy is not None
    assert "default-src 'none'" in policy


def test_hover_points_are_the_data(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", steps=40)).read_text())
    charts = [json.loads(attributes["data-chart"] or "") for tag, attributes in page.tags if "data-chart" in attributes]
    loss = charts[0][0]
    assert loss["x"] == list(range(1, 41))
    assert loss["y"][3] == 2 + 6 / 4
    assert len(loss["px"]) == len(loss["py"]) == 40


@pytest.mark.parametrize(
    "metrics",
    ["", "not json\n", "[]\n{}\n", '{"step": 1}\n', '{"step": "x", "loss": 1}\n', '{"step": 1, "loss": null}\n',
     '{"step": 1, "loss": NaN, "grad_norm": Infinity, "lr": 0.0}\n', '{"step": 5, "loss": 1.0, "lr": 0.0}\n',
     '{"step": 0, "loss": 1e308, "tokens": "many"}\n{"step": 1, "loss": -1e308, "val_bits_per_byte": true}\n'],
)  # fmt: skip
def test_odd_metrics(tmp_path: Path, metrics: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(metrics)
    for name in ("environment.json", "baselines.json"):
        (tmp_path / name).write_text('{"facts": [], "gzip": "x", "deep": {"er": {"est": [1, {"a": 2}]}}')
    Page(write_report(tmp_path).read_text())
    summary(tmp_path)


def test_odd_bytes_everywhere(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl", "config.yaml", "environment.json", "baselines.json", "sample.txt"):
        (tmp_path / name).write_bytes(bytes(range(256)))
    Page(write_report(tmp_path).read_text())


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "absent")


def test_summary_names_the_baselines(tmp_path: Path) -> None:
    text = "\n".join(summary(make_run(tmp_path / "run")))
    assert re.search(r"this model +1\.0250\n +gzip -9 +1\.9000\n +Kneser-Ney 5-gram \(bytes\) +2\.1000", text)


def rewrite(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_an_evaluation_of_a_part_is_not_put_beside_the_baselines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rewrite(run / "events.jsonl", ('"tokens": 9000', '"tokens": 4500'))
    lines = "\n".join(summary(run))
    assert "this model" not in lines.lower().replace("this model is not", "")
    assert re.search(r"gzip -9 +1\.9000", lines)
    for text in (lines, Page(write_report(run).read_text()).text):
        assert "This model is not among them: no evaluation read all of 'text'" in text


def test_an_older_evaluation_of_the_whole_set_names_its_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rewrite(run / "events.jsonl", ('"step": 200', '"step": 50'), ("1.025}", "1.1}"))
    assert re.search(r"this model at step 50 +1\.1000\n", "\n".join(summary(run)))


def test_the_report_says_how_much_the_n_grams_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "counted" not in Page(write_report(run).read_text()).text
    rewrite(run / "baselines.json", ('"train_bytes_whole": 64000000', '"train_bytes_whole": 250000000'))
    for text in ("\n".join(summary(run)), Page(write_report(run).read_text()).text):
        assert "The 5-gram counted the first 64.0 MB of 250 MB of training text." in text
        assert "'text', 600 kB" in text


def test_without_baselines_the_latest_evaluation_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "baselines.json").unlink()
    text = Page(write_report(run).read_text()).text
    assert "1.0250 bits/byte" in text
    assert "not among them" not in text


def test_long_curves_are_thinned_but_keep_spikes() -> None:
    y = [1.0] * 20_000
    y[12_345] = 50.0
    svg = line_chart("loss", [Series("loss", range(20_000), y)])
    assert len(svg) < 100_000
    points = json.loads(Page(svg).tags[0][1]["data-chart"] or "")[0]
    assert len(points["x"]) <= MAX_POINTS + 2
    assert max(points["y"]) == 50.0
    assert points["x"][0] == 0
    assert points["x"][-1] == 19_999
    assert points["x"] == sorted(points["x"])


def test_charts_without_points() -> None:
    assert line_chart("x", [Series("x", [], [])]) == line_chart("x", []) == bar_chart("x", [], "b") == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.1, 8.3), (-5, 5), (1e-7, 3e-7), (1e6, 1.1e6), (999.9, 1000.1)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in found)


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.5), (-2, 3), (0, 12), (-0.2, 1.3)])
def test_log_ticks(low: float, high: float) -> None:
    found = log_ticks(low, high)
    assert 1 <= len(found) <= 12
    assert all(low <= math.log10(tick) <= high for tick in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1500, "1.5k"),
        (3e-4, "3e-4"),
        (2.5e-5, "2.5e-5"),
        (0.25, "0.25"),
        (-2e6, "-2M"),
        (3.1e9, "3.1B"),
        (7, "7"),
    ],
)
def test_tick_labels(value: float, text: str) -> None:
    assert short(value) == text


def test_smoothing_neither_lags_nor_moves_the_ends() -> None:
    line: list[Any] = [float(n) for n in range(100)]
    assert smoothed(line, 20) == pytest.approx(line)
    assert smoothed([3.0], 10) == [3.0]


def routed(step: int, *loads: list[float]) -> dict[str, Any]:
    layers = {
        str(n): {"load": load, "imbalance": max(load) * len(load), "dropped": 0.1, "entropy": 0.5}
        for n, load in enumerate(loads)
    }
    return {"step": step, "experts": {"layers": layers}}


def test_experts_are_shown_as_a_heat_map() -> None:
    block = experts_block([routed(1, [0.5, 0.5], [1.0, 0.0]), routed(2, [0.25, 0.75], [0.5, 0.5])])
    page = Page(block)
    assert "Load of each expert in step 2" in page.text
    cells = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert [cell["fill-opacity"] for cell in cells] == ["0.25", "0.75", "0.50", "0.50"]
    assert "layer 1, expert 0: 1.00" in page.text
    assert "Share of slots dropped" in page.text


@pytest.mark.parametrize("experts", [None, 7, [], {}, {"layers": 3}, {"layers": {"0": 1}}, {"layers": {"0": {}}},
    {"layers": {"0": {"load": ["x"], "imbalance": 1, "dropped": 0, "entropy": 1}}}, {"layers": {"<b>": {"load": []}}},
])  # fmt: skip
def test_what_is_no_record_of_experts_is_left_out(experts: Any) -> None:
    assert experts_block([{"step": 1, "experts": experts}]) == ""


def module(sqnr: float | None, underflow: float, scale: float | None = None) -> dict[str, Any]:
    factor = {"amax": 1.0, "underflow": underflow, "saturation": 0.0} | ({"scale": scale} if scale else {})
    product = {"sqnr_db": sqnr, "underflow": 0.0, "overflow": 1e-3}
    return {"input": factor, "weight": factor, "gradient": factor, "output": product}


def measured(step: int, **modules: dict[str, Any]) -> dict[str, Any]:
    return {"step": step, "statistics": {name.replace("_", "."): of for name, of in modules.items()}}


def test_statistics_are_shown_by_layer_and_step() -> None:
    """The worst module of a layer in each cell: 15 dB is three quarters deep, a thousandth half of the way to all."""
    first = measured(5, blocks_0_up=module(30.0, 0.0, 2.0), blocks_0_down=module(15.0, 1e-6, 8.0))
    second = measured(10, blocks_0_up=module(45.0, 1.0, 4.0), blocks_0_down=module(60.0, 0.0, 4.0))
    page = Page(statistics_block([first, {"step": 6}, second]))
    cells = [attributes["fill-opacity"] for tag, attributes in page.tags if tag == "rect"]
    assert cells == ["0.75", "0.25", "0.00", "1.00", "0.50", "0.50"]
    assert "layer 0, step 5: 15.0 dB" in page.text and "layer 0, step 10: 1.00e+00" in page.text
    chart = next(attributes for tag, attributes in page.tags if attributes.get("class") == "chart")
    assert [curve["y"] for curve in json.loads(chart["data-chart"])] == [pytest.approx([4.0, 4.0])] * 3


def test_products_without_noise_leave_their_cells_empty() -> None:
    page = Page(
        statistics_block([measured(1, blocks_3_up=module(None, 0.0)), measured(2, blocks_3_up=module(30.0, 0.0))])
    )
    cells = [attributes["fill-opacity"] for tag, attributes in page.tags if tag == "rect"]
    assert cells[:2] == ["0.00", "0.50"] and "layer 3, step 1: none" in page.text
    assert "Scale of a tensor" not in page.text


@pytest.mark.parametrize("statistics", [None, 7, [], {}, {"blocks.0.up": 3}, {"head": module(1.0, 0.0)},
    {"blocks.0.up": {}}, {"blocks.0.up": {"output": {"sqnr_db": "<b>"}}}, {"blocks.x.up": module(1.0, 0.0)},
])  # fmt: skip
def test_what_is_no_record_of_statistics_is_left_out(statistics: Any) -> None:
    assert statistics_block([{"step": 1, "statistics": statistics}]) == ""
