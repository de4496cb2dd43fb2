"""Joining the job: which process this is, its device, and the process group that all meshes are cut from."""

import atexit
import ctypes
import datetime
import os
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from megalite.errors import UserError


@dataclass(frozen=True)
class World:
    """This process: `rank` of `size`; `local_rank` of `local_size` on this host; `attempt` counts restarts."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    attempt: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def world_from_environment() -> World:
    """Read what torchrun tells each process; a plain process is a world of one."""
    words = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    if all(value is None for value in words.values()):
        return World()
    missing = [name for name, value in words.items() if value is None]
    if missing:
        raise UserError(
            f"environment: {', '.join(missing)} not set though other torchrun variables are; start with torchrun"
        )
    rank, size, local_rank, local_size = (int(value or 0) for value in words.values())
    return World(rank, size, local_rank, local_size, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def usable_cores() -> int:
    """Cores that this process may use: its affinity (taskset, Slurm) and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        pass
    return cores


def join(world: World, timeout_s: float = 600.0) -> None:
    """Start the default process group (gloo on CPU, NCCL beside it on CUDA). A world of one starts none.

    The store is prefixed with the attempt: after a restart, workers would otherwise read the dead attempt's addresses.
    """
    if world.size == 1 or dist.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store = dist.PrefixStore(f"attempt{world.attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def wait_for_rank_zero(name: str, rank: int, days: float = 7.0) -> None:
    """Rank 0 marks `name` as done, the others wait for the mark; a launcher that loses rank 0 ends them."""
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set(name, "done")
    else:
        store.wait([name], datetime.timedelta(days=days))


def leave() -> None:
    """End the process group, so that the interpreter exits without waiting for its threads."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End this process as the interpreter would, but leave it standing while the process dies (what C libraries have
    registered with atexit is not called).

    gloo's threads let go of their last tensors when they get to it, and one that asks an interpreter which is being
    torn down for its lock aborts the process after all its work is done (torch 2.13, pytorch/pytorch#190489).
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # its reader has left, or it is full, closed or missing
                stream.flush()
        ctypes.CDLL(None).fflush(None)  # what C libraries have printed
    finally:
        os._exit(code)
