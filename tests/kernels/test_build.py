"""Building the CPU kernels and PyTorch's allocator: many processes at once, a changed source, a missing or broken
compiler; what the allocator does; and the header."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import megalite_kernels as kernels
import pytest
import torch
from megalite_kernels import build, dispatch

LOAD = "from megalite_kernels import build; import sys; sys.exit(build.library().functions is None)"


@pytest.fixture(autouse=True)
def needs_compiler() -> None:
    if build.library().functions is None:
        pytest.skip(build.library().reason)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What was found on this machine and decided by it is found anew, in the test and after it."""
    found = (build.library, build.allocator, kernels.tune_allocator, dispatch.this_machine, dispatch._decided)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


def test_processes_building_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    jobs = [subprocess.Popen([sys.executable, "-c", LOAD], env=environment) for _ in range(2)]
    assert [job.wait(timeout=240) for job in jobs] == [0, 0]
    built = list((tmp_path / ".cache" / "megalite").iterdir())
    assert [path.suffix for path in built] == [".so"], "one library, no half-made ones"


def test_a_changed_source_builds_anew(tmp_path: Path) -> None:
    folder = Path(build.__file__).parent / "native"
    for name in build.SOURCES + build.HEADERS:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    before = build._digest(tmp_path, "gcc", None)
    assert before == build._digest(folder, "gcc", None)
    (tmp_path / "rows.c").write_text("// changed")
    assert len({before, build._digest(tmp_path, "gcc", None), build._digest(folder, "gcc 2", None)}) == 3


@pytest.mark.usefixtures("forgetful")
def test_a_broken_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "gcc"
    broken.write_text("#!/bin/sh\ncase $1 in --version) echo broken;; *) echo no space left >&2; exit 1;; esac\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = kernels.explain()
    assert any("no space left" in line for line in lines), lines
    torch.testing.assert_close(kernels.swiglu(torch.ones(2), torch.ones(2)), torch.full((2,), 0.731058598))


@pytest.mark.usefixtures("forgetful")
def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMPILERS", ())
    assert "no C compiler" in kernels.explain()[0]


def test_explain_names_every_choice() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        text = "\n".join(kernels.explain("cpu", dtype))
        assert all(op in text for op in ("attention", "linear", "cross-entropy", "rms_norm"))
    assert "float64" in kernels.explain(dtype=torch.float64)[0]
    assert "torch.compile" in kernels.explain(compiled=True)[-1]


def test_freed_memory_stays_in_the_process() -> None:
    """In a process of its own: a large block's pages are still there when it is asked for again."""
    code = """if True:
        import ctypes, resource, megalite_kernels
        said, libc, size = megalite_kernels.tune_allocator(), ctypes.CDLL(None), 1 << 26
        assert said == megalite_kernels.tune_allocator()
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        def use():
            block = libc.malloc(size)
            ctypes.memset(block, 1, size)
            libc.free(block)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        before = use()
        assert "unchanged" in said or use() - before < 100, said
    """
    run_alone(code)


@pytest.fixture
def tuned() -> str:
    """What a process begins with that has PyTorch's blocks reused whole."""
    if build.allocator().functions is None:
        pytest.skip(build.allocator().reason)
    return """if True:
        import torch, megalite_kernels
        assert "whole" in megalite_kernels.tune_allocator()
    """


def run_alone(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_a_block_fits_where_one_of_its_size_has_been(tuned: str) -> None:
    """Between blocks that stay; PyTorch's own way puts each of them somewhere else. (Beside memory that was free before
    a block leaves a hole together with it, which may begin elsewhere.)"""
    run_alone(
        tuned
        + """
        blocks = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(64)]
        places = [block.data_ptr() for block in blocks[::2]]
        assert all(place % 64 == 0 for place in places)
        del blocks[::2]
        blocks += [torch.empty(1 << 20, dtype=torch.uint8) for _ in places]
        assert len({block.data_ptr() for block in blocks[-32:]} & set(places)) > 24
        """
    )


def test_memory_of_either_allocator_is_freed_as_it_was_made(tuned: str) -> None:
    """Grown, shared, handed to numpy, freed by another thread, counted by the profiler; too much is an error."""
    run_alone(
        "if True:\n        import torch\n        old = [torch.full((n,), 7.0) for n in range(3000)]\n"
        + tuned
        + """
        from concurrent.futures import ThreadPoolExecutor
        from torch.profiler import profile
        new = [torch.full((n,), 7.0) for n in range(3000)]
        for tensor in (old.pop(), new.pop()):
            tensor.untyped_storage().resize_(1 << 20)
            tensor.resize_(1 << 18)[2999:] = 7.0
            array, shared = tensor.numpy(), tensor.clone().share_memory_()
            del tensor
            assert (array == 7).all() and bool((shared == 7).all())
        assert all(bool((x == 7).all()) for x in old + new)
        def use(seed):
            sizes = torch.randint(0, 1 << 16, (300,), generator=torch.Generator().manual_seed(seed)).tolist()
            kept = {}
            for number, size in enumerate(sizes):
                kept[number % 17] = (torch.full((size,), float(number)), number)
                assert all(bool((x == n).all()) for x, n in kept.values())
            return [x for x, _ in kept.values()]
        with ThreadPoolExecutor(4) as pool:
            assert sum(map(len, pool.map(use, range(8)))) == 8 * 17
        with profile(profile_memory=True) as seen:
            x = torch.empty(1000)
        assert sum(event.self_cpu_memory_usage for event in seen.events()) == 4000
        try:
            torch.empty(1 << 60, dtype=torch.uint8)
        except RuntimeError as error:
            assert "not enough memory" in str(error), error
        else:
            raise AssertionError("a billion gigabytes")
        """
    )


@pytest.mark.usefixtures("forgetful")
def test_no_cpp_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ALLOCATOR_COMPILERS", ())
    assert "not reused whole, because no C++ compiler" in kernels.tune_allocator()
