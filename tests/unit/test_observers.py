"""What a run writes while it trains: exact rows, the same after a resume; lines for eyes; optional trackers."""

import builtins
import io
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalite.config.schema import Config, ModelConfig
from megalite.data.tokenizer import ByteTokenizer
from megalite.errors import UserError
from megalite.model.transformer import Transformer
from megalite.parallel.parameter import materialize
from megalite.train.callback import Callback, StepMetrics
from megalite.train.header import header
from megalite.train.observers import make_observers
from megalite.train.observers.files import EventsFile, MetricsFile, to_json
from megalite.train.observers.profiler import StepProfiler
from megalite.train.observers.progress_line import ProgressLine, live_text, plain_line
from megalite.train.observers.report_writer import ReportWriter
from megalite.train.observers.tensorboard import TensorBoardLog
from megalite.train.observers.wandb import WandbLog, has_key

TIMINGS = ("tokens_per_s", "model_tflops", "mfu", "memory_gb", "step_s", "data_s")


@dataclass
class FakeTrainer:
    run_dir: Path
    config: Config = field(default_factory=Config)
    start_step: int = 0
    step: int = 0
    facts: dict[str, Any] = field(default_factory=lambda: {"model": "tiny", "parameters": 12345})
    model: Any = None
    mesh: Any = None
    data: Any = None
    events: list[dict[str, Any]] = field(default_factory=list)

    def event(self, kind: str, **facts: Any) -> None:
        self.events.append({"kind": kind, **facts})


def metrics(step: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step, "tokens": step * 512, "loss": 7 / (step + 0.1), "grad_norm": 1 / 3 + step, "lr": 3e-4 / step,
        "tokens_per_s": 1234.5, "model_tflops": 0.1, "mfu": 0.4, "memory_gb": 1.0, "step_s": 0.2, "data_s": 0.01,
    }  # fmt: skip
    return StepMetrics(**values | changes)


def train(observer: Callback, trainer: FakeTrainer, first: int, last: int, **changes: Any) -> None:
    for step in range(first, last + 1):
        trainer.step = step
        observer.on_step(trainer, metrics(step, **changes))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_keep_every_bit(tmp_path: Path) -> None:
    trainer, observer = FakeTrainer(tmp_path), MetricsFile()
    observer.on_start(trainer)
    train(observer, trainer, 1, 3)
    observer.on_end(trainer)
    for row in rows(tmp_path / "metrics.jsonl"):
        expected = metrics(row["step"])
        assert (row["loss"], row["grad_norm"], row["lr"]) == (expected.loss, expected.grad_norm, expected.lr)
        assert "val_loss" not in row


def test_a_resumed_file_reads_as_if_never_stopped(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    trainer, observer = FakeTrainer(whole), MetricsFile()
    observer.on_start(trainer)
    train(observer, trainer, 1, 10)
    observer.on_end(trainer)

    trainer, observer = FakeTrainer(broken), MetricsFile()
    observer.on_start(trainer)
    train(observer, trainer, 1, 7, step_s=9.0)  # killed without on_end, in the middle of a line
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 0.')
    trainer, observer = FakeTrainer(broken, start_step=5), MetricsFile()
    observer.on_start(trainer)
    assert [row["step"] for row in rows(broken / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    train(observer, trainer, 6, 10)
    observer.on_end(trainer)

    def untimed(folder: Path) -> list[str]:
        lines = rows(folder / "metrics.jsonl")
        return [json.dumps({name: value for name, value in row.items() if name not in TIMINGS}) for row in lines]

    assert untimed(broken) == untimed(whole)
    assert [path.name for path in broken.iterdir()] == ["metrics.jsonl"]


def test_log_every_and_what_is_always_logged(tmp_path: Path) -> None:
    trainer, observer = FakeTrainer(tmp_path), MetricsFile()
    trainer.config.log.every, trainer.config.train.steps = 4, 10
    observer.on_start(trainer)
    train(observer, trainer, 1, 10)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [4, 8, 10]
    observer.on_step(trainer, metrics(11, skipped=True, loss=math.nan))
    observer.on_step(trainer, metrics(13, val_loss=2.5))
    last = rows(tmp_path / "metrics.jsonl")[-2:]
    assert last[0]["loss"] is None
    assert last[0]["skipped"] is True
    assert last[1]["val_loss"] == 2.5


def test_json_is_strict() -> None:
    line = to_json({"a": math.inf, "b": [math.nan, 1.5], "c": {"d": -math.inf}, "e": Path("x"), "f": "a\u2028b\n"})
    assert "\n" not in line
    assert json.loads(line) == {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": "x", "f": "a\u2028b\n"}


def test_events_survive_restarts(tmp_path: Path) -> None:
    trainer, observer = FakeTrainer(tmp_path), EventsFile()
    observer.on_start(trainer)
    trainer.step = 3
    observer.on_event(trainer, {"kind": "skip", "why": "loss\u2028is\nnan"})
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"half')
    trainer, observer = FakeTrainer(tmp_path, start_step=2), EventsFile()
    observer.on_start(trainer)
    observer.on_end(trainer)
    observer.on_event(trainer, {"kind": "warning", "message": "the observer after this one had trouble"})
    kept = rows(tmp_path / "events.jsonl")
    assert [event["kind"] for event in kept] == ["start", "skip", "start", "end", "warning"]
    assert kept[1]["step"] == 3
    assert all(event["time"] > 1e9 for event in kept)


def test_plain_lines_when_piped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    stream = io.StringIO()
    trainer, observer = FakeTrainer(tmp_path), ProgressLine(stream=stream)
    trainer.config.train.steps = 10
    trainer.facts["model"] = "[bold]llama[/bold] " + "x" * 300
    observer.on_start(trainer)
    train(observer, trainer, 1, 10)
    observer.on_event(trainer, {"kind": "warning", "message": "disk is [nearly] full"})
    observer.on_event(trainer, {"kind": "save", "path": "x"})
    observer.on_end(trainer)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0].startswith("model      [bold]llama[/bold] xxx")
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [f"{n}/10" for n in range(1, 11)]
    assert lines[-1] == "warning: disk is [nearly] full"


def test_the_line_says_everything() -> None:
    line = plain_line(metrics(25, val_loss=2.0, val_bits_per_byte=1.2, skipped=True), 100, 75.0)
    for part in (
        "step 25/100 (25%)", "loss 0.2789", "1.23k tok/s", "0.1 TFLOP/s", "MFU 40.0%", "mem 1.00 GB", "grad 25.333",
        "lr 1.20e-05", "ETA 1:15", "SKIPPED", "validation loss 2.0000 = 1.2000 bits/byte",
    ):  # fmt: skip
        assert part in line
    assert "MFU" not in plain_line(metrics(1, mfu=None), 100, 1.0)


def test_the_live_line_fits_any_width() -> None:
    for width in (20, 40, 80, 100, 200):
        text = live_text(metrics(25), 100, 75.0, width)
        assert text.cell_len <= width
        assert "25/100 (25%)" in text.plain
    assert "lr 1.20e-05" in live_text(metrics(25), 100, 75.0, 200).plain


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def shown(mode: str, stream: io.StringIO) -> str:
        trainer, observer = FakeTrainer(tmp_path), ProgressLine(mode, stream)
        observer.on_start(trainer)
        train(observer, trainer, 1, 3)
        observer.on_step(trainer, metrics(4, val_loss=2.0))
        observer.on_end(trainer)
        return stream.getvalue()

    assert shown("none", Terminal()) == shown("none", io.StringIO()) == ""
    assert "\x1b" in shown("auto", Terminal())
    assert "validation loss 2.0000" in shown("auto", Terminal())
    assert "step 3/1000" in shown("lines", Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in shown("auto", Terminal())


def test_header_says_what_it_is_told() -> None:
    facts = {
        "model": "llama", "parameters": 8_030_261_248, "embedding_parameters": 1_050_673_152, "layers": 32,
        "layout": "dp 2", "world_size": 2, "threads": 1, "device": "cpu", "precision": "fp32", "micro_batch": 2,
        "accumulation": 4, "global_batch": 16, "sequence_length": 128, "steps": 100, "backends": ["a: b", "c: d"],
        "set_by_engine": ["allocator"], "predicted_memory_gb": 1.5, "predicted_step_s": 2.0, "peak_flops": 6e10,
        "run_dir": "runs/x", "resumed_from": "step_00000010",
    }  # fmt: skip
    text = header(facts)
    for part in (
        "8.03B parameters (6.98B without embeddings)", "dp 2, 2 processes", "2,048 tokens a step",
        "micro 2 x accumulation 4 x dp 2", "backend    a: b\n           c: d", "1.50 GB", "2 s a step, 3:20 in all",
        "0.06 TFLOP/s", "resumed from step_00000010",
    ):  # fmt: skip
        assert part in text
    assert header({}) == ""


def missing(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == package or name == f"torch.utils.{package}":
            raise ImportError(name)
        return real(name, *rest, **more)

    for name in [name for name in sys.modules if name.split(".")[0] == package or name == f"torch.utils.{package}"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)


def test_missing_packages_are_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.log.tensorboard = True
    missing(monkeypatch, "tensorboard")
    with pytest.raises(UserError, match=r"log\.tensorboard: .*pip install tensorboard"):
        make_observers(config)
    config.log.tensorboard, config.log.wandb = False, "offline"
    missing(monkeypatch, "wandb")
    with pytest.raises(UserError, match=r"log\.wandb: .*pip install wandb"):
        make_observers(config)


def test_order_of_observers() -> None:
    config = Config()
    kinds = [type(observer).__name__ for observer in make_observers(config)]
    assert kinds == ["MetricsFile", "EventsFile", "ProgressLine", "ReportWriter"]
    config.train.profile_step, config.log.tensorboard = 3, True
    kinds = [type(observer).__name__ for observer in make_observers(config)]
    assert kinds == ["StepProfiler", "MetricsFile", "EventsFile", "ProgressLine", "TensorBoardLog", "ReportWriter"]


def test_tensorboard_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, last in ((0, 6), (4, 8)):
        trainer, observer = FakeTrainer(tmp_path, start_step=start), TensorBoardLog()
        observer.on_start(trainer)
        train(observer, trainer, start + 1, last)
        observer.on_end(trainer)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


def test_wandb_needs_neither_key_nor_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("MY_SECRET_TOKEN", "hunter2-must-not-be-kept")
    assert not has_key()
    run = tmp_path / "run"
    run.mkdir()
    trainer, observer = FakeTrainer(run), WandbLog("online")
    observer.on_start(trainer)
    train(observer, trainer, 1, 3)
    observer.on_end(trainer)
    assert observer.mode == "offline"
    assert "no API key" in trainer.events[0]["message"]
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 1
    kept = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"hunter2" not in kept


def test_a_key_in_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert has_key()


def test_profiler_writes_one_step(tmp_path: Path) -> None:
    trainer, observer = FakeTrainer(tmp_path), StepProfiler(2)
    observer.on_start(trainer)
    observer.on_step(trainer, metrics(1))
    torch.ones(8, 8) @ torch.ones(8, 8)
    observer.on_step(trainer, metrics(2))
    torch.ones(8).cumsum(0)
    observer.on_step(trainer, metrics(3))
    observer.on_end(trainer)
    names = {event.get("name") for event in json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]}
    assert "aten::mm" in names
    assert "aten::cumsum" not in names
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.json"]


def test_profiler_of_a_step_that_never_comes(tmp_path: Path) -> None:
    trainer, observer = FakeTrainer(tmp_path, start_step=1), StepProfiler(2)
    observer.on_start(trainer)
    observer.on_end(trainer)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_gets_a_report_without_sample(tmp_path: Path) -> None:
    trainer = FakeTrainer(tmp_path)
    trainer.config.log.sample, trainer.config.log.baselines = "def ", True
    trainer.data = SimpleNamespace()  # touching it would fail
    files = MetricsFile()
    files.on_start(trainer)
    train(files, trainer, 1, 5)
    files.on_end(trainer)
    ReportWriter().on_end(trainer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def finished_trainer(folder: Path, raw_bytes: Any, vocab: int = 257) -> FakeTrainer:
    with torch.device("meta"):
        model = Transformer(ModelConfig(layers=1, hidden=16, heads=2, ffn=16), vocab, 32)
    materialize(model, torch.device("cpu"), seed=0, dtype=torch.float32)
    validation = [SimpleNamespace(name="first", n_tokens=2000), SimpleNamespace(name="second", n_tokens=7)]
    data = SimpleNamespace(tokenizer=ByteTokenizer(), raw_bytes=raw_bytes, validation=validation)
    trainer = FakeTrainer(folder, step=1000, model=model, data=data)
    trainer.config.log.sample, trainer.config.log.baselines = "def ", True
    (folder / "metrics.jsonl").write_text("")
    return trainer


def test_a_finished_run_leaves_sample_and_baselines(tmp_path: Path) -> None:
    trainer = finished_trainer(tmp_path, lambda split: b"def f(x):\n    return x\n" * 100)
    ReportWriter().on_end(trainer)
    assert (tmp_path / "sample.txt").read_text().startswith("def ")
    measured = json.loads((tmp_path / "baselines.json").read_text())
    assert (measured["train_bytes"], measured["validation"], measured["validation_tokens"]) == (2300, "first", 2000)
    assert "Kneser-Ney" in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.tmp"))


def test_a_sample_of_a_model_with_more_rows_than_the_tokenizer_has_tokens(tmp_path: Path) -> None:
    trainer = finished_trainer(tmp_path, lambda split: b"x" * 2000, vocab=5000)
    ReportWriter().on_end(trainer)
    assert (tmp_path / "sample.txt").read_text().startswith("def ")
    assert trainer.events == []


def test_a_failing_sample_and_failing_baselines_cost_a_warning_each(tmp_path: Path) -> None:
    def fail(split: str) -> bytes:
        raise MemoryError("too\nmuch")

    trainer = finished_trainer(tmp_path, fail)
    trainer.model = None
    ReportWriter().on_end(trainer)
    messages = [event["message"] for event in trainer.events if event["kind"] == "warning"]
    assert len(messages) == 2
    assert messages[0].startswith("log.sample: failed, the rest goes on (AttributeError: ")
    assert messages[1] == "log.baselines: failed, the rest goes on (MemoryError: too much)"
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".html", ".txt", ".json")] == ["report.html"]


def test_a_failing_report_is_a_warning_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run_dir: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalite.train.observers.report_writer.write_report", fail)
    trainer = FakeTrainer(tmp_path)
    ReportWriter().on_end(trainer)
    assert "log.report: failed" in trainer.events[0]["message"]
    assert "No space left" in trainer.events[0]["message"]


def test_text_that_cannot_be_had_back_costs_no_report(tmp_path: Path) -> None:
    def refuse(split: str) -> bytes:
        raise UserError("data.tokenizer: it changes the text")

    trainer = finished_trainer(tmp_path, refuse)
    ReportWriter().on_end(trainer)
    assert trainer.events == [{"kind": "warning", "message": "data.tokenizer: it changes the text"}]
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "baselines.json").exists()
    trainer = finished_trainer(tmp_path, lambda split: b"short")
    ReportWriter().on_end(trainer)
    assert "too little text" in trainer.events[0]["message"]
