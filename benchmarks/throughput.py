"""Training speed beside what one would pick instead: same model, same tokens, in alternation on the same machine.

    python benchmarks/throughput.py [precision=fp32,bf16] [layout=1x2,2x1] [python=fabric=/venv/bin/python,…]
    python benchmarks/throughput.py precision=bf16 model=quickstart,s19,s50 engines=megalite,megalite:fp32

An 18.9M-parameter Llama (configs/model/s19.yaml) or another of peers/job.py, four sequences a rank and step: forward,
backward, clip, AdamW. Layout 1x2 is one process with two threads, 2x1 two data-parallel processes with one. Every
engine runs in processes of its own that stay alive and take turns, so a slow minute of the machine hits all of them.
Printed: tokens/s (median and range over the rounds), its ratio to megalite's of the same round, tokens per CPU-second,
peak memory of all ranks, and the share of this machine's measured matmul rate. "tuned" runs with an allocator that
keeps its memory (jemalloc if found, else glibc's variables). An engine that is not installed, fails or takes too long
is listed as such.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from peers.job import SHAPES
from peers.options import given
from peers.race import Engine, Result, race

from megalite.config import schema

DEFAULT = (
    "megalite,megalite:compile,megalite:pure,transformers,transformers:amp,transformers:compile,transformers:compile+tuned,"
    "transformers:tuned,fabric,olmo_core,deepspeed"
)


@dataclass(kw_only=True)
class Options:
    engines: list[str] = schema.key(DEFAULT.split(","), "Engines, the first of which is the one compared with.")
    precision: list[str] = schema.key(["fp32", "bf16"], "Precisions.", choices=("fp32", "bf16"))
    model: list[str] = schema.key(["s19"], "Models of peers/job.py.", choices=tuple(SHAPES))
    layout: list[str] = schema.key(["1x2", "2x1"], "Processes x threads.")
    rounds: int = schema.key(3, "Turns of every engine.", minimum=1)
    steps: int = schema.key(4, "Steps of a turn.", minimum=1)
    warmup: int = schema.key(2, "Steps before the first turn.", minimum=0)
    limit: int = schema.key(300, "Seconds that a start or a turn may take.", minimum=1)
    together: int = schema.key(5, "Engines alive at once, besides the first; fewer need less memory.", minimum=1)
    python: list[str] = schema.key([], "ENGINE=interpreter of the environment it is installed in.")
    json: str | None = schema.key(None, "File for the results.")


def groups(options: Options) -> Iterator[list[Result]]:
    first, *others = options.engines
    for precision, model, layout in product(options.precision, options.model, options.layout):
        for start in range(0, max(1, len(others)), options.together):
            names = [first, *others[start : start + options.together]]
            yield [Result(name, precision, layout, model) for name in names]


def show(results: list[Result], flops_per_token: int, peak: float) -> None:
    what = f"{results[0].model}, {results[0].precision}, {results[0].layout}"
    print(f"\n{what}; matmul peak {peak / 1e9:.0f} GFLOP/s", flush=True)
    heads = (
        f"{'tokens/s':>9} {'range':>13} {'ours/theirs':>12} {'range':>11} {'tok/cpu-s':>10} {'MB':>6} {'of peak':>8}"
    )
    print(" " * 28 + heads)
    for r in results:
        if r.failure or not r.tokens_per_s:
            print(f"{r.engine:28}{r.failure[:100] or 'no turn'}")
            continue
        speed, ratios = statistics.median(r.tokens_per_s), results[0].ratios(r)
        print(
            f"{r.engine:28}{speed:9.0f} {min(r.tokens_per_s):6.0f}-{max(r.tokens_per_s):<6.0f}"
            f" {statistics.median(ratios):12.2f} {min(ratios):5.2f}-{max(ratios):<5.2f}"
            f" {statistics.median(r.tokens_per_cpu_s):10.0f} {r.memory_mb:6.0f} {speed * flops_per_token / peak:8.0%}",
            flush=True,
        )


def main() -> None:
    options = given(Options, __doc__)
    import torch

    from megalite import load_config
    from megalite.model.size import flops_per_token
    from megalite.train.peak import measured_matmul_peak

    interpreters = dict(word.split("=", 1) for word in options.python)
    every = []
    for results in groups(options):
        shape = SHAPES[results[0].model]
        flops = flops_per_token(load_config(*shape.overrides()).model, shape.vocab, shape.sequence)
        dtype = torch.bfloat16 if results[0].precision == "bf16" else torch.float32
        ranks, threads = (int(part) for part in results[0].layout.split("x"))
        peak = measured_matmul_peak(torch.device("cpu"), dtype, ranks * threads)
        engines = [
            Engine(r, options.limit, interpreters.get(r.engine.partition(":")[0], sys.executable)) for r in results
        ]
        race(engines, options.rounds, options.steps, options.warmup)
        show(results, flops, peak)
        every += [
            {**vars(result), "ratios": results[0].ratios(result), "peak_flops": peak, "flops_per_token": flops}
            for result in results
        ]
        if options.json:
            Path(options.json).write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
