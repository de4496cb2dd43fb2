"""Measuring one op: every implementation is compared with the specification, and those that are right take turns."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite.bench.ops import OPS, Maker, Op, Tensors, widened
from megalite.bench.peers import PEERS, Build, Unfit
from megalite.bench.results import Row
from megalite.bench.shapes import Shape
from megalite.bench.timing import Call, Clock, Peaks, Times, as_graph, in_turns
from megalite.progress import Progress

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest RMS error, as a share of the RMS of what is right."""
MOST_CALLS = 200
"""Calls in a turn."""


@dataclass(frozen=True)
class Job:
    """One op at several shapes. `implementations`: name -> builder, megalite's own first."""

    op: str
    shapes: Sequence[Shape]
    implementations: dict[str, Build]
    modes: Sequence[str]
    device: torch.device
    dtype: torch.dtype
    seconds: float = 1.0
    rounds: int = 5
    graphs: bool = False


def own(op: str, backends: Sequence[str], shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Build]:
    """megalite's implementations, named after what runs. Raises UserError for a backend that cannot."""

    def build(backend: str) -> Build:
        return lambda s, t: lambda: OPS[op].run(s, t, backend)

    chosen = {wanted: OPS[op].backend(shape, wanted, device, dtype) for wanted in backends}
    return {f"megalite {name}": build(wanted) for wanted, name in chosen.items()}


def peers(op: str, names: Sequence[str]) -> dict[str, Build]:
    return {name: PEERS[name].ops[op] for name in names}


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def gradients(call: Callable[[], Any], tensors: Tensors, upstream: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return torch.autograd.grad(outputs_of(call()), leaves, upstream)


@dataclass(frozen=True)
class Right:
    """What the specification gives in float64 at a small shape: outputs, and gradients for `upstream` ones."""

    op: Op
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    upstream: tuple[Tensor, ...]
    results: tuple[Tensor, ...]

    def error(self, build: Build) -> float:
        """The largest RMS error of a result, as a share of what is allowed; inf where one is no number."""
        tensors = self.op.inputs(self.shape, Maker(self.device, self.dtype))
        found = results_of(self.op, self.shape, build(self.shape, tensors), tensors, self.upstream)
        pairs = zip(found, self.results, strict=True)
        return max(relative_error(mine, right) for mine, right in pairs) / (TOLERANCE[self.dtype] * self.op.slack)


def right_at(op: Op, shape: Shape, device: torch.device, dtype: torch.dtype) -> Right:
    small = shape.capped(op.small)
    exact = {name: _wide(tensor) for name, tensor in op.inputs(small, Maker(device, dtype)).items()}

    def call() -> Any:
        return op.run(small, exact, "reference")

    make, upstream = Maker(device, dtype, seed=1), tuple[Tensor, ...]()
    if op.differentiable:
        upstream = tuple(make.normal(*output.shape) for output in outputs_of(call()))
    return Right(op, small, device, dtype, upstream, results_of(op, small, call, exact, upstream))


def results_of(
    op: Op, shape: Shape, call: Callable[[], Any], tensors: Tensors, upstream: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Outputs, FP8 multiplied out, and gradients."""
    outputs = outputs_of(call())
    found = tuple(output.detach().clone() for output in widened(shape, outputs))
    if not op.differentiable:
        return found
    arriving = [given.to(output.dtype) for given, output in zip(upstream, outputs, strict=True)]
    return (*found, *gradients(lambda: outputs, tensors, arriving))


def _wide(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def relative_error(found: Tensor, right: Tensor) -> float:
    """RMS error as a share of the RMS of what is right; inf where something is no number."""
    if found.shape != right.shape or not bool(found.isfinite().all()):
        return float("inf")
    size = float(right.double().norm())
    return float((found.double() - right.double()).norm()) / (size or 1.0)


def memory_bytes(call: Callable[[], Any], run: Call, tensors: Tensors, device: torch.device) -> int:
    """CUDA: what the call had allocated at its peak, beyond its inputs. CPU: outputs and what is kept for backward."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for output in outputs_of(call()):
            keep(output)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in inputs)


def measure(job: Job, peaks: Peaks) -> list[Row]:
    """A row for every shape, mode and implementation, also for those that are wrong or fail."""
    clock, rows = Clock(job.device), list[Row]()
    steps = len(job.shapes) * len(job.implementations) * (1 + len(job.modes) * job.rounds)
    with Progress(f"bench {job.op}", total=steps, unit="steps") as bar:
        for shape in job.shapes:
            rows += _at_shape(job, shape, peaks, clock, bar.advance)
    return rows


def _prepared(
    job: Job, shape: Shape, troubles: dict[str, str], advance: Callable[[], None]
) -> dict[str, tuple[Callable[[], Any], Tensors, float]]:
    """Those that are right: the call, its tensors, its error. `troubles` gets what is to be said of the others."""
    op, made = OPS[job.op], {}
    right = right_at(op, shape, job.device, job.dtype)
    try:
        tensors = op.inputs(shape, Maker(job.device, job.dtype))
    except RuntimeError as failure:  # they do not fit into memory; shorter sequences have been measured
        troubles |= dict.fromkeys(job.implementations, _trouble(failure))
        return {}
    for name, build in job.implementations.items():
        mine = dict(tensors)
        try:
            error = right.error(build)
            if error <= 1:
                made[name] = build(shape, mine), mine, error
            else:
                troubles[name] = f"wrong: error {error:.2g} times what {job.dtype} allows; not timed"
        except Exception as failure:  # another package's, of any kind: reported, and the others go on
            troubles[name] = _trouble(failure)
        advance()
    return made


def _at_shape(job: Job, shape: Shape, peaks: Peaks, clock: Clock, advance: Callable[[], None]) -> list[Row]:
    troubles: dict[str, str] = {}
    made = _prepared(job, shape, troubles, advance)
    rows = []
    for mode in job.modes:
        calls, memory, walls = {}, {}, {}
        for name, (call, mine, _) in made.items():
            try:
                calls[name] = _timed(job, mode, call, mine)
                memory[name] = memory_bytes(call, calls[name], mine, job.device)
                calls[name] = as_graph(calls[name]) if job.graphs else calls[name]
                walls[name] = clock.settle(calls[name], job.seconds)
            except Exception as failure:
                troubles[name] = _trouble(failure)
                calls.pop(name, None)
        counts = {name: max(1, min(MOST_CALLS, int(job.seconds / job.rounds / wall))) for name, wall in walls.items()}
        found = in_turns(clock, calls, counts, job.rounds, advance)
        for name in job.implementations:
            rows.append(_row(job, shape, mode, name, found.get(name), troubles.get(name, "ok"), peaks))
            rows[-1].memory, rows[-1].error = memory.get(name), made[name][2] if name in made else None
            if name not in found:
                for _ in range(job.rounds):
                    advance()
    return rows


def _trouble(failure: Exception) -> str:
    words = " ".join(str(failure).split())[:160]
    return f"cannot: {words}" if isinstance(failure, Unfit) else f"failed: {type(failure).__name__}: {words}"


def _timed(job: Job, mode: str, call: Callable[[], Any], tensors: Tensors) -> Call:
    if mode == "forward":
        return Call(lambda _: call())
    upstream = [torch.randn_like(output) for output in outputs_of(call())]
    if mode == "both":
        return Call(lambda _: gradients(call, tensors, upstream))
    return Call(lambda made: gradients(lambda: made, tensors, upstream), before=call)


def planned(job: Job) -> list[Row]:
    """The rows to come, nothing in them measured yet."""
    places = itertools.product(job.shapes, job.modes, job.implementations)
    return [_row(job, shape, mode, name, None, "", Peaks(1, 1)) for shape, mode, name in places]


def _row(job: Job, s: Shape, mode: str, name: str, times: Times | None, status: str, peaks: Peaks) -> Row:
    op = OPS[job.op]
    forward, backward = op.cost(s, job.dtype.itemsize)
    cost = {"forward": forward, "backward": backward, "both": forward + backward}[mode]
    work, peak = (cost.flops, peaks.flops) if op.of == "flops" else (cost.bytes, peaks.bytes)
    row = Row(
        op=job.op, shape=s.name, sizes=sizes(op, s), sequence_length=s.sequence_length, batch=s.batch, mode=mode,
        implementation=name, status=status, flops=cost.flops, bytes=cost.bytes, of=op.of,
    )  # fmt: skip
    if times is not None:
        row.median, row.low, row.high, row.calls = times.median, times.low, times.high, times.calls
        row.rate = work / times.median
        row.of_peak = row.rate / peak
    return row


def sizes(op: Op, s: Shape) -> str:
    """What the op depends on, as words: `heads=32 kv_heads=8 …`; what is off is left out."""
    names = {"softcap": "logit_softcap"} if "vocab" in op.keys else {}
    found = {key: getattr(s, names.get(key, key)) for key in op.keys}
    return " ".join(f"{key}={value}".lower() for key, value in found.items() if value is not None)
