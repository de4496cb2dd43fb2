"""The levels of evidence for one case: exact enough (E1), safe in memory (E3), compiled (E4), no more traffic (E5)."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.gpu.chips import Chip
from megalite_kernels.gpu.compile import Compiled, compile_for
from megalite_kernels.gpu.interpret import Programs, arrange, sanitizer
from megalite_kernels.gpu.sanitize import Sanitizer
from megalite_kernels.validate.case import Case, Far, Outputs, Sweep
from megalite_kernels.validate.snapshot import launches


def outputs_and_gradients(
    op: partial[Outputs], inputs: Sequence[Tensor | None], dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Every output of op(*inputs in dtype), then every float input's gradient for fixed random upstream gradients."""
    leaves = [_leaf(x, dtype, device) for x in inputs]
    out = op(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    reached = [(o, u) for o, u in zip(outs, upstream, strict=True) if o.requires_grad]
    if reached:
        torch.autograd.backward([o for o, _ in reached], [u for _, u in reached])
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in wanted]
    return [x.detach().cpu() for x in (*outs, *grads)]


def _leaf(x: Tensor | None, dtype: torch.dtype, device: str) -> Tensor | None:
    if x is None or x.dtype != torch.float64:
        return None if x is None else x.to(device)
    return x.detach().to(device, dtype).clone().requires_grad_()


@dataclass(frozen=True)
class Exactness:
    """The worst result of a case in one dtype: its error over what is allowed, which is 1."""

    case: Case
    dtype: torch.dtype
    worst: float
    which: int

    @property
    def right(self) -> bool:
        return self.worst <= 1.0


def exactness(case: Case, dtype: torch.dtype, device: str = "cpu") -> Exactness:
    """E1: Triton's error against float64, allowed twice that of PyTorch in the same dtype and four roundings of the
    largest value (a difference that is exactly 0 has the rounding of its terms)."""
    rounded = [x.to(dtype).double() if x is not None and x.dtype == torch.float64 else x for x in case.inputs()]
    exact = outputs_and_gradients(partial(case.call, backend="reference"), rounded, torch.float64, device)
    plain = partial(case.plain) if case.plain else partial(case.call, backend="reference")
    usual = outputs_and_gradients(plain, rounded, dtype, device)
    ours = outputs_and_gradients(partial(case.call, backend="triton"), rounded, dtype, device)
    finite = [truth[truth.isfinite()].abs().max().item() for truth in exact if truth.isfinite().any()]
    largest, worst, which = max([1e-3, *finite]), 0.0, 0
    for number, (our, their, truth) in enumerate(zip(ours, usual, exact, strict=True)):
        assert our.shape == truth.shape, f"{case}: result {number} is {list(our.shape)}, not {list(truth.shape)}"
        if not our.dtype.is_floating_point:
            ratio = float(not torch.equal(our, truth.to(our.dtype))) * float("inf") if our.numel() else 0.0
            ratio = 0.0 if ratio != ratio else ratio
        else:
            floor = 4 * torch.finfo(our.dtype).eps * largest
            ratio = _error(our, truth) / (2 * _error(their, truth) + floor)
        if ratio > worst:
            worst, which = ratio, number
    return Exactness(case, dtype, worst, which)


def _error(x: Tensor, truth: Tensor) -> float:
    """Largest difference; infinite where one is finite and the other not, or NaN where the other is not."""
    x, truth = x.double(), truth.double()
    same = (x == truth) | (x.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, (x - truth).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return difference.max().item() if difference.numel() else 0.0


@dataclass(frozen=True)
class Safety:
    """E3 and E5 of a case in float32."""

    case: Case
    seen: Sanitizer
    same_in_any_order: bool
    all_written: bool

    @property
    def right(self) -> bool:
        return not self.seen.races and self.same_in_any_order and self.all_written

    def __str__(self) -> str:
        said = f"{self.case}: {self.seen.races} races"
        said += "" if self.same_in_any_order else ", other bits in another order of the programs"
        return said + ("" if self.all_written else ", an output not written everywhere")


def safety(case: Case) -> Safety:
    """E3: no access out of bounds (that raises OutOfBounds), no two programs storing to one place, every output
    written, and the same bits whatever the order of the programs.

    Fresh memory is filled with NaN (integers: with their largest), so what no program wrote differs from the reference.
    """
    watch = Sanitizer()
    run = partial(outputs_and_gradients, partial(case.call, backend="triton"), list(case.inputs()), torch.float32)
    with _filled_memory():
        token = sanitizer.set(watch)
        try:
            first = run()
        finally:
            sanitizer.reset(token)
        order = arrange.set(_shuffled)
        try:
            second = run()
        finally:
            arrange.reset(order)
    truth = outputs_and_gradients(partial(case.call, backend="reference"), list(case.inputs()), torch.float32)
    return Safety(
        case,
        watch,
        all(_same_bits(a, b) for a, b in zip(first, second, strict=True)),
        all(_same_gaps(a, t) for a, t in zip(first, truth, strict=True)),
    )


@contextlib.contextmanager
def _filled_memory() -> Iterator[None]:
    """Inside, torch fills what torch.empty returns."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def _shuffled(programs: Programs) -> Programs:
    return random.Random(7).sample(programs, len(programs))


def reaches(far: Far) -> Sanitizer:
    """E3 where offsets pass 2³¹: of every launch the last program alone is interpreted, on memory that only it touches.

    An offset that wraps around is out of bounds, which raises OutOfBounds.
    """
    watch = Sanitizer()
    tokens = sanitizer.set(watch), arrange.set(lambda programs: programs[-1:])
    try:
        far.run()
    finally:
        arrange.reset(tokens[1])
        sanitizer.reset(tokens[0])
    return watch


def repeats(case: Case, device: str) -> bool:
    """Two runs give the same bits, in every dtype."""
    run = partial(
        outputs_and_gradients, partial(case.call, backend="triton"), list(case.inputs()), torch.float32, device
    )
    return all(_same_bits(a, b) for a, b in zip(run(), run(), strict=True))


def _same_gaps(ours: Tensor, truth: Tensor) -> bool:
    """NaN in the same places; integers the same."""
    return torch.equal(ours.isnan(), truth.isnan()) if ours.dtype.is_floating_point else torch.equal(ours, truth)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def compiled(sweep: Sweep, chip: Chip) -> list[Compiled]:
    """E4: every kernel that the op's wrappers launch at this shape, built for `chip`."""
    return [compile_for(launch, chip, str(sweep)) for launch in launches(sweep, chip)]
