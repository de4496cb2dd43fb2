"""`megalite bench`: formulas, statistics, what is told to be wrong, saved runs, and every op for a moment."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megalite_kernels.gpu.chips import PORTABLE
from megalite_kernels.gpu.launch import recording
from megalite_kernels.gpu.tune import candidates, flat
from megalite_kernels.reference import visible
from megalite_kernels.reference.fp8 import BLOCKS
from megalite_kernels.tuning import OPTIONS

from megalite.bench import peers, results, runner, shapes, tune
from megalite.bench.ops import OPS, Maker
from megalite.bench.plot import png
from megalite.bench.results import Report, Row
from megalite.bench.shapes import Cost, Shape, model_shape
from megalite.bench.timing import Call, Clock, Peaks, cache_bytes, in_turns, summary
from megalite.cli import bench as cli
from megalite.errors import UserError

Megalite = Callable[..., Any]
CPU = torch.device("cpu")
LLAMA = dataclasses.replace(model_shape("llama3_8b", {}), sequence_length=1024, batch=2)
TINY = Shape("none", 4, 2, 16, 64, 96, 200, sequence_length=24, batch=2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("documents", [1, 3])
def test_visible_pairs_are_those_of_the_mask(causal: bool, window: int | None, documents: int) -> None:
    shape = dataclasses.replace(TINY, sequence_length=17, causal=causal, window=window, documents=documents)
    numbers = [i for i, length in enumerate(shape.document_lengths()) for _ in range(length)]
    mask = visible(17, 17, causal=causal, window=window, documents_BS=torch.tensor([numbers]))
    assert shape.visible_pairs() == mask.sum()


def test_costs_by_hand() -> None:
    """Llama 3 8B, 2 sequences of 1024 tokens, bf16."""
    queries, keys, lse = 2 * 1024 * 32 * 128, 2 * 1024 * 8 * 128, 4 * 2 * 1024 * 32
    product = 2 * 2 * 32 * 128 * (1024 * 1025 // 2)
    assert shapes.attention_cost(LLAMA, 2) == (
        Cost(2 * product, 2 * 2 * (queries + keys) + lse),
        Cost(5 * product, 2 * 4 * (queries + keys) + lse),
    )
    x = 2048 * 4096
    assert shapes.norm_cost(LLAMA, 2, 1) == (Cost(0, 2 * (2 * x + 4096)), Cost(0, 2 * (3 * x + 2 * 4096)))
    assert shapes.norm_cost(LLAMA, 4, 2) == (Cost(0, 4 * (2 * x + 2 * 4096)), Cost(0, 4 * (3 * x + 3 * 4096)))
    turned = 2 * 2 * (queries + keys) + 2 * 4 * 1024 * 128
    assert shapes.rope_cost(LLAMA, 2) == (Cost(0, turned), Cost(0, turned))
    assert shapes.swiglu_cost(LLAMA, 2) == (Cost(0, 6 * 2048 * 14336), Cost(0, 10 * 2048 * 14336))
    forward, backward = shapes.cross_entropy_cost(LLAMA, 2)
    assert (forward.flops, backward.flops) == (2 * 2048 * 4096 * 128256, 4 * 2048 * 4096 * 128256)
    assert forward.bytes == 2 * (2048 * 4096 + 128256 * 4096) + 8 * 2048
    forward, backward = shapes.grouped_gemm_cost(LLAMA, 2)
    assert (forward.flops, backward.flops) == (2 * 4096 * 4096 * 14336, 4 * 4096 * 4096 * 14336)
    assert forward.bytes == 2 * (4096 * 4096 + 4096 * 14336 + 8 * 4096 * 14336)
    assert shapes.moe_permute_cost(LLAMA, 2)[0] == Cost(0, 2 * (x + 2 * x) + 12 * 4096)
    assert OPS["quantize"].cost(LLAMA, 2)[0] == Cost(0, 3 * x + 4 * 2048 * 32)
    block = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    assert shapes.adamw_cost(LLAMA, 4)[0] == Cost(0, 28 * block)
    m, n = 4096, 14336
    assert OPS["newton_schulz"].cost(LLAMA, 2)[0] == Cost(5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n), 4 * m * n)


def test_shapes_of_models_and_changes() -> None:
    gemma = model_shape("gemma2_9b", {"window": 0, "softcap": None})
    assert (gemma.window, gemma.softcap, gemma.logit_softcap) == (None, 50.0, 30.0)
    assert model_shape("gemma2_9b", {"softcap": 0.0}).logit_softcap is None
    assert (LLAMA.heads, LLAMA.kv_heads, LLAMA.head_dim, LLAMA.tokens) == (32, 8, 128, 2048)
    assert model_shape("llama3_8b", {"heads": 4}).kv_heads == 4
    assert TINY.capped({"window": 3, "hidden": 8}) == dataclasses.replace(TINY, hidden=8)


def test_statistics() -> None:
    assert summary([9.0, 1, 5, 3, 7, 11, 2, 4, 6, 8, 10]) == (times := summary(list(range(1, 12))))
    assert (times.median, times.low, times.high, times.calls) == (6, 3, 9, 11)
    assert summary([2.0]) == summary([2.0, 2.0]).__class__(2.0, 2.0, 2.0, 1)


def test_implementations_take_turns_and_what_comes_before_is_not_timed() -> None:
    order: list[str] = []
    calls = {name: Call(lambda _, name=name: order.append(name)) for name in "abc"}
    found = in_turns(Clock(CPU), calls, {"a": 1, "b": 2, "c": 1}, 2, lambda: order.append("|"))
    assert "".join(order) == "a|bb|c|bb|c|a|"
    assert {name: times.calls for name, times in found.items()} == {"a": 2, "b": 4, "c": 2}
    slow = Call(lambda given: given, before=lambda: torch.ones(4000, 4000).sum())
    assert max(Clock(CPU).times(slow, 2)) < 2e-3
    assert Clock(CPU).flushed.nbytes == 2 * cache_bytes(CPU) > 1 << 20


def test_events_on_cuda_enclose_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, other: "Event") -> float:
            return 2.0

    clock = Clock(CPU)
    clock.device = torch.device("cuda")
    clock.flushed = type("Flushed", (), {"zero_": lambda self: order.append("flush")})()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    call = Call(lambda given: order.append(f"run {given}"), before=lambda: order.append("forward") or 7)
    assert clock.times(call, 2) == [2e-3, 2e-3]
    assert order == [*["forward", "flush", "event", "run 7", "event"] * 2, "wait"]


def job(op: str, implementations: dict[str, Any], shape: Shape = TINY, **options: Any) -> runner.Job:
    modes = options.pop("modes", ["forward", "both"] if OPS[op].differentiable else ["forward"])
    return runner.Job(op, [shape], implementations, modes, CPU, torch.float32, seconds=0.002, rounds=1, **options)


@pytest.mark.parametrize("op", OPS)
def test_every_op_and_the_peers_that_need_no_compiler(op: str) -> None:
    modes = ["forward", "backward", "both"] if OPS[op].differentiable else ["forward"]
    made = runner.own(op, ["auto", "reference"], TINY, CPU, torch.float32)
    made |= runner.peers(op, [name for name in ("sdpa", "torch") if op in peers.PEERS[name].ops])
    rows = runner.measure(job(op, made, modes=modes), Peaks(1e12, 1e10))
    assert len(rows) == len(made) * len(modes) >= 2
    for row in rows:
        assert row.status == "ok", str(row)
        assert row.median is not None and row.low is not None and 0 < row.low <= row.median
        work = row.flops if row.of == "flops" else row.bytes
        assert row.rate == pytest.approx(work / row.median)
        assert row.of_peak == pytest.approx(work / row.median / (1e12 if row.of == "flops" else 1e10))
        assert row.error is not None and row.error < 0.1
    if op == "swiglu":  # torch keeps silu(gate) beside the output
        output = 4 * TINY.tokens * TINY.ffn
        assert {row.implementation: row.memory for row in rows} == {
            "megalite native": output, "torch": 2 * output, "megalite reference": 2 * output,
        }  # fmt: skip


@pytest.mark.parametrize("changes", [{"window": 7}, {"softcap": 5.0}, {"documents": 3}, {"causal": False}])
def test_attention_with_features(changes: dict[str, Any]) -> None:
    shape = dataclasses.replace(TINY, **changes)
    made = {
        **runner.own("attention", ["auto"], shape, CPU, torch.float32),
        **runner.peers("attention", ["sdpa", "torch"]),
    }
    rows = {row.implementation: row.status for row in runner.measure(job("attention", made, shape), Peaks(1, 1))}
    assert rows.pop("sdpa") == ("cannot: knows no softcap" if "softcap" in changes else "ok")
    assert set(rows.values()) == {"ok"}


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 1.01 * grad


def test_what_is_wrong_is_told_and_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    def right(s: Shape, t: Any) -> Any:
        return lambda: OPS["swiglu"].run(s, t, "reference")

    def raises(s: Shape, t: Any) -> Any:
        raise RuntimeError("no such\nkernel")

    def unfit(s: Shape, t: Any) -> Any:
        raise peers.Unfit("too old")

    def fails_late(s: Shape, t: Any) -> Any:
        def call() -> Any:
            if s.sequence_length == 100:
                raise torch.OutOfMemoryError("out of memory")
            return right(s, t)()

        return call

    made = {
        "megalite right": right,
        "scaled": lambda s, t: lambda: 1.001 * right(s, t)(),
        "gradient": lambda s, t: lambda: _WrongGradient.apply(right(s, t)()),
        "nan": lambda s, t: lambda: right(s, t)() / torch.tensor(0.0) * 0,
        "shape": lambda s, t: lambda: right(s, t)()[..., 1:],
        "raises": raises,
        "unfit": unfit,
        "late": fails_late,
    }
    shape = dataclasses.replace(TINY, sequence_length=100)
    rows = runner.measure(job("swiglu", made, shape), Peaks(1, 1))
    status = {row.implementation: row.status for row in rows if row.mode == "both"}
    assert status["megalite right"] == "ok"
    assert status["scaled"].startswith("wrong: error 10 times what torch.float32 allows")
    assert status["gradient"].startswith("wrong")
    assert status["nan"].startswith("wrong: error inf")
    assert status["shape"].startswith(("wrong: error inf", "failed"))
    assert status["raises"] == "failed: RuntimeError: no such kernel"
    assert status["unfit"] == "cannot: too old"
    assert status["late"] == "failed: OutOfMemoryError: out of memory"
    timed = {row.implementation for row in rows if row.median is not None}
    assert timed == {"megalite right"}
    text = "\n".join(results.table(rows, "scaled"))
    assert "not timed" in text
    assert "both" in text


def test_inputs_that_do_not_fit_leave_the_shorter_ones_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(s: Shape, make: Any) -> Any:
        if s.sequence_length > 64:
            raise torch.OutOfMemoryError("out of memory")
        return usual(s, make)

    usual = OPS["swiglu"].inputs
    monkeypatch.setitem(runner.OPS, "swiglu", dataclasses.replace(OPS["swiglu"], inputs=inputs))
    made = runner.own("swiglu", ["reference"], TINY, CPU, torch.float32)
    both = [TINY, dataclasses.replace(TINY, sequence_length=100)]
    asked = dataclasses.replace(job("swiglu", made, modes=["forward"]), shapes=both)
    rows = runner.measure(asked, Peaks(1, 1))
    assert [each.status for each in rows] == ["ok", "failed: OutOfMemoryError: out of memory"]


def row(implementation: str, median: float | None, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "op": "rope", "shape": "tiny", "sizes": "heads=2", "sequence_length": 8, "batch": 1, "mode": "forward",
        "implementation": implementation, "status": "ok", "flops": 0.0, "bytes": 10.0, "of": "bytes",
    }  # fmt: skip
    if median is not None:
        values |= {"median": median, "low": median / 2, "high": median * 2, "calls": 3, "rate": 10 / median}
        values |= {"of_peak": 0.5, "memory": 1000, "error": 0.01}
    return Row(**values | changes)


def report(*rows: Row) -> Report:
    made = {**results.made_by({"liger": "0.8"}), "peaks": {"flops": 1e12, "bytes": 1e10}}
    return Report(results.machine(CPU, torch.float32), made, list(rows))


def test_json_and_csv_give_back_what_was_measured(tmp_path: Path) -> None:
    written = report(row("megalite native", 1e-3), row("torch", None, status="wrong, very"))
    (tmp_path / "saved.json").write_text(results.as_json(written))
    assert results.load(tmp_path / "saved.json", "baseline") == written
    assert {"date", "revision", "versions", "peaks"} == written.made.keys()
    assert written.machine.keys() == {"device", "threads", "dtype"}
    lines = list(csv.DictReader(io.StringIO(results.as_csv(written))))
    assert [line["implementation"] for line in lines] == ["megalite native", "torch"]
    assert float(lines[0]["median"]) == 1e-3
    assert (lines[1]["median"], lines[1]["status"]) == ("", "wrong, very")
    assert lines[0]["device"] == written.machine["device"]


def test_the_table_is_aligned_and_has_ratios() -> None:
    rows = [row("megalite native", 2e-3), row("torch", 1e-3), row("liger", None, status="failed: x")]
    head, *body = results.table(rows, "torch")
    assert head.split()[-2:] == ["vs", "torch"]
    assert [line.split()[-1] for line in body] == ["0.50x", "1.00x", "x"]
    assert len(head) == len(body[0]) == len(body[1])
    assert results.lines(report(*rows), "torch")[0].startswith("rope, tiny: heads=2; float32 on ")
    assert [results.duration(seconds) for seconds in (1.234e-5, 0.0999, 2.5)] == ["12.3 µs", "99.9 ms", "2.50 s"]


def test_regressions_name_what_became_slower() -> None:
    old = [row("megalite native", 1e-3), row("torch", 1e-3), row("megalite x", 1e-3, mode="both")]
    same = [row("megalite native", 1.09e-3), row("torch", 9.0), row("megalite x", 0.5e-3, mode="both")]
    assert results.regressions(same, old, 0.1) == ([], 2)
    slower = [row("megalite native", 1.2e-3), row("megalite new", 9.0)]
    (line,), compared = results.regressions(slower, old, 0.1)
    assert (line, compared) == ("rope seq=8 forward, megalite native: 1.20 ms, was 1.00 ms (1.20x, allowed 1.10x)", 1)
    assert results.regressions([row("megalite native", 9.0, sizes="heads=4")], old, 0.1) == ([], 0)
    assert results.unmeasured([row("torch", None), row("megalite native", None, status="wrong")]) == [
        "rope seq=8 forward, megalite native: wrong"
    ]


def test_only_one_kind_of_machine_is_compared(tmp_path: Path) -> None:
    saved = report(row("megalite native", 1.0))
    results.comparable(saved, dict(saved.machine), saved.rows, "baseline=x")
    for other in (row("megalite native", None, mode="both"), row("torch", None)):
        with pytest.raises(UserError, match=r"^baseline=x: has none of these lines"):
            results.comparable(saved, saved.machine, [other], "baseline=x")
    with pytest.raises(UserError, match=r"^baseline=x: was measured with device=.*, this is device=H100"):
        results.comparable(saved, {**saved.machine, "device": "H100"}, saved.rows, "baseline=x")
    (tmp_path / "bad.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match="is no saved benchmark"):
        results.load(tmp_path / "bad.json", "baseline")


def test_pictures() -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row(name, 1e-3, sequence_length=n, mode=m) for name in ("a", "b") for n in (8, 16) for m in ("forward", "both")
    ]
    for several in (rows, rows[:1], [*rows, row("c", None)]):
        assert png(report(*several)).startswith(b"\x89PNG\r\n\x1a\n")


def test_peers_that_are_installed_missing_or_without_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.13", "flash-attn-3": "3.0", "liger-kernel": "0.8"}
    monkeypatch.setattr(peers.Peer, "version", lambda self: there.get(self.package))
    cuda = torch.device("cuda")
    assert peers.asked(["installed"], "attention", CPU)[0] == ["sdpa", "torch", "compile"]
    assert peers.asked(["installed"], "rope", cuda)[0] == ["torch", "compile", "liger"]
    assert peers.asked(["sdpa", "flash_attn", "liger"], "attention", cuda) == (
        ["sdpa", "flash3"],
        ["not measured: liger: liger-kernel has no attention"],
    )
    with pytest.raises(UserError) as caught:
        peers.asked(["te", "xformers", "sdpa"], "attention", cuda)
    assert caught.value.lines[0].startswith("against=xformers: no such peer; legal: installed, sdpa, torch")
    del there["flash-attn-3"]
    found, notes = peers.asked(["te", "sdpa", "flash_attn"], "attention", cuda)
    assert found == ["sdpa"]
    assert notes[0].startswith("not measured: te: transformer-engine is not installed; pip install")
    assert notes[1].startswith("not measured: flash_attn: flash-attn is not installed; pip install")
    no_gpu = "liger-kernel needs a CUDA device, and this is a CPU"
    assert peers.asked(["liger"], "rope", CPU) == ([], [f"not measured: liger: {no_gpu}"])


def test_what_is_written_twice_agrees() -> None:
    assert tuple(OPS) == cli.OPS
    assert tuple(BLOCKS) == cli.RECIPES
    assert {key for op in OPS.values() for key in op.keys} == set(cli.OVERRIDES)
    page = (Path(__file__).parents[2] / "docs/bench.md").read_text()
    assert all(f"`{name}`" in page for name in [*OPS, *peers.PEERS, "flash_attn"])


def test_what_is_right_in_float64_too() -> None:
    for op in ("attention", "cross_entropy"):
        right = runner.right_at(OPS[op], TINY, CPU, torch.float64)
        assert right.error(peers.EAGER[op]) < 1


@pytest.mark.parametrize("op", ["attention", "grouped_gemm"])
def test_tiles_are_measured_once_and_used(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that gives every candidate less time than the one before, so that the last is the best."""
    tried = dict.fromkeys(("N", "BN", "BF"), (16, 32)) | dict.fromkeys(("M", "BM", "BD", "BK"), (16,))
    monkeypatch.setattr("megalite_kernels.gpu.tune.TRIED", tried | {"num_warps": (4,), "num_stages": (1,)})

    small = dataclasses.replace(TINY, heads=1, kv_heads=1, hidden=16, ffn=24, experts=2, sequence_length=17, batch=1)

    class Falling(Clock):
        left = 1000.0

        def times(self, call: Call, count: int) -> list[float]:
            self.left -= 1.0
            return [self.left] * count

    path, said, clock = tmp_path / "tuned.json", list[str](), Falling(CPU)
    kernel, sizes = OPS[op].kernel, OPS[op].tiled.sizes(small)
    record = tune.open_record(path, op, CPU)
    tune.tuned(op, [small], record, path, clock, torch.float32, said.append)
    assert len(said) == 1 and said[0].startswith(f"tuned {op}, none, 17 x 1: ") and " 0 failed, 1.0" in said[0]
    kept = tune.open_record(path, op, CPU)
    best = [candidates(kernel, n, PORTABLE, torch.float32, sizes)[-1] for n in range(len(OPTIONS[kernel]))]
    assert kept.tiles(kernel, torch.float32, sizes) == flat(kernel, best)
    build = tune.tuned(op, [small], kept, path, clock, torch.float32, said.append)
    assert len(said) == 1, "nothing was measured again"
    tensors = OPS[op].inputs(small, Maker(CPU, torch.float32))
    with recording() as launches:
        build(small, tensors)()
    assert {name: launches[0].arguments.get(name) for name in ("N", "BN")}.items() >= {
        (name, value) for name, value in best[0].items() if name in ("N", "BN")
    }
    monkeypatch.setattr(tune, "relative_error", lambda ours, right: 1.0)
    with pytest.raises(ValueError, match="candidates ran"):
        tune.tuned(op, [small], record, path, clock, torch.float32, said.append)
    with pytest.raises(UserError, match="rope has no tiles that are tuned; there are attention, grouped_gemm"):
        tune.open_record(path, "rope", CPU)
    path.write_text("[]")
    with pytest.raises(UserError, match="no record of tuned tiles"):
        tune.open_record(path, op, CPU)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["attnetion"], "attnetion: no such op; nearest: attention; legal: attention, rms_norm"),
        (["rope", "shapes=llama9"], "shapes=llama9: no such model; legal: deepseek_v3,"),
        (["rope", "against=xformers"], "against=xformers: no such peer; legal: installed, sdpa"),
        (["rope", "causal=false"], "causal=false: rope has no such thing; it has heads, kv_heads, head_dim"),
        (["rope", "--seq"], "--seq: needs a value, as in --seq VALUE or seq=VALUE"),
        (["rope", "--seq", "0"], "seq=0: at least 1"),
        (["rope", "sqe=3"], "sqe: unknown key; nearest: seq"),
        (["rope", "batch=2", "tokens=8"], "batch=2: tokens=8 says it too; keep one"),
        (["rope", "seq=3", "tokens=8"], "tokens=8: is no whole number of sequences of seq=3"),
        (["rope", "mode=sideways"], "mode=sideways: not a choice; legal: forward, backward, both"),
        (["quantize", "mode=backward"], "mode=backward: quantize has no backward; use mode=forward"),
        (["adamw", "dtype=bf16"], "dtype=bf16: adamw keeps its state in float32; use dtype=fp32"),
        (["rope", "backend=triton"], "backend=triton: on a CPU Triton is only interpreted"),
        (["rope", "backend=cuda"], "backend=cuda: rope: no backend 'cuda'; there are auto, triton, native, reference"),
        (["attention", "heads=6", "kv_heads=4"], "kv_heads=4: does not divide heads=6"),
        (["attention", "seq=2", "documents=3"], "documents=3: seq=2 has fewer tokens than that"),
        (["grouped_gemm", "top_k=9"], "top_k=9: there are 8 experts"),
        (["rope", "device=cuda"], "device=cuda: PyTorch sees no CUDA device here"),
        (["rope", "graphs=true"], "graphs=true: needs a CUDA device"),
        (["rope", "graphs=true", "mode=backward"], "graphs=true: backward alone cannot be recorded"),
        (["attention", "tune=x.json"], "tune=x.json: needs a CUDA device: on a CPU Triton is only interpreted"),
        (["rope", "csv=nowhere/x.csv"], "csv=nowhere/x.csv: no such folder"),
        (["rope", "json=."], "json=.: is a folder"),
        (["rope", "plot=x.svg"], "plot=x.svg: unknown kind of file; end it in .png"),
        (["rope", "baseline=none.json"], "baseline=none.json: no such file; save one with json=none.json"),
        ([], "op: is needed"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], line: str, megalite: Megalite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = megalite("bench", *words)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"megalite bench: {line}")
    assert answer.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_both_spellings_and_what_is_written(
    megalite: Megalite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megalite.bench.timing.measure_peaks", lambda device, dtype: Peaks(1e12, 1e10))
    words = ["shapes=tiny", "against=torch", "seq=8,16", "seconds=0.001", "rounds=1"]
    dashed = [part for word in words for part in f"--{word}".split("=")]
    assert cli.as_words(dashed) == words == cli.as_words([f"--{word}" for word in words])
    answer = megalite("bench", "swiglu", *words, "mode=forward", "json=a.json", "csv=a.csv")
    assert answer.code == 0, answer.err
    assert [line.split()[:4] for line in answer.out.splitlines()[5:9]] == [
        [length, "1", "forward", name] for length in ("8", "16") for name in ("megalite", "torch")
    ]
    again = megalite("bench", "swiglu", *dashed, "--mode", "forward", "--json", "b.json")
    assert again.code == 0
    first, second = (json.loads(Path(name).read_text())["rows"] for name in ("a.json", "b.json"))
    for key in ("op", "sizes", "sequence_length", "mode", "implementation", "flops", "bytes"):
        assert [line[key] for line in first] == [line[key] for line in second]
    held = megalite("bench", "swiglu", *words, "mode=forward", "baseline=a.json", "tolerance=1e6")
    assert held.out.splitlines()[-1] == "none of 2 lines slower than a.json by more than 100000000%"
    other = megalite("bench", "rope", *words, "baseline=a.json")
    assert (other.code, other.err) == (
        2,
        "megalite bench: baseline=a.json: has none of these lines; save one with json=FILE\n",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json", "b.json"]
