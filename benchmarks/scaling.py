"""Two ranks against one, for every parallelism, beside PyTorch's own of the same kind in the same run.

    python benchmarks/scaling.py [rows=dp,tp,…] [rounds=3] [steps=1] [precision=fp32] [json=FILE]

An 18.9M-parameter Llama (configs/model/s19.yaml), 4,096 tokens a step over two processes of one thread: under data
parallelism 4 sequences of 512 a rank; under tensor and context parallelism all 8 in one microbatch; in pipelines 8
microbatches of one. Forward, backward, clip, AdamW. The engines of a row and our one process (2,048 tokens a step) take
turns, so a slow minute of the machine hits all of them. Printed: tokens/s (median and range over the rounds); the
speed-up over our one process; ours over PyTorch's of the same round; CPU milliseconds a token; peak memory of all
ranks; and the loss of the first step: over two ranks one number for all of ours, and another for all of PyTorch's,
whose initial weights differ from ours. PyTorch's ring attention has no CPU kernels, so the row cp has no peer here.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from peers.job import SHAPES
from peers.race import Engine, Result, race

from megalite.config import schema
from megalite.config.options import HelpRequested, parse_options
from megalite.errors import UserError

ONE = "megalite"
ROWS: dict[str, tuple[str, ...]] = {
    "dp": ("megalite:dp", "torch:ddp"),
    "zero1": ("megalite:zero1", "torch:zero1"),
    "zero2": ("megalite:zero2", "torch:fsdp2:kept"),
    "zero3": ("megalite:zero3", "torch:fsdp2"),
    "tp": ("megalite:tp", "torch:tp"),
    "tp+sp": ("megalite:tp+sp", "megalite:tp+sp+overlap", "torch:tp+sp"),
    "pp_1f1b": ("megalite:1f1b", "megalite:zb_h1", "torch:1f1b"),
    "pp_interleaved": ("megalite:interleaved", "torch:interleaved"),
    "pp_zbv": ("megalite:zbv", "torch:zbv"),
    "cp": ("megalite:ring", "megalite:ulysses"),
}
"""The engines of each row; the last one is PyTorch's, where there is one."""


@dataclass(kw_only=True)
class Options:
    rows: list[str] = schema.key(list(ROWS), "Which comparisons.", choices=tuple(ROWS))
    rounds: int = schema.key(3, "Turns of every engine.", minimum=1)
    steps: int = schema.key(1, "Steps of a turn.", minimum=1)
    warmup: int = schema.key(1, "Steps before the first turn, besides the first one.", minimum=0)
    precision: str = schema.key("fp32", "Precision.", choices=("fp32", "bf16"))
    model: str = schema.key("s19", "tiny: only to see that everything runs.", choices=tuple(SHAPES))
    limit: int = schema.key(300, "Seconds that a start or a turn may take.", minimum=1)
    json: str | None = schema.key(None, "File for the results.")


def show(one: Result, row: list[Result]) -> None:
    """Our one process, then the row's engines, each of ours beside PyTorch's."""
    peer = row[-1] if row[-1].engine.startswith("torch") else None
    for r in (one, *row):
        if r.failure or not r.tokens_per_s:
            print(f"{r.engine:24}{r.failure[:100] or 'no turn'}", flush=True)
            continue
        speed, beside = r.tokens_per_s, r.ratios(peer) if peer and r not in (one, peer) else []
        compared = f"{statistics.median(beside):10.2f} {min(beside):5.2f}-{max(beside):<5.2f}" if beside else " " * 22
        print(
            f"{r.engine:24}{statistics.median(speed):9.0f} {min(speed):6.0f}-{max(speed):<6.0f}"
            f" {statistics.median(r.ratios(one)):8.2f} {compared}"
            f" {1000 / statistics.median(r.tokens_per_cpu_s):10.2f} {r.memory_mb:7.0f} {r.loss:8.4f}",
            flush=True,
        )


def main() -> None:
    try:
        options = parse_options(Options, sys.argv[1:], __doc__ or "")
    except HelpRequested as help:
        print(help)
        return
    except UserError as error:
        sys.exit("\n".join(error.lines))
    heads = f"{'tokens/s':>9} {'range':>13} {'of one':>8} {'of torch':>10} {'range':>11}"
    print(f"{options.model}, {options.precision}" + " " * 13 + heads + f" {'cpu-ms/tok':>10} {'MB':>7} {'loss':>8}")
    every = []
    for name in options.rows:
        one = Result(ONE, options.precision, "1x1", options.model)
        row = [Result(engine, options.precision, "2x1", options.model) for engine in ROWS[name]]
        race([Engine(result, options.limit) for result in (one, *row)], options.rounds, options.steps, options.warmup)
        print(f"-- {name}")
        show(one, row)
        every += [{"row": name, **vars(result)} for result in (one, *row)]
        if options.json:
            Path(options.json).write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
