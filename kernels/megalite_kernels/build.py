"""Compiles the sources of `native/` once on this machine and loads them: the CPU kernels behind the fast paths, in C,
and PyTorch's allocator, in C++.

The library lies in the user's cache folder, named after everything that decides its contents (sources, compiler,
flags, processor), so a changed machine or source builds anew. It is built beside its place and renamed, so any
number of processes may do this at once. Without a compiler the ops run as plain PyTorch, and `explain()` says so.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = ("attention.c", "fp8.c", "moe.c", "rows.c")
HEADERS = ("simd.h",)
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("gcc", "cc", "clang")
ALLOCATOR = "allocator.cpp"
ALLOCATOR_FLAGS = ("-std=gnu++20", "-O2", "-fPIC")
ALLOCATOR_COMPILERS = ("g++", "c++", "clang++")
TIMEOUT_S = 120


@dataclass(frozen=True)
class Library:
    """The loaded kernels, or None and the reason; `threaded` when they share PyTorch's own OpenMP threads."""

    functions: ctypes.CDLL | None
    reason: str
    threaded: bool = False


@functools.cache
def library() -> Library:
    """The CPU kernels of this process; compiled at the first call on a machine (a few seconds)."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return Library(None, f"no C compiler ({', '.join(COMPILERS)}) on the PATH")
    folder = Path(__file__).parent / "native"
    try:
        version = _version(compiler)
        openmp = _torch_openmp() if "clang" not in version else None
        path = _cache_folder() / f"kernels-{_digest(folder, version, openmp)}.so"
        if not path.exists():
            _compile(compiler, folder, path, openmp)
        return Library(ctypes.CDLL(str(path)), f"compiled by {Path(compiler).name}", threaded=openmp is not None)
    except (OSError, subprocess.SubprocessError) as error:
        return Library(None, _why(compiler, error))


@functools.cache
def allocator() -> Library:
    """`reuse_whole_blocks`, which changes PyTorch's allocator; compiled against the headers that come with it."""
    compiler = next((found for name in ALLOCATOR_COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return Library(None, f"no C++ compiler ({', '.join(ALLOCATOR_COMPILERS)}) on the PATH")
    source, home = Path(__file__).parent / "native" / ALLOCATOR, Path(torch.__file__).parent
    flags = (*ALLOCATOR_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={torch._C._GLIBCXX_USE_CXX11_ABI:d}")
    try:
        hasher = hashlib.blake2b(source.read_bytes(), digest_size=12)
        hasher.update("\0".join((_version(compiler), *flags, torch.__version__, platform.platform())).encode())
        path = _cache_folder() / f"allocator-{hasher.hexdigest()}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                built = str(Path(scratch) / "allocator.so")
                where = (f"-I{home / 'include'}", str(source), f"-L{home / 'lib'}", "-lc10")
                _run(compiler, *flags, "-shared", "-o", built, *where)
                os.replace(built, path)
        return Library(ctypes.CDLL(str(path)), f"compiled by {Path(compiler).name}")
    except (OSError, subprocess.SubprocessError) as error:
        return Library(None, _why(compiler, error))


def _why(compiler: str, error: Exception) -> str:
    detail = getattr(error, "stderr", None) or str(error)
    return f"{compiler} failed: {detail.strip().splitlines()[-1] if detail.strip() else error!r}"


def _version(compiler: str) -> str:
    return _run(compiler, "--version").splitlines()[0]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout


def _torch_openmp() -> Path | None:
    """PyTorch's own libgomp: with it there is one pool of threads in the process. None: build without threads."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    found += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*"))
    return found[0] if found else None


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    decisive = ("model", "flags", "Features", "CPU part")
    return "\n".join(line for line in dict.fromkeys(lines) if line.startswith(decisive))


def _digest(folder: Path, version: str, openmp: Path | None) -> str:
    hasher = hashlib.blake2b(digest_size=12)
    for name in SOURCES + HEADERS:
        hasher.update((folder / name).read_bytes())
    hasher.update("\0".join((version, *FLAGS, str(openmp), _processor(), platform.platform())).encode())
    return hasher.hexdigest()


def _cache_folder() -> Path:
    """~/.cache/megalite, or a private folder in the temporary directory when home cannot be written."""
    home = Path(os.path.expanduser("~")) / ".cache" / "megalite"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    private = Path(tempfile.gettempdir()) / f"megalite-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid():
        raise OSError(f"{private} belongs to somebody else")
    return private


def _compile(compiler: str, folder: Path, path: Path, openmp: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [str(Path(scratch) / f"{Path(name).stem}.o") for name in SOURCES]
        threads = ("-fopenmp",) if openmp else ("-Wno-unknown-pragmas",)
        jobs = [
            subprocess.Popen(
                [compiler, *FLAGS, *threads, "-c", str(folder / name), "-o", target],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name, target in zip(SOURCES, objects, strict=True)
        ]
        for job in jobs:
            _, errors = job.communicate(timeout=TIMEOUT_S)
            if job.returncode:
                raise subprocess.CalledProcessError(job.returncode, compiler, stderr=errors)
        built = str(Path(scratch) / "kernels.so")
        _run(compiler, "-shared", "-o", built, *objects, *((str(openmp),) if openmp else ()), "-lm")
        os.replace(built, path)
