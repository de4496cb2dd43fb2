"""Attention's Triton kernels: what must hold whatever the shape, how tiles are chosen, and descriptors' own loads."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is for Linux")
from megalite_kernels import attention, reference
from megalite_kernels.gpu import attention as kernels
from megalite_kernels.gpu.attention_tiles import Mask, band
from megalite_kernels.gpu.chips import CHIPS
from megalite_kernels.validate.cases.attention import qkv

from tests.kernels.support import random

FEW = settings(max_examples=3, deadline=None, derandomize=True)


def triton(*inputs: Tensor, scale: float = 0.3, **options: Any) -> Any:
    return attention(*inputs, scale=scale, backend="triton", **options)


def narrow(*sizes: int, **more: int) -> list[Tensor]:
    return [x.float() for x in qkv(*sizes, **more)]


def with_gradients(inputs: list[Tensor], upstream: int = 9, **options: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = triton(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, random(*out.shape, seed=upstream).to(out.dtype))]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.law("attention")
@FEW
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4), window=st.none() | st.integers(1, 20))
def test_packing_equals_separate_calls(lengths: list[int], window: int | None) -> None:
    cu = torch.tensor([0, *lengths]).cumsum(0)
    packed = [x[0] for x in narrow(sum(lengths), sum(lengths), 2, 1)]
    whole = with_gradients(packed, cu_seqlens_q=cu, window=window)
    leaves = [x.clone().requires_grad_() for x in packed]
    parts = [[x[None, a:b] for x in leaves] for a, b in cu.unfold(0, 2, 1).tolist()]
    out = torch.cat([reference.attention(*part, scale=0.3, window=window)[0] for part in parts])
    assert_same(whole, [out, *torch.autograd.grad(out, leaves, random(*out.shape, seed=9).float())])


@pytest.mark.law("attention")
@FEW
@given(keys=st.integers(2, 90), cut=st.floats(0.1, 0.9))
def test_parts_of_the_keys_merge_by_their_lse(keys: int, cut: float) -> None:
    q, k, v = narrow(20, keys, 2, 1)
    at = max(1, int(keys * cut))
    whole, lse = triton(q, k, v, causal=False, return_lse=True)
    parts = [triton(q, k[:, s], v[:, s], causal=False, return_lse=True) for s in (slice(0, at), slice(at, keys))]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * torch.exp(part - total).transpose(1, 2)[..., None] for out, part in parts)
    assert_same([merged, total], [whole, lse])


@pytest.mark.law("attention")
@FEW
@given(length=st.integers(1, 40), heads=st.sampled_from([(2, 1), (4, 2), (3, 3)]))
def test_grouped_heads_are_repeated_heads(length: int, heads: tuple[int, int]) -> None:
    q, k, v = narrow(length, length, *heads)
    grouped = with_gradients([q, k, v])
    times = heads[0] // heads[1]
    repeated = with_gradients([q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)])
    summed = [x.unflatten(2, (heads[1], times)).sum(3) for x in repeated[2:]]
    assert_same(grouped, [*repeated[:2], *summed])


@pytest.mark.law("attention")
@FEW
@given(length=st.integers(1, 70), batch=st.integers(1, 2))
def test_a_window_as_long_as_the_row_is_causal(length: int, batch: int) -> None:
    inputs = narrow(length, length, batch=batch)
    assert all(map(torch.equal, with_gradients(inputs, window=length), with_gradients(inputs)))


@pytest.mark.law("attention")
@FEW
@given(order=st.permutations(range(4)), softcap=st.none() | st.just(2.0))
def test_heads_do_not_know_their_number(order: list[int], softcap: float | None) -> None:
    inputs = narrow(20, 20, 4, 4)
    theirs = [x[:, :, order] for x in with_gradients(inputs, upstream=3, softcap=softcap)[:1]]
    assert torch.equal(triton(*(x[:, :, order] for x in inputs), softcap=softcap), theirs[0])


@pytest.mark.law("attention")
def test_reruns_give_the_same_bits() -> None:
    inputs = narrow(40, 40, 4, 2)
    documents = torch.tensor([0, 4]).repeat_interleave(torch.tensor([15, 25]))[None]
    first, second = (with_gradients(inputs, documents=documents) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_last_key_of_another_batch_is_not_read() -> None:
    q, k, v = (x.bfloat16() for x in narrow(20, 20, batch=2))
    k[1], v[1] = float("nan"), float("inf")
    for chip in (CHIPS["sm_80"], CHIPS["sm_90"]):
        out, _ = kernels.forward(q, k, v, None, band(20, 20, True, None), 0.3, 0.0, chip)
        assert bool(out[0].isfinite().all())


@pytest.mark.parametrize("dim", [16, 40])
def test_descriptors_read_what_pointers_read(dim: int) -> None:
    q, k, v = (x.bfloat16() for x in narrow(70, 90, 2, 1, dim, batch=2))
    results = []
    for chip in (CHIPS["sm_80"], CHIPS["sm_90"]):
        mask = band(70, 90, True, 50)
        out, lse = kernels.forward(q, k, v, None, mask, 0.3, 0.0, chip)
        results.append([out, *kernels.backward(q, k, v, None, out, lse, out, lse, mask, 0.3, 0.0, chip)[:3]])
    for pointers, descriptors in zip(*results, strict=True):
        torch.testing.assert_close(pointers, descriptors, rtol=2e-2, atol=2e-2)  # tiles differ, so sums do


@FEW
@given(st.data())
def test_the_transposed_mask_says_the_same(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    row, column = torch.arange(rows), torch.arange(columns)
    low = torch.tensor(sorted(data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))))
    high = torch.tensor(sorted(data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))))
    back = Mask(0, 0, low.int()[None], high.int()[None]).transposed(columns)
    assert back.low is not None and back.high is not None
    seen = (column >= low[:, None]) & (column < high[:, None])
    assert torch.equal(seen, ((row[:, None] >= back.low) & (row[:, None] < back.high)))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sizes", [(5, 5), (3, 8), (8, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_bands_are_the_reference_mask(sizes: tuple[int, int], causal: bool, window: int | None) -> None:
    queries, keys = sizes
    row, column = torch.arange(queries)[:, None], torch.arange(keys)
    seen = reference.visible(queries, keys, causal=causal, window=window)
    mask = band(queries, keys, causal, window)
    assert torch.equal(seen, (column >= row + mask.shift_low) & (column < row + mask.shift_high))
    back = mask.transposed(keys)
    assert torch.equal(seen, (row >= column + back.shift_low) & (row < column + back.shift_high))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_configurations_are_pure_and_whole(chip: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for sizes in ((32, 32), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)):
            for choose in (kernels.config, kernels.config_keys, kernels.config_queries):
                options = choose(chip, dtype, *sizes)
                assert options == choose(chip, dtype, *sizes)
                assert min(options["M"], options["N"]) >= 16 and options["num_warps"] in (1, 2, 4, 8)


def test_the_op_is_sound_and_fake_tensors_see_it() -> None:
    q, k, v = (x.requires_grad_() for x in narrow(6, 9, 2, 1))
    sinks = torch.tensor([0.5, 1.0], requires_grad=True)
    torch.library.opcheck(torch.ops.megalite.triton_attention.default, (q, k, v, sinks, None, None, -5, 4, 0.3, 0.0))
    with FakeTensorMode():
        shapes = ((2, 5, 4, 16), (2, 5, 2, 16), (2, 5, 2, 24))
        q, k, v = (torch.empty(*shape, requires_grad=True) for shape in shapes)
        out, lse = triton(q, k, v, return_lse=True)
        (out.sum() + lse.sum()).backward()
        assert out.shape == (2, 5, 4, 24) and lse.shape == (2, 4, 5) and v.grad is not None
