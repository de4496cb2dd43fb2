"""The ranks of a job on this host alone, started with torchrun's variables but without importing torch first.

No restarts and no other hosts: those are torchrun's.
"""

import ctypes
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

GRACE_S = 30.0
"""What the other ranks have to end by themselves, once one has failed."""
PORTS = range(20000, 32000)
"""Below the ports that systems give to outgoing connections, so that a free one stays free until rank 0 listens."""
PR_SET_PDEATHSIG = 1

Ended = queue.SimpleQueue[tuple[int, int]]
"""(rank, exit code as subprocess gives it) of each process that has ended."""


def run_ranks(command: Sequence[str], ranks: int, grace_s: float = GRACE_S) -> int:
    """Runs `command` as every rank of a world of `ranks` and waits; one rank is a plain process without variables.

    SIGTERM and SIGINT go on to every rank. When one fails the others are asked to end, and killed after `grace_s`.
    Returns the exit code of the first that failed (128 + the signal that killed it), or 0.
    """
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(_free_port())
    processes: list[subprocess.Popen[bytes]] = []

    def send(number: int, _frame: object = None) -> None:
        for process in processes:
            process.send_signal(number)

    previous = {number: signal.signal(number, send) for number in (signal.SIGTERM, signal.SIGINT)}
    ended: Ended = queue.SimpleQueue()
    try:
        for rank in range(ranks):
            variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            # A session of its own: Ctrl-C in the terminal reaches a rank through here, once.
            process = subprocess.Popen(
                command, env={**os.environ, **variables}, start_new_session=True, preexec_fn=_end_with_parent
            )
            processes.append(process)
        for rank, process in enumerate(processes):
            threading.Thread(target=lambda rank=rank, process=process: ended.put((rank, process.wait()))).start()
        first, code = _first_failure(ended, ranks)
        if code == 0:
            return 0
        if code < 0:
            others = "; the others are ended" if ranks > 1 else ""
            print(f"megalite: rank {first} was killed by {signal.Signals(-code).name}{others}", file=sys.stderr)
        send(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        return code if code > 0 else 128 - code
    finally:
        send(signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _first_failure(ended: Ended, ranks: int) -> tuple[int, int]:
    """Waits for the first rank that fails, or else for all: (rank, exit code)."""
    for _ in range(ranks):
        rank, code = ended.get()
        if code:
            break
    return rank, code


def _free_port() -> int:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port on this host")


def _end_with_parent() -> None:
    """Asks Linux to end this rank when the process that started it is killed; other systems have no such call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
