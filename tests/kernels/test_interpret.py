"""The interpreter's casts and sums, against PyTorch's, over every code of every narrow type; and its memory watch."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux")
import triton.language as tl  # noqa: E402
from megalite_kernels.gpu.interpret import sanitizer  # noqa: E402
from megalite_kernels.gpu.launch import elsewhere, launch, recording  # noqa: E402
from megalite_kernels.gpu.sanitize import OutOfBounds, Sanitizer  # noqa: E402

NARROW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def _cast(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < size)
    tl.store(y_ptr + place, x.to(tl.float32).to(y_ptr.dtype.element_ty), mask=place < size)


@triton.jit
def _double(x_ptr, y_ptr, size, SKIP: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * (BLOCK - SKIP) + tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place) * 2)


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + row * SIZE + column), tl.load(b_ptr + row * SIZE + column)
    tl.store(c_ptr + row * SIZE + column, tl.dot(a, b))


def _codes(dtype: torch.dtype) -> torch.Tensor:
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.float(), b.float()
    return bool(((a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_code_widens_and_comes_back(dtype: torch.dtype) -> None:
    codes = _codes(dtype)
    wide, back = torch.empty(len(codes)), torch.empty_like(codes)
    launch(_cast, (triton.cdiv(len(codes), 1024),), codes, wide, len(codes), BLOCK=1024)
    assert _same(wide, codes.float())
    launch(_cast, (triton.cdiv(len(codes), 1024),), wide, back, len(codes), BLOCK=1024)
    finite = codes.float().isfinite()
    assert _same(back[finite], codes[finite])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrowing_rounds_to_even_and_fp8_saturates(dtype: torch.dtype) -> None:
    """Every midpoint between two codes, its neighbours, and random values of every magnitude."""
    codes = _codes(dtype).float()
    codes = codes[codes.isfinite()].unique()
    middle = (codes[1:] + codes[:-1]) / 2
    spread = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * codes[-1].clamp(max=1e6)
    around = [
        middle,
        middle.nextafter(torch.tensor(3e38)),
        middle.nextafter(torch.tensor(-3e38)),
        spread,
        -spread * 1e-4,
    ]
    x, largest = torch.cat([*around, torch.tensor([0.0, -0.0, float("nan")])]), torch.finfo(dtype).max
    y = torch.empty(len(x), dtype=dtype)
    launch(_cast, (triton.cdiv(len(x), 1024),), x, y, len(x), BLOCK=1024)
    assert _same(y, (x.clamp(-largest, largest) if dtype.itemsize == 1 else x).to(dtype))


@pytest.mark.parametrize("dtype", (*NARROW, torch.float32), ids=str)
def test_products_accumulate_in_float32(dtype: torch.dtype) -> None:
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    c = torch.empty(32, 32)
    launch(_product, (1,), a, b, c, SIZE=32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_the_watch_counts_bytes() -> None:
    x, y = torch.ones(64), torch.empty(64)
    token, watch = sanitizer.set(seen := Sanitizer()), seen
    try:
        launch(_double, (2,), x, y, 64, SKIP=0, BLOCK=32)
    finally:
        sanitizer.reset(token)
    assert (watch.loaded, watch.stored, watch.races) == (256, 256, 0)


@pytest.mark.parametrize(("held", "skip", "races"), [(63, 0, None), (64, 4, 4)])
def test_the_watch_sees_reads_past_the_end_and_races(held: int, skip: int, races: int | None) -> None:
    x, y = torch.ones(64)[:held], torch.empty(64)
    token, watch = sanitizer.set(seen := Sanitizer()), seen
    try:
        if races is None:
            with pytest.raises(OutOfBounds, match="load in program"):
                launch(_double, (2,), x, y, 64, SKIP=skip, BLOCK=32)
        else:
            launch(_double, (2,), x, y, 64, SKIP=skip, BLOCK=32)
            assert watch.races == races
    finally:
        sanitizer.reset(token)


def test_recording_runs_nothing() -> None:
    x, y = torch.ones(64, device="meta"), torch.zeros(64)
    with recording() as launches:
        launch(_double, (2,), x, y, 64, SKIP=0, BLOCK=32, num_warps=8)
    assert [(one.grid, one.num_warps, one.arguments["BLOCK"]) for one in launches] == [((2,), 8, 32)]
    assert not y.any()


def test_launches_can_go_elsewhere_and_come_back() -> None:
    """As on a GPU: the kernel sees copies, views of one memory stay so, and what it wrote arrives."""
    memory = torch.arange(8.0)
    left, right = memory[:4], memory[2:6]

    class Kernel:
        @staticmethod
        def fn(a_ptr: torch.Tensor, b_ptr: torch.Tensor, size: int) -> None: ...

        def __getitem__(self, grid: tuple[int, ...]) -> "Kernel":
            return self

        def __call__(self, a_ptr: torch.Tensor, b_ptr: torch.Tensor, size: int, **options: int) -> None:
            assert a_ptr.data_ptr() != left.data_ptr()
            a_ptr += size
            b_ptr *= 2

    token = elsewhere.set("cpu")
    try:
        launch(Kernel(), (1,), left, right, 10)
    finally:
        elsewhere.reset(token)
    assert memory.tolist() == [10, 11, 24, 26, 8, 10, 6, 7]


@pytest.mark.parametrize("dtype", (*NARROW, torch.float32), ids=str)
def test_a_products_elements_do_not_depend_on_how_it_lies(dtype: torch.dtype) -> None:
    """Attention's way back makes the scores anew, turned; what is far below 1 must not become e to a difference."""
    a, b = ((torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype) for seed in (0, 1))
    c, turned = torch.empty(32, 32), torch.empty(32, 32)
    launch(_product, (1,), a, b, c, SIZE=32)
    launch(_product, (1,), b.T.contiguous(), a.T.contiguous(), turned, SIZE=32)
    assert torch.equal(c, turned.T)
    if dtype == torch.float32:
        total = torch.zeros(32, 32)
        for k in range(32):  # float64 holds a product of float32 exactly: a fused multiply-add
            total = (a[:, k, None].double() * b[None, k].double() + total.double()).float()
        assert torch.equal(c, total)
