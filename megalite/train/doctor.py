"""What is on this machine and what works: one `Check` a fact, in the order shown. `run_checks` is all of `doctor`.

Only a "fail" keeps megalite from training; "warn" names something that will hurt later; "note" is for information.
"""

import fcntl
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megalite.progress import duration, quantity

State = Literal["ok", "note", "warn", "fail"]
PYTHON = (3, 11)
NEEDED = {
    "torch": "2.13",
    "numpy": "1.26",
    "hydra-core": "1.3.8",
    "tokenizers": "0.20",
    "safetensors": "0.4",
    "rich": "13",
    "pyarrow": "15",
    "zstandard": "0.22",
}
OPTIONAL = {
    "transformers": "loading exported models in Hugging Face transformers, parity tests",
    "wandb": "log.wandb",
    "tensorboard": "log.tensorboard",
    "triton": "GPU kernels",
    "flash-attn": "flash attention on CUDA",
    "deepspeed": "DeepSpeed ZeRO",
}
STALE_SECONDS = 1800
LOW_DISK, LOW_SHARED = 5e9, 256e6


@dataclass(frozen=True)
class Check:
    """`cure`: what to do about it, when there is something to do."""

    name: str
    state: State
    text: str
    cure: str = ""


def run_checks() -> Iterator[Check]:
    """Every check, as soon as it is done; about ten seconds in all."""
    machine = (python, packages, devices, compiler, kernels, memory, cache, jit_locks)
    for check in (*machine, optional_packages, peaks, processes):
        yield from check()


def python() -> Iterator[Check]:
    version = platform.python_version()
    if sys.version_info < PYTHON:
        yield Check("python", "fail", version, "install Python 3.11 or newer")
    else:
        yield Check("python", "ok", f"{version} at {sys.executable}")


def packages() -> Iterator[Check]:
    """The packages megalite cannot do without, and whether torch can be loaded at all."""
    for name, wanted in NEEDED.items():
        version = installed(name)
        if version is None:
            yield Check(name, "fail", "not installed", f"pip install '{name}>={wanted}'")
        elif _numbers(version) < _numbers(wanted):
            yield Check(name, "fail", f"{version}, older than {wanted}", f"pip install --upgrade '{name}>={wanted}'")
        else:
            yield Check(name, "ok", version)
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        yield Check("torch", "fail", f"cannot be loaded: {error}", "pip install --force-reinstall torch")


def devices() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch = _torch()
    capability = f", {torch.backends.cpu.get_cpu_capability()}" if torch else ""
    yield Check("cpu", "ok", f"{_cpu_name()}, {cores} cores{capability}")
    if torch is None:
        return
    if not torch.cuda.is_available():
        yield Check("gpu", "note", "none: training runs on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        text = f"{facts.name}, {quantity(facts.total_memory, 'B')}, compute capability {facts.major}.{facts.minor}"
        yield Check(f"gpu {number}", "ok", f"{text}, CUDA {torch.version.cuda}")
    if torch.distributed.is_nccl_available():
        yield Check("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Check("nccl", "warn", "this torch has no NCCL: one GPU only", "install torch with CUDA for Linux")


def compiler() -> Iterator[Check]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found:
        yield Check("compiler", "ok", found)
    else:
        cure = "install g++ (Debian: apt install g++)"
        yield Check("compiler", "warn", "no C++ compiler: no fused CPU kernels, no train.compile", cure)


def kernels() -> Iterator[Check]:
    """Which implementation of each op would run here; the CPU kernels are compiled now if they never were."""
    if _torch() is None:
        return
    from megalite_kernels import explain

    yield from (Check("kernels", "ok", line) for line in explain())


def memory() -> Iterator[Check]:
    sizes = _meminfo()
    if sizes:
        free, total = sizes.get("MemAvailable", 0), sizes.get("MemTotal", 0)
        yield Check("memory", "ok", f"{quantity(free, 'B')} free of {quantity(total, 'B')}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        if size < LOW_SHARED:
            cure = "in a container: --shm-size=1g; NCCL and data workers need it"
            yield Check("shared memory", "warn", quantity(size, "B"), cure)
        else:
            yield Check("shared memory", "ok", quantity(size, "B"))


def cache() -> Iterator[Check]:
    """Folders that a run writes to: the data cache and the current folder (runs/)."""
    for name, folder in (("cache", Path.home() / ".cache" / "megalite"), ("here", Path.cwd())):
        cure = "set data.cache to a folder you may write to" if name == "cache" else "set run.dir to such a folder"
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            yield Check(name, "fail" if name == "cache" else "warn", f"{folder}: {error.strerror}", cure)
            continue
        free = shutil.disk_usage(existing).free
        text = f"{folder}, {quantity(free, 'B')} free"
        yield Check(name, "ok" if free >= LOW_DISK else "warn", text, "" if free >= LOW_DISK else "make space")


def jit_locks() -> Iterator[Check]:
    """Lock files that a killed compilation left: the next one would wait for them for ever, without a word.

    torch's C++ extensions use a file that merely exists; inductor locks an open file, which dies with its process, so
    there only a lock that is held for long is worth a word.
    """
    stale = 0
    for lock in sorted(_extension_root().glob("**/lock")):
        age = time.time() - lock.stat().st_mtime
        if age > STALE_SECONDS:
            stale += 1
            yield Check("stale lock", "warn", f"{lock}, {duration(age)} old", f"if nothing compiles now: rm '{lock}'")
    for lock in sorted(_inductor_root().glob("**/*.lock")):
        age = time.time() - lock.stat().st_mtime
        if age > STALE_SECONDS and _held(lock):
            stale += 1
            yield Check(
                "held lock", "warn", f"{lock}, for {duration(age)}", "end the process that hangs in torch.compile"
            )
    if not stale:
        yield Check("compile locks", "ok", "no stale ones")


def optional_packages() -> Iterator[Check]:
    for name, enables in OPTIONAL.items():
        version = installed(name)
        if version:
            yield Check(name, "ok", f"{version} ({enables})")
        else:
            yield Check(name, "note", f"not installed; it enables: {enables}", f"pip install {name}")


def peaks() -> Iterator[Check]:
    torch = _torch()
    if torch is None:
        return
    from megalite.config.schema import PrecisionConfig
    from megalite.precision import choose_precision
    from megalite.train.peak import matmul_rate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speeds = {name: matmul_rate(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    rates = ", ".join(f"{name} {speed / 1e12:.3g} TFLOP/s" for name, speed in speeds.items())
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    chosen = choose_precision(PrecisionConfig(), device).name
    yield Check("matmul peak", "ok", f"{rates} on {device.type}{threads}; precision=auto takes {chosen}")


def processes() -> Iterator[Check]:
    if _torch() is None:
        return
    from megalite.train.selftest import run_selftest

    started = time.monotonic()
    problem = run_selftest()
    if problem:
        cure = "check that the host name resolves and no firewall cuts the loopback; GLOO_SOCKET_IFNAME=lo may help"
        yield Check("two processes", "fail", f"gloo: {problem}", cure)
    else:
        yield Check("two processes", "ok", f"gloo sum over 2 ranks, {time.monotonic() - started:.1f} s")


def installed(name: str) -> str | None:
    """The version of an installed distribution; nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Any:
    """torch, or None where it cannot be loaded (`packages` has said why)."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers: 2.13.0+cpu is (2, 13, 0)."""
    parts: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _cpu_name() -> str:
    return next(_lines(Path("/proc/cpuinfo"), "model name"), "") or platform.processor() or platform.machine()


def _meminfo() -> dict[str, float]:
    """Bytes by name from /proc/meminfo; empty where there is none."""
    names = ("MemTotal", "MemAvailable")
    found = {name: next(_lines(Path("/proc/meminfo"), name), "") for name in names}
    return {name: float(text.split()[0]) * 1024 for name, text in found.items() if text}


def _lines(path: Path, name: str) -> Iterator[str]:
    """Values of the `name: value` lines of a file that may be missing."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        label, _, value = line.partition(":")
        if label.strip() == name:
            yield value.strip()


def _extension_root() -> Path:
    """Where torch builds C++ extensions."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(own) if own else Path.home() / ".cache" / "torch_extensions"


def _inductor_root() -> Path:
    """Where torch.compile keeps its code."""
    own = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(own) if own else Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _held(lock: Path) -> bool:
    """Whether some process holds a lock on the file."""
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
