"""One rank of one engine, started by peers/race.py: trains a few steps for each line on its input.

    python -m peers.worker ENGINE PRECISION MODEL THREADS FOLDER DESCRIPTOR

Answers are JSON lines on the descriptor given as the last argument, so that nothing a library prints is mistaken.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from peers.engines import ENGINES
from peers.job import Job


def peak_memory_mb() -> float:
    """VmHWM: the most memory this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def tokens(number: int, job: Job) -> torch.Tensor:
    """All sequences of a step, with one token more than there are positions: the same on every rank and engine."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, job.shape.vocab, (job.rows, job.shape.sequence + 1), generator=generator)


def main(name: str, precision: str, model: str, threads: str, folder: str, descriptor: str) -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(int(threads))
    torch.manual_seed(1)
    engine, _, variant = name.partition(":")
    job = Job(precision, variant, model, rank, ranks, int(threads), folder)
    with os.fdopen(int(descriptor), "w") as answers:

        def answer(**facts: Any) -> None:
            print(json.dumps(facts), file=answers, flush=True)

        started = time.perf_counter()
        step = ENGINES[engine](job)
        loss = step(tokens(0, job))
        answer(loss=loss, start_s=time.perf_counter() - started)
        number = 0
        for line in sys.stdin:
            seconds, cpu = [], time.process_time()
            for _ in range(int(line)):
                number += 1
                batch = tokens(number, job)
                began = time.perf_counter()
                step(batch)
                seconds.append(time.perf_counter() - began)
            answer(seconds=seconds, cpu_s=time.process_time() - cpu, memory_mb=peak_memory_mb())


if __name__ == "__main__":
    main(*sys.argv[1:])
