"""AdamW beside PyTorch's, gradient norms, Newton–Schulz: laws on random inputs, every backend; Triton interpreted."""

import math

import megalite_kernels as kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux")
from megalite_kernels.gpu import adamw
from megalite_kernels.gpu.interpret import sanitizer
from megalite_kernels.gpu.launch import recording
from megalite_kernels.gpu.sanitize import OutOfBounds, Sanitizer

FEW = settings(max_examples=12)
BACKENDS = ("triton", "torch", "reference")
shapes = st.lists(st.sampled_from([(1,), (7, 5), (0, 3), (4096,), (4097,), (9000,)]), min_size=1, max_size=4)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_five_steps_are_those_of_pytorch(backend: str, eps: float) -> None:
    """In float32, and both against torch.optim.AdamW in float64."""
    sizes = ((5000,), (3, 7), (64, 65))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": eps, "weight_decay": 0.1}
    params = [normal(size, n) for n, size in enumerate(sizes)]
    theirs, exact = ([torch.nn.Parameter(x.to(dtype)) for x in params] for dtype in (torch.float32, torch.float64))
    means, squares, step = [torch.zeros_like(x) for x in params], [torch.zeros_like(x) for x in params], torch.zeros(())
    optimizers = [torch.optim.AdamW(weights, **options, foreach=False) for weights in (theirs, exact)]
    for count in range(5):
        grads = [normal(size, 10 * count + n) for n, size in enumerate(sizes)]
        for weights, optimizer in zip((theirs, exact), optimizers, strict=True):
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad.to(weight.dtype)
            optimizer.step()
        kernels.adamw_step(params, grads, means, squares, step, **options, backend=backend)
    assert step == 5
    for ours, their, truth in zip(params, theirs, exact, strict=True):
        error, usual = ((x.detach() - truth.detach()).abs().max().item() for x in (ours, their))
        assert error <= 2 * usual + 1e-6
    for n, weight in enumerate(exact):
        torch.testing.assert_close(means[n].double(), optimizers[1].state[weight]["exp_avg"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(squares[n].double(), optimizers[1].state[weight]["exp_avg_sq"], rtol=1e-5, atol=1e-6)


@pytest.mark.law("adamw")
@FEW
@given(shapes, st.sampled_from(BACKENDS), st.booleans(), st.integers(0, 9))
def test_a_skipped_step_leaves_everything(some: list[tuple[int, ...]], backend: str, skip: bool, seed: int) -> None:
    params = [normal(shape, seed + n) for n, shape in enumerate(some)]
    grads = [x + 1 for x in params]
    state = [[x * 0.1 for x in params], [x * x for x in params]]
    copies = [x.bfloat16() for x in params]
    before = [x.clone() for one in (params, *state, grads, copies) for x in one]
    step = torch.tensor(3.0)
    options = {"lr": 0.1, "grad_scale": torch.tensor(0.5), "skip": torch.tensor(skip), "backend": backend}
    kernels.adamw_step(params, grads, *state, step, **options, copies=copies)
    after = [x for one in (params, *state, grads, copies) for x in one]
    unchanged = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert step == (3.0 if skip else 4.0)
    assert all(unchanged[3 * len(some) : 4 * len(some)]), "gradients stay as they are"
    assert all(unchanged) if skip else not any(same for same, x in zip(unchanged, params, strict=False) if x.numel())


@pytest.mark.law("adamw")
@FEW
@given(shapes, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 9))
def test_one_launch_is_a_launch_for_each_tensor(some: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    """Neighbours in the table change nothing, nor does where a tensor begins in memory."""
    runs = []
    for shift, together in ((0, True), (1, False)):
        params = [normal((x.numel() + 1,), n + seed)[shift:][: x.numel()].copy_(x.flatten())
                  for n, x in enumerate(normal(shape, n) for n, shape in enumerate(some))]  # fmt: skip
        grads = [(x * 0.3).to(dtype) for x in params]
        means, squares, step = [x * 0.1 for x in params], [x * x for x in params], torch.tensor(1.0)
        groups = [range(len(some))] if together else [[n] for n in range(len(some))]
        for group in groups:
            lists = ([one[n] for n in group] for one in (params, grads, means, squares))
            kernels.adamw_step(*lists, step.clone(), lr=0.1, weight_decay=0.1, backend="triton")
        runs.append([*params, *means, *squares])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tables_are_made_once() -> None:
    params = [normal((100,), 0), normal((5,), 1)]
    assert adamw.table(params, params) is adamw.table(params, params)
    assert adamw.table(params, params[::-1]) is not adamw.table(params, params)


def test_the_watch_sees_what_a_table_leads_to() -> None:
    x = normal((100,), 0)
    for told, fails in ((x, False), (x[:50], True)):
        token = sanitizer.set(Sanitizer())
        try:
            with recording() as launches:
                adamw.norm([x])
            (one,) = launches
            from megalite_kernels.gpu.interpret import interpret

            if fails:
                with pytest.raises(OutOfBounds):
                    interpret(one.kernel, one.grid, one.arguments, [told])
            else:
                interpret(one.kernel, one.grid, one.arguments, [told])
        finally:
            sanitizer.reset(token)


@pytest.mark.law("gradient_norm")
@FEW
@given(shapes, st.sampled_from(BACKENDS), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 9))
def test_the_norm_is_that_of_all_elements(
    some: list[tuple[int, ...]], backend: str, dtype: torch.dtype, seed: int
) -> None:
    tensors = [normal(shape, seed + n).to(dtype) for n, shape in enumerate(some)]
    truth = torch.cat([x.double().flatten() for x in tensors]).norm()
    norm = kernels.gradient_norm(tensors, backend=backend)
    assert norm.dtype == torch.float64 and norm.shape == ()
    rounding = 2.0**-8 if dtype == torch.bfloat16 and backend == "torch" else 1e-6  # PyTorch rounds each norm to bf16
    torch.testing.assert_close(norm, truth, rtol=rounding, atol=0)
    assert torch.equal(norm, kernels.gradient_norm(tensors, backend=backend))


@pytest.mark.law("gradient_norm")
@pytest.mark.parametrize("backend", BACKENDS)
def test_inf_and_nan_show_in_the_norm(backend: str) -> None:
    for broken in (math.inf, -math.inf, math.nan):
        tensors = [torch.ones(5000), torch.tensor([1.0, broken])]
        norm = kernels.gradient_norm(tensors, backend=backend).item()
        assert math.isnan(norm) if math.isnan(broken) else norm == math.inf
    assert kernels.gradient_norm([], backend=backend) == 0


@pytest.mark.law("newton_schulz")
@FEW
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 9))
def test_newton_schulz_leaves_singular_values_near_one(rows: int, columns: int, seed: int) -> None:
    """Where they were not far below the largest: five steps raise what is above about a thousandth of the norm."""
    u, _, v = torch.linalg.svd(normal((rows, columns), seed), full_matrices=False)
    size = torch.linspace(0.3, 1.0, min(rows, columns))
    found = torch.linalg.svdvals(kernels.newton_schulz(u * size @ v, backend="triton"))
    assert found.min() > 0.6 and found.max() < 1.3


@pytest.mark.law("newton_schulz")
@FEW
@given(st.integers(1, 70), st.integers(1, 70), st.integers(-8, 8), st.sampled_from([torch.float32, torch.bfloat16]))
def test_newton_schulz_of_transposes_stacks_and_multiples(
    rows: int, columns: int, power: int, dtype: torch.dtype
) -> None:
    x = normal((2, rows, columns), rows).to(dtype)
    y = kernels.newton_schulz(x, 2, eps=0.0, backend="triton")
    one = kernels.newton_schulz(x[1], 2, eps=0.0, backend="triton")
    assert torch.equal(y[1], one)
    assert torch.equal(kernels.newton_schulz(x[1] * 2.0**power, 2, eps=0.0, backend="triton"), one)
    if rows != columns:
        assert torch.equal(kernels.newton_schulz(x[1].mT, 2, eps=0.0, backend="triton"), one.mT)


def test_misfits_are_refused() -> None:
    x = [torch.ones(4, 3)]
    step = torch.zeros(())
    for lists, said in (
        ((x, [torch.ones(3, 4)], x, x), "the params' shapes"),
        ((x, [torch.ones(3, 4).T], x, x), "must be contiguous"),
        ((x * 2, [x[0], x[0].half()], x * 2, x * 2), "one dtype"),
    ):
        with pytest.raises(ValueError, match=said):
            kernels.adamw_step(*lists, step, lr=0.1)
    with pytest.raises(ValueError, match="wants weights, gradients and moments alike"):
        kernels.adamw_step(x, [x[0].bfloat16()], x, x, step, lr=0.1, backend="torch")
    with pytest.raises(ValueError, match="one dtype and on one device"):
        kernels.gradient_norm([x[0], x[0].half()])
    with pytest.raises(ValueError, match="needs matrices"):
        kernels.newton_schulz(torch.ones(3))


def test_registered_ops_are_sound() -> None:
    def lists() -> list[list[Tensor]]:
        return [[normal((20,), n), normal((3, 4), n)] for n in range(4)]

    params, grads, means, squares = lists()
    squares = [x.square() for x in squares]
    arguments = (params, grads, means, squares, [], torch.zeros(()), 0.1, 0.9, 0.99, 1e-8, 0.1, None, None)
    torch.library.opcheck(
        torch.ops.megalite.triton_adamw.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    torch.library.opcheck(torch.ops.megalite.triton_gradient_norm.default, (params,))
    torch.library.opcheck(
        torch.ops.megalite.triton_newton_schulz.default, (normal((2, 5, 9), 0), 1, 3.4, -4.8, 2.0, 1e-7)
    )
