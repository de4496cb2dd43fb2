"""Engines in processes of their own that stay alive and take turns, so that a slow minute of the machine hits all."""

import contextlib
import json
import math
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path

from peers.job import MICRO_BATCH, SHAPES

BENCHMARKS = Path(__file__).parent.parent
GLIBC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(64 << 20)}
JEMALLOC = {"MALLOC_CONF": "background_thread:false,thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"}


@dataclass
class Result:
    """What one engine did; `layout` is processes x threads, lists have a value a round. `loss`: of the first step."""

    engine: str
    precision: str
    layout: str
    model: str = "s19"
    tokens_per_s: list[float] = field(default_factory=list)
    tokens_per_cpu_s: list[float] = field(default_factory=list)
    memory_mb: float = 0.0
    start_s: float = 0.0
    loss: float = math.nan
    failure: str = ""

    def ratios(self, other: "Result") -> list[float]:
        """This engine's tokens/s over the other's, round by round; at least one of them."""
        return [a / b for a, b in zip(self.tokens_per_s, other.tokens_per_s, strict=False)] or [math.nan]


class Engine:
    """The processes of one engine, started and stopped by `with`. `limit`: seconds that an answer may take."""

    def __init__(self, result: Result, limit: int, python: str = sys.executable) -> None:
        self.result, self.limit, self.python = result, limit, python
        self.ranks, self.threads = (int(part) for part in result.layout.split("x"))
        self.processes: list[subprocess.Popen[str]] = []
        self.answers: list[int] = []

    def __enter__(self) -> "Engine":
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.log = open(Path(self.folder.name) / "log", "w+")
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        result = self.result
        for rank in range(self.ranks):
            read, write = os.pipe()
            words = (result.engine, result.precision, result.model, str(self.threads), f"{self.folder.name}/run")
            self.processes.append(
                subprocess.Popen(
                    [self.python, "-m", "peers.worker", *words, str(write)],
                    cwd=BENCHMARKS,
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
        root = BENCHMARKS.parent
        environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": str(self.threads)}
        if "tuned" in self.result.engine:
            jemalloc = find_library("jemalloc")
            environment.update({**JEMALLOC, "LD_PRELOAD": jemalloc} if jemalloc else GLIBC)
        if self.ranks > 1 or self.result.engine == "deepspeed":
            names = {"RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.ranks}
            environment.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
            environment.update(MASTER_PORT=port, NODE_RANK="0")
        return environment

    def started(self) -> None:
        """Wait for the first step of every rank."""
        answers = self._answers()
        self.result.start_s = max(answer["start_s"] for answer in answers)
        known = [answer["loss"] for answer in answers if not math.isnan(answer["loss"])]
        self.result.loss = statistics.fmean(known)

    def turn(self, steps: int, noted: bool = True) -> None:
        """`steps` more steps. Raises RuntimeError with the reason, or BrokenPipeError, when a rank has ended."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        answers, result = self._answers(), self.result
        if not noted:
            return
        tokens = MICRO_BATCH * SHAPES[result.model].sequence * self.ranks
        result.tokens_per_s.append(tokens / max(statistics.median(answer["seconds"]) for answer in answers))
        result.tokens_per_cpu_s.append(tokens * steps / sum(answer["cpu_s"] for answer in answers))
        result.memory_mb = sum(answer["memory_mb"] for answer in answers)

    def _answers(self) -> list[dict]:
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


def race(engines: Sequence[Engine], rounds: int, steps: int, warmup: int) -> None:
    """Start these engines and let them take turns; one that fails is left out from then on."""
    ready: list[Engine] = []

    def attempt(engine: Engine, *turns: int, noted: bool) -> bool:
        try:
            for count in turns:
                engine.turn(count, noted) if count else engine.started()
        except (RuntimeError, BrokenPipeError) as error:
            engine.result.failure = str(error)
            engine.__exit__()
            return False
        return True

    try:
        for engine in engines:
            engine.__enter__()
            if attempt(engine, 0, *([warmup] if warmup else []), noted=False):
                ready.append(engine)
        for _ in range(rounds):
            ready = [engine for engine in ready if attempt(engine, steps, noted=True)]
    finally:
        for engine in ready:
            engine.__exit__()
