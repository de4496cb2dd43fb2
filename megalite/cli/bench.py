"""`megalite bench`: one op at a model's shapes, beside other packages' implementations of it."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megalite.config import schema
from megalite.config.options import parse_options, required
from megalite.config.tree import nearest
from megalite.disk import replace_bytes, replace_text
from megalite.errors import RunError, UserError

if TYPE_CHECKING:
    import torch

    from megalite.bench.peers import Build
    from megalite.bench.results import Report
    from megalite.bench.shapes import Shape

OPS = (
    "attention", "rms_norm", "layer_norm", "rope", "swiglu", "cross_entropy", "grouped_gemm", "moe_permute", "quantize",
    "adamw", "newton_schulz",
)  # fmt: skip
USAGE = f"""Usage: megalite bench OP [key=value ...], or [--key value ...]

Times an op of megalite_kernels at a model's shapes beside other packages, in turns, each call from a flushed cache;
what gives wrong numbers is not timed. OP: {", ".join(OPS[:5])},
{", ".join(OPS[5:])}.
Example: megalite bench attention --shapes llama3_8b --against sdpa,compile --seq 512,1024"""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
RECIPES = ("tensorwise", "rowwise", "blockwise_1x128", "blockwise_128x128", "mxfp8")


@dataclass(kw_only=True)
class BenchOptions:
    op: str = required("The op, as above.")
    shapes: str = schema.key("llama3_8b", "Model whose sizes are used: a file of configs/model.")
    against: list[str] = schema.key(
        ["installed"],
        "sdpa, torch (eager), compile, flash_attn (flash2, flash3, flash4), liger, te; or installed: all that are.",
    )
    backend: list[str] = schema.key(["auto"], "megalite's own: auto, triton, native, reference, …")
    mode: list[str] = schema.key(["forward", "both"], "What is timed.", choices=("forward", "backward", "both"))
    seq: list[int] = schema.key(
        [], "Tokens of a sequence; none given: 512 to 16384 on CUDA, 256,512 on a CPU.", minimum=1
    )
    batch: int | None = schema.key(None, "Sequences; null: by tokens.", minimum=1)
    tokens: int | None = schema.key(None, "Tokens in all; null: 16384 on CUDA, of one sequence on a CPU.", minimum=1)
    device: str = schema.key("auto", "Where.", choices=("auto", "cpu", "cuda"))
    dtype: str = schema.key("auto", "auto: bf16 on CUDA, fp32 on a CPU.", choices=("auto", *DTYPES))
    threads: int = schema.key(0, "CPU threads; 0: as they are.", minimum=0)
    heads: int | None = schema.key(None, "In place of the model's.", minimum=1)
    kv_heads: int | None = schema.key(None, "In place of the model's.", minimum=1)
    head_dim: int | None = schema.key(None, "In place of the model's.", minimum=1)
    hidden: int | None = schema.key(None, "In place of the model's.", minimum=1)
    ffn: int | None = schema.key(None, "In place of the model's.", minimum=1)
    vocab: int | None = schema.key(None, "In place of the model's.", minimum=2)
    experts: int | None = schema.key(None, "Experts; null: 8.", minimum=1)
    top_k: int | None = schema.key(None, "Experts of a token; null: 2.", minimum=1)
    causal: bool | None = schema.key(None, "null: true.")
    window: int | None = schema.key(None, "Sliding window; 0: none; null: the model's.", minimum=0)
    softcap: float | None = schema.key(None, "Of scores, or logits; 0: none; null: the model's.", minimum=0)
    documents: int | None = schema.key(None, "Equal documents packed into each sequence; null: 1.", minimum=1)
    recipe: str | None = schema.key(None, "FP8 scales; null: blockwise_1x128.", choices=RECIPES)
    graphs: bool = schema.key(False, "CUDA graphs: launching costs nothing.")
    seconds: float = schema.key(1.0, "Timed seconds of each line, about.", minimum=0)
    rounds: int = schema.key(5, "Turns of each implementation.", minimum=1)
    tune: str | None = schema.key(
        None, "FILE.json: tiles of attention, grouped_gemm measured on this GPU, if not there yet, and used as `tuned`."
    )
    csv: str | None = schema.key(None, "FILE for the rows.")
    json: str | None = schema.key(None, "FILE for the rows, machine and versions; a baseline for later runs.")
    plot: str | None = schema.key(None, "FILE.png: speed by sequence length.")
    baseline: str | None = schema.key(None, "FILE.json of an earlier run: exit with 1 if something became slower.")
    tolerance: float = schema.key(0.1, "Share by which a median may be above the baseline's.", minimum=0)


OVERRIDES = (
    "heads", "kv_heads", "head_dim", "hidden", "ffn", "vocab", "experts", "top_k", "causal", "window", "softcap",
    "documents", "recipe",
)  # fmt: skip


def run(arguments: list[str]) -> int:
    options = parse_options(BenchOptions, as_words(arguments), USAGE, positional=("op",))
    _check(options)
    import torch

    device = _device(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    return _bench(options, device, getattr(torch, DTYPES[_dtype(options, device)]))


def as_words(arguments: Sequence[str]) -> list[str]:
    """`--key value` and `--key=value` as `key=value`."""
    words, waiting = [], list(arguments)
    while waiting:
        word = waiting.pop(0)
        if word.startswith("--") and word != "--help":
            word = word[2:]
            if "=" not in word:
                if not waiting or waiting[0].startswith("--"):
                    raise UserError(f"--{word}: needs a value, as in --{word} VALUE or {word}=VALUE")
                word = f"{word}={waiting.pop(0)}"
        words.append(word)
    return words


def _check(options: BenchOptions) -> None:
    """What needs no torch. Raises UserError with every mistake."""
    problems = []
    if options.op not in OPS:
        near = ", ".join(nearest(options.op, OPS, 1))
        problems.append(f"{options.op}: no such op; nearest: {near}; legal: {', '.join(OPS)}")
    if options.batch and options.tokens:
        problems.append(f"batch={options.batch}: tokens={options.tokens} says it too; keep one")
    ragged = [length for length in options.seq if options.tokens and options.tokens % length]
    problems += [f"tokens={options.tokens}: is no whole number of sequences of seq={length}" for length in ragged]
    if options.graphs and "backward" in options.mode:
        problems.append("graphs=true: backward alone cannot be recorded; use mode=forward,both")
    for key in ("csv", "json", "plot", "tune"):
        path = getattr(options, key)
        if path is not None and not Path(path).resolve().parent.is_dir():
            problems.append(f"{key}={path}: no such folder; make it first")
        elif path is not None and Path(path).is_dir():
            problems.append(f"{key}={path}: is a folder; name a file")
    if options.plot is not None and not options.plot.endswith(".png"):
        problems.append(f"plot={options.plot}: unknown kind of file; end it in .png")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        problems.append("plot: needs matplotlib; pip install 'megalite[bench]', or leave plot= out")
    if problems:
        raise UserError(*problems)


def _device(options: BenchOptions) -> "torch.device":
    import torch

    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise UserError("device=cuda: PyTorch sees no CUDA device here; use device=cpu")
    device = torch.device("cuda" if there and options.device != "cpu" else "cpu")
    if options.graphs and device.type != "cuda":
        raise UserError("graphs=true: needs a CUDA device; leave it out")
    if options.tune is not None and device.type != "cuda":
        raise UserError(f"tune={options.tune}: needs a CUDA device: on a CPU Triton is only interpreted; leave it out")
    return device


def _dtype(options: BenchOptions, device: "torch.device") -> str:
    from megalite.bench.ops import OPS as ENTRIES

    if ENTRIES[options.op].float32:
        if options.dtype not in ("auto", "fp32"):
            raise UserError(f"dtype={options.dtype}: {options.op} keeps its state in float32; use dtype=fp32")
        return "fp32"
    return options.dtype if options.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"


def _shapes(options: BenchOptions, device: "torch.device") -> "list[Shape]":
    """One for each sequence length; just one for an op on weights. Raises UserError."""
    from megalite.bench.ops import OPS as ENTRIES
    from megalite.bench.shapes import model_shape

    op, given = ENTRIES[options.op], {key: getattr(options, key) for key in OVERRIDES}
    foreign = [key for key in OVERRIDES if given[key] is not None and key not in op.keys]
    if foreign:
        has = ", ".join(op.keys)
        raise UserError(
            *(f"{key}={str(given[key]).lower()}: {options.op} has no such thing; it has {has}" for key in foreign)
        )
    shape = model_shape(options.shapes, given)
    on_cuda = device.type == "cuda"
    lengths = options.seq or ([512, 1024, 2048, 4096, 8192, 16384] if on_cuda else [256, 512])
    tokens = options.tokens or (16384 if on_cuda else 1)
    if not op.by_tokens:
        lengths, tokens = [1], 1
    found = [
        replace(shape, sequence_length=each, batch=options.batch or max(1, tokens // each))
        for each in dict.fromkeys(lengths)
    ]
    if shape.documents > min(lengths):
        raise UserError(f"documents={shape.documents}: seq={min(lengths)} has fewer tokens than that")
    return found


def _modes(options: BenchOptions, differentiable: bool) -> list[str]:
    """Without a gradient there is only forward. Raises UserError where nothing is left."""
    modes = list(dict.fromkeys(options.mode)) if differentiable else [m for m in options.mode if m == "forward"]
    if not modes:
        raise UserError(f"mode={','.join(options.mode)}: {options.op} has no backward; use mode=forward")
    return modes


def _bench(options: BenchOptions, device: "torch.device", dtype: "torch.dtype") -> int:
    from megalite.bench import peers, results, runner
    from megalite.bench.ops import OPS as ENTRIES
    from megalite.bench.timing import measure_peaks

    shapes = _shapes(options, device)
    names, notes = peers.asked(options.against, options.op, device)
    here = results.machine(device, dtype)
    implementations = {
        **runner.own(options.op, options.backend, shapes[0], device, dtype),
        **runner.peers(options.op, names),
    }
    if options.tune is not None:
        implementations = _tuned(options, shapes, device, dtype) | implementations
    modes = _modes(options, ENTRIES[options.op].differentiable)
    job = runner.Job(
        options.op, shapes, implementations, modes, device, dtype, options.seconds, options.rounds, options.graphs
    )
    before = None
    if options.baseline is not None:
        before = results.load(Path(options.baseline), "baseline")
        results.comparable(before, here, runner.planned(job), f"baseline={options.baseline}")
    peaks = measure_peaks(device, dtype)
    made = results.made_by({name: peers.PEERS[name].version() for name in names})
    made["peaks"] = {"flops": peaks.flops, "bytes": peaks.bytes}
    report = results.Report(here, made, runner.measure(job, peaks))
    print(*results.lines(report, names[0] if names else None), *notes, sep="\n")
    _write(options, report)
    problems = results.unmeasured(report.rows)
    if before is not None:
        slower, compared = results.regressions(report.rows, before.rows, options.tolerance)
        problems += slower
        if not problems:
            print(f"none of {compared} lines slower than {options.baseline} by more than {options.tolerance:.0%}")
    if problems:
        raise RunError(*problems)
    return 0


def _tuned(
    options: BenchOptions, shapes: "list[Shape]", device: "torch.device", dtype: "torch.dtype"
) -> "dict[str, Build]":
    from megalite.bench import tune
    from megalite.bench.timing import Clock

    path = Path(str(options.tune))
    record = tune.open_record(path, options.op, device)
    return {"megalite tuned": tune.tuned(options.op, shapes, record, path, Clock(device), dtype)}


def _write(options: BenchOptions, report: "Report") -> None:
    from megalite.bench import results

    if options.csv is not None:
        replace_text(Path(options.csv), results.as_csv(report))
    if options.json is not None:
        replace_text(Path(options.json), results.as_json(report))
    if options.plot is not None:
        from megalite.bench.plot import png

        replace_bytes(Path(options.plot), png(report))
    for path in (options.csv, options.json, options.plot):
        if path is not None:
            print(f"written: {path}")
