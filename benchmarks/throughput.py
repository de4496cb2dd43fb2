"""Training speed beside what one would pick instead: same model, same tokens, in alternation on the same machine.

    python benchmarks/throughput.py [precision=fp32,bf16] [layout=1x2,2x1] [python=fabric=/venv/bin/python,…]

An 18.9M-parameter Llama (configs/model/s19.yaml), 2,048 tokens a rank and step: forward, backward, clip, AdamW.
Layout 1x2 is one process with two threads, 2x1 two data-parallel processes with one. Every engine runs in processes of
its own that stay alive and take turns, so a slow minute of the machine hits all of them. Printed: tokens/s (median and
range over the rounds), its ratio to megalite's of the same round, tokens per CPU-second, peak memory of all ranks, and
the share of this machine's measured matmul rate. "tuned" runs with an allocator that keeps its memory (jemalloc if
found, else glibc's variables). An engine that is not installed, fails or takes too long is listed as such.
"""

import contextlib
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path

from peers.engines import MICRO_BATCH, SEQUENCE

from megalite.config import schema
from megalite.config.options import HelpRequested, parse_options

HERE = Path(__file__).parent
DEFAULT = (
    "megalite,megalite:compile,transformers,transformers:amp,transformers:compile,transformers:compile+tuned,"
    "transformers:tuned,fabric,olmo_core,deepspeed"
)
GLIBC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(64 << 20)}
JEMALLOC = {"MALLOC_CONF": "background_thread:false,thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"}


@dataclass(kw_only=True)
class Options:
    engines: list[str] = schema.key(DEFAULT.split(","), "Engines, the first of which is the one compared with.")
    precision: list[str] = schema.key(["fp32", "bf16"], "Precisions.", choices=("fp32", "bf16"))
    layout: list[str] = schema.key(["1x2", "2x1"], "Processes x threads.")
    rounds: int = schema.key(3, "Turns of every engine.", minimum=1)
    steps: int = schema.key(4, "Steps of a turn.", minimum=1)
    warmup: int = schema.key(2, "Steps before the first turn.", minimum=0)
    limit: int = schema.key(300, "Seconds that a start or a turn may take.", minimum=1)
    together: int = schema.key(5, "Engines alive at once, besides the first; fewer need less memory.", minimum=1)
    python: list[str] = schema.key([], "ENGINE=interpreter of the environment it is installed in.")
    json: str | None = schema.key(None, "File for the results.")


@dataclass
class Result:
    engine: str
    precision: str
    layout: str
    tokens_per_s: list[float] = field(default_factory=list)
    tokens_per_cpu_s: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    memory_mb: float = 0.0
    start_s: float = 0.0
    loss: float = 0.0
    failure: str = ""


class Engine:
    """The processes of one engine, started and stopped by `with`."""

    def __init__(self, result: Result, options: Options) -> None:
        self.result, self.limit = result, options.limit
        self.ranks, self.threads = (int(part) for part in result.layout.split("x"))
        interpreters = dict(word.split("=", 1) for word in options.python)
        self.python = interpreters.get(result.engine.partition(":")[0], sys.executable)
        self.processes: list[subprocess.Popen[str]] = []
        self.answers: list[int] = []

    def __enter__(self) -> "Engine":
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.log = open(Path(self.folder.name) / "log", "w+")
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        for rank in range(self.ranks):
            read, write = os.pipe()
            words = [
                self.result.engine,
                self.result.precision,
                str(self.threads),
                f"{self.folder.name}/run",
                str(write),
            ]
            self.processes.append(
                subprocess.Popen(
                    [self.python, "-m", "peers.worker", *words],
                    cwd=HERE,
                    env=self._environment(rank, port),
                    stdin=subprocess.PIPE,
                    stdout=self.log,
                    stderr=self.log,
                    pass_fds=(write,),
                    text=True,
                )
            )
            os.close(write)
            self.answers.append(read)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for descriptor in self.answers:
            os.close(descriptor)
        self.log.close()
        self.folder.cleanup()

    def _environment(self, rank: int, port: str) -> dict[str, str]:
        root = HERE.parent
        environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": str(self.threads)}
        if "tuned" in self.result.engine:
            jemalloc = find_library("jemalloc")
            environment.update({**JEMALLOC, "LD_PRELOAD": jemalloc} if jemalloc else GLIBC)
        if self.ranks > 1 or self.result.engine == "deepspeed":
            names = {"RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.ranks}
            environment.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
            environment.update(MASTER_PORT=port, NODE_RANK="0")
        return environment

    def turn(self, steps: int) -> list[dict]:
        """One answer a rank after `steps` more steps; 0: after the start. Raises RuntimeError with the reason."""
        for process in self.processes if steps else []:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        return [json.loads(self._line(descriptor)) for descriptor in self.answers]

    def _line(self, descriptor: int) -> str:
        text = b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not text.endswith(b"\n"):
                if not selector.select(self.limit):
                    raise RuntimeError(f"no answer in {self.limit} s")
                read = os.read(descriptor, 1 << 16)
                if not read:
                    raise RuntimeError(self._last_words())
                text += read
        return text.decode()

    def _last_words(self) -> str:
        """Why the processes ended: their last line of output, written after the pipe to here was closed."""
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        self.log.seek(0)
        last = [line for line in self.log.read().splitlines() if line.strip()][-1:]
        return "".join(last) or f"ended with {[process.poll() for process in self.processes]}"


def race(results: list[Result], options: Options) -> None:
    """Let these engines take turns; the first is the one that ratios are taken to."""
    engines = [Engine(result, options) for result in results]
    ready = []
    try:
        for engine in engines:
            engine.__enter__()
            try:
                engine.result.start_s = max(answer["start_s"] for answer in engine.turn(0))
                if options.warmup:
                    engine.turn(options.warmup)
                ready.append(engine)
            except (RuntimeError, BrokenPipeError) as error:
                engine.result.failure = str(error)
                engine.__exit__()
        for _ in range(options.rounds):
            for engine in list(ready):
                try:
                    note(engine.result, engine.turn(options.steps), options.steps)
                except (RuntimeError, BrokenPipeError) as error:
                    engine.result.failure = str(error)
                    ready.remove(engine)
                    engine.__exit__()
            ours = results[0].tokens_per_s
            for engine in ready:
                engine.result.ratios.append(ours[-1] / engine.result.tokens_per_s[-1] if ours else float("nan"))
    finally:
        for engine in ready:
            engine.__exit__()


def note(result: Result, answers: list[dict], steps: int) -> None:
    tokens = MICRO_BATCH * SEQUENCE * len(answers)
    result.tokens_per_s.append(tokens / statistics.median(answers[0]["seconds"]))
    result.tokens_per_cpu_s.append(tokens * steps / sum(answer["cpu_s"] for answer in answers))
    result.memory_mb = sum(answer["memory_mb"] for answer in answers)
    result.loss = answers[0]["loss"]


def groups(options: Options) -> Iterator[list[Result]]:
    first, *others = options.engines
    for precision in options.precision:
        for layout in options.layout:
            for start in range(0, max(1, len(others)), options.together):
                names = [first, *others[start : start + options.together]]
                yield [Result(name, precision, layout) for name in names]


def show(results: list[Result], flops_per_token: int, peak: float) -> None:
    print(f"\n{results[0].precision}, {results[0].layout}; matmul peak {peak / 1e9:.0f} GFLOP/s", flush=True)
    heads = (
        f"{'tokens/s':>9} {'range':>13} {'ours/theirs':>12} {'range':>11} {'tok/cpu-s':>10} {'MB':>6} {'of peak':>8}"
    )
    print(" " * 28 + heads)
    for r in results:
        if r.failure or not r.tokens_per_s:
            print(f"{r.engine:28}{r.failure[:100] or 'no turn'}")
            continue
        speed = statistics.median(r.tokens_per_s)
        print(
            f"{r.engine:28}{speed:9.0f} {min(r.tokens_per_s):6.0f}-{max(r.tokens_per_s):<6.0f}"
            f" {statistics.median(r.ratios):12.2f} {min(r.ratios):5.2f}-{max(r.ratios):<5.2f}"
            f" {statistics.median(r.tokens_per_cpu_s):10.0f} {r.memory_mb:6.0f} {speed * flops_per_token / peak:8.0%}",
            flush=True,
        )


def main() -> None:
    try:
        options = parse_options(Options, sys.argv[1:], __doc__ or "")
    except HelpRequested as help:
        print(help)
        return
    import torch

    from megalite import load_config
    from megalite.model.size import flops_per_token
    from megalite.train.peak import measured_matmul_peak

    flops = flops_per_token(load_config("model=s19").model, 8192, SEQUENCE)
    every = []
    for results in groups(options):
        dtype = torch.bfloat16 if results[0].precision == "bf16" else torch.float32
        ranks, threads = (int(part) for part in results[0].layout.split("x"))
        peak = measured_matmul_peak(torch.device("cpu"), dtype, ranks * threads)
        race(results, options)
        show(results, flops, peak)
        every += [{**vars(result), "peak_flops": peak, "flops_per_token": flops} for result in results]
        if options.json:
            Path(options.json).write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
