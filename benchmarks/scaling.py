"""Two ranks against one, for every parallelism, beside PyTorch's own and Megatron-Core's of the same kind in one run.

    python benchmarks/scaling.py [rows=dp,tp,…] [rounds=3] [precision=fp32] [python=megatron=/venv/bin/python]

An 18.9M-parameter Llama (configs/model/s19.yaml), 4,096 tokens a step over two processes of one thread: under data
parallelism 4 sequences of 512 a rank; under tensor and context parallelism all 8 in one microbatch; in pipelines 8
microbatches of one. Forward, backward, clip, AdamW. The engines of a row and our one process (2,048 tokens a step) take
turns, so a slow minute of the machine hits all of them. Printed: tokens/s (median and range over the rounds); the
speed-up over our one process; ours over PyTorch's and over Megatron-Core's of the same round; CPU milliseconds a token;
peak memory of all ranks; and the loss of the first step: over two ranks one number for all of ours, and others for
those whose initial weights differ from ours. PyTorch's ring attention has no CPU kernels, so the row cp has no peer
here; Megatron-Core (peers/megatron.py) has rows where it runs without a GPU and without Transformer Engine.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from peers.job import SHAPES
from peers.options import given
from peers.race import Engine, Result, race

from megalite.config import schema

ONE = "megalite"
ROWS: dict[str, tuple[str, ...]] = {
    "dp": ("megalite:dp", "torch:ddp", "megatron:dp"),
    "zero1": ("megalite:zero1", "torch:zero1", "megatron:zero1"),
    "zero2": ("megalite:zero2", "torch:fsdp2:kept"),
    "zero3": ("megalite:zero3", "torch:fsdp2"),
    "tp": ("megalite:tp", "torch:tp", "megatron:tp"),
    "tp+sp": ("megalite:tp+sp", "megalite:tp+sp+overlap", "torch:tp+sp"),
    "pp_1f1b": ("megalite:1f1b", "megalite:zb_h1", "torch:1f1b", "megatron:1f1b"),
    "pp_interleaved": ("megalite:interleaved", "torch:interleaved", "megatron:interleaved"),
    "pp_zbv": ("megalite:zbv", "torch:zbv"),
    "cp": ("megalite:ring", "megalite:ulysses"),
}
PEERS = ("torch", "megatron")


@dataclass(kw_only=True)
class Options:
    rows: list[str] = schema.key(list(ROWS), "Which comparisons.", choices=tuple(ROWS))
    rounds: int = schema.key(3, "Turns of every engine.", minimum=1)
    steps: int = schema.key(1, "Steps of a turn.", minimum=1)
    warmup: int = schema.key(1, "Steps before the first turn, besides the first one.", minimum=0)
    precision: str = schema.key("fp32", "Precision.", choices=("fp32", "bf16"))
    model: str = schema.key("s19", "tiny: only to see that everything runs.", choices=tuple(SHAPES))
    limit: int = schema.key(300, "Seconds that a start or a turn may take.", minimum=1)
    python: list[str] = schema.key([], "ENGINE=interpreter of the environment it is installed in.")
    json: str | None = schema.key(None, "File for the results.")


def show(one: Result, row: list[Result]) -> None:
    """Our one process, then the row's engines, each of ours beside the peers."""
    peers = {peer: next((r for r in row if r.engine.startswith(peer)), None) for peer in PEERS}
    for r in (one, *row):
        if r.failure or not r.tokens_per_s:
            print(f"{r.engine:24}{r.failure[:100] or 'no turn'}", flush=True)
            continue
        speed, ours = r.tokens_per_s, r is not one and r.engine.startswith(ONE)
        compared = "".join(
            _beside(r.ratios(peer) if ours and peer and peer.tokens_per_s else []) for peer in peers.values()
        )
        print(
            f"{r.engine:24}{statistics.median(speed):9.0f} {min(speed):6.0f}-{max(speed):<6.0f}"
            f" {statistics.median(r.ratios(one)):8.2f} {compared}"
            f" {1000 / statistics.median(r.tokens_per_cpu_s):10.2f} {r.memory_mb:7.0f} {r.loss:8.4f}",
            flush=True,
        )


def _beside(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):12.2f} {min(ratios):5.2f}-{max(ratios):<5.2f}" if ratios else " " * 24


def main() -> None:
    options = given(Options, __doc__)
    heads = f"{'tokens/s':>9} {'range':>13} {'of one':>8} " + "".join(
        f"{'of ' + peer:>12} {'range':>11}" for peer in PEERS
    )
    print(f"{options.model}, {options.precision}" + " " * 13 + heads + f" {'cpu-ms/tok':>10} {'MB':>7} {'loss':>8}")
    interpreters = dict(word.partition("=")[::2] for word in options.python)
    if unknown := interpreters.keys() - {*PEERS, ONE}:
        sys.exit(f"python: no engine {unknown.pop()}; such as python=megatron=/venv/bin/python")
    every = []
    for name in options.rows:
        one = Result(ONE, options.precision, "1x1", options.model)
        row = [Result(engine, options.precision, "2x1", options.model) for engine in ROWS[name]]
        engines = [
            Engine(r, options.limit, interpreters.get(r.engine.partition(":")[0], sys.executable)) for r in (one, *row)
        ]
        race(engines, options.rounds, options.steps, options.warmup)
        print(f"-- {name}")
        show(one, row)
        every += [{"row": name, **vars(result)} for result in (one, *row)]
        if options.json:
            Path(options.json).write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
