"""One shared pool of started gloo workers for every test that needs ranks.

`run_ranks(world, function, *arguments)` runs a module-level function on `world` processes joined in a fresh process
group and returns what each rank returned. A rank that fails or hangs fails the test with its
traceback, or with the stacks and the last collectives of all.
"""

import atexit
import ctypes
import faulthandler
import mmap
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from megalite.world import World, join, world_from_environment
from tests.thread_ranks import world_of_thread

CONTEXT = multiprocessing.get_context("fork")


KEPT, LINE = 8, 120
"""Of every rank's collectives the last so many are shown when one hangs, each in so many bytes."""


def _keep_last_calls(path: str) -> Callable[[], None]:
    """Every call of any communicator of this process leaves a line in a file that outlives a rank stuck in C. Returned:
    what forgets them."""
    from megalite import comm
    from megalite.comm import Communicator

    comm._HERE += (__file__,)  # a call's site is outside the door, and this is part of the door now
    with open(path, "r+b") as file:
        file.truncate(KEPT * LINE)
        memory = mmap.mmap(file.fileno(), KEPT * LINE)
    note, calls = Communicator._note, 0

    def noted(self: Any, op: str, axes: tuple[str, ...], tensor: torch.Tensor, ranks: tuple[int, ...]) -> None:
        nonlocal calls
        calls += 1
        text = f"{calls}: {op} over {','.join(axes)} {tensor.dtype}{list(tensor.shape)} among {list(ranks)}"
        memory[calls % KEPT * LINE : (calls % KEPT + 1) * LINE] = text.encode()[:LINE].ljust(LINE)
        note(self, op, axes, tensor, ranks)

    def forget() -> None:
        nonlocal calls
        calls, memory[:] = 0, bytes(KEPT * LINE)

    Communicator._note = noted  # type: ignore[method-assign]
    return forget


def _last_calls(path: str) -> str:
    with open(path, "rb") as file:
        lines = [file.read(LINE).decode(errors="replace").strip(" \0") for _ in range(KEPT)]
    return "\n".join(sorted(filter(None, lines), key=lambda line: int(line.partition(":")[0])))


def _die_with_parent() -> None:
    """A worker holds copies of its parent's pipes: if it outlived a crash, whoever reads them would wait for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _serve(pipe: Connection, stacks: str, calls: str) -> None:
    from megalite.world import leave

    _die_with_parent()
    torch.set_num_threads(1)
    forget = _keep_last_calls(calls)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        while True:
            try:
                rank, world, port, function, arguments = pipe.recv()
            except EOFError:
                return
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(world),
                LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="False",
            )
            forget()
            try:
                pipe.send(("ok", function(*arguments)))
            except BaseException:
                pipe.send(("error", traceback.format_exc()))
            finally:
                leave()


class Pool:
    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection, str, str]] = []

    def grow(self, size: int) -> None:
        while len(self.workers) < size:
            here, there = CONTEXT.Pipe()
            stacks, calls = (_empty_file(suffix) for suffix in (".stacks", ".calls"))
            process = CONTEXT.Process(target=_serve, args=(there, stacks, calls), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here, stacks, calls))

    def stop(self) -> None:
        for process, pipe, *files in self.workers:
            process.kill()
            process.join()
            pipe.close()
            for path in files:
                os.unlink(path)
        self.workers = []

    def run(self, world: int, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        self.grow(world)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        members = self.workers[:world]
        for rank, (_, pipe, *_) in enumerate(members):
            pipe.send((rank, world, port, function, arguments))
        results: dict[int, Any] = {}
        waiting = {pipe: rank for rank, (_, pipe, *_) in enumerate(members)}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                raise AssertionError(self._hang_report(world, sorted(waiting.values()), timeout))
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    kind, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    kind, value = "error", "the process died"
                if kind == "error":
                    self.stop()
                    raise AssertionError(f"rank {rank} of {world} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world)]

    def _hang_report(self, world: int, ranks: list[int], timeout: float) -> str:
        lines = [f"ranks {ranks} gave no answer in {timeout} s; the last collectives of all:"]
        lines += [f"rank {rank}:\n{_last_calls(self.workers[rank][3])}" for rank in range(world)]
        lines += ["their stacks:"]
        for rank in ranks:
            process, _, stacks, _ = self.workers[rank]
            os.kill(process.pid, signal.SIGUSR1)
            process.join(0.5)
            with open(stacks) as file:
                lines.append(f"rank {rank}:\n{file.read()}")
        self.stop()
        return "\n".join(lines)


def _empty_file(suffix: str) -> str:
    handle, path = tempfile.mkstemp(suffix=suffix)
    os.close(handle)
    return path


def joined_world() -> World:
    """Which rank this is, its process group joined; on `run_threads` too."""
    world = world_of_thread()
    if world is None:
        world = world_from_environment()
        join(world)
    return world


POOL = Pool()
atexit.register(POOL.stop)


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """Results of `function(*arguments)` by rank; the function joins the group itself through megalite.world."""
    sys.stdout.flush()
    return POOL.run(world, function, arguments, timeout)
