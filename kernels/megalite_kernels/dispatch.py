"""Which implementation of an op runs, and why not the others.

Each op lists its backends in order of preference; each backend says what keeps it from a request. `auto` takes the
first that nothing keeps back; a backend asked for by name runs or is refused with its reason. The decision depends on
device, chip, dtype and the features asked for, never on a tensor's values, and is made once for each such request.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megalite_kernels.build import library
from megalite_kernels.capability import constant_when_compiled


@dataclass(frozen=True)
class Machine:
    """What is installed: package -> version. Tests give their own."""

    packages: tuple[tuple[str, str], ...]
    compiled: str | None
    """Why the CPU kernels in C do not run; None when they do."""
    real: bool = False
    """Whether it is this very machine, where packages can be tried."""

    def version_of(self, package: str) -> str | None:
        return dict(self.packages).get(package)


PACKAGES = {
    "triton": ("triton", "triton-windows", "triton-rocm", "pytorch-triton", "pytorch-triton-rocm"),
    "flash-attn": ("flash-attn",),
    "flash-attn-3": ("flash-attn-3",),
    "flash-attn-4": ("flash-attn-4",),
}
"""Package -> the distributions that bring it."""
MODULES = {
    "flash-attn": ("flash_attn",),
    "flash-attn-3": ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    "flash-attn-4": ("flash_attn.cute",),
}
"""Package -> its module, by the names that its versions gave it."""


@functools.cache
def import_module(package: str) -> Any:
    """The module of a flash-attn package. Raises ImportError with what each name said."""
    said = []
    for name in MODULES[package]:
        try:
            return importlib.import_module(name)
        except Exception as error:  # a build for another torch fails in its own ways
            said.append(f"{name}: {error}")
    raise ImportError("; ".join(said))


@functools.cache
def import_failure(package: str) -> str | None:
    """Why a package that is installed cannot be used; None: it can."""
    try:
        import_module(package)
    except ImportError as error:
        return str(error)
    return None


@functools.cache
def this_machine() -> Machine:
    found: dict[str, str] = {}
    for package, distributions in PACKAGES.items():
        for distribution in distributions:
            with contextlib.suppress(PackageNotFoundError):
                found.setdefault(package, version(distribution))
    built = library()
    return Machine(tuple(found.items()), None if built.functions is not None else built.reason, real=True)


@dataclass(frozen=True)
class Request:
    """An op to run. `chip`: of the GPU, "" on a CPU. `features`: what of the op is asked for, as (name, value)."""

    op: str
    device: str
    chip: str
    dtype: torch.dtype
    features: tuple[tuple[str, Any], ...] = ()

    def feature(self, name: str, default: Any = None) -> Any:
        return dict(self.features).get(name, default)


Obstacle = Callable[[Request, Machine], str | None]
"""Why a backend cannot take a request, in a few words; None: it can."""


@dataclass(frozen=True)
class Backend:
    """`cannot` holds always; `would_not` only when nobody asked for this backend by name."""

    name: str
    cannot: Obstacle
    would_not: Obstacle = field(default=lambda request, machine: None)


@dataclass(frozen=True)
class Decision:
    backend: str
    rejected: tuple[tuple[str, str], ...]
    """The backends before it, and what kept each back."""

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.rejected)
        return f"{self.backend}{f' ({reasons})' if reasons else ''}"


def decide(backends: tuple[Backend, ...], request: Request, machine: Machine, wanted: str = "auto") -> Decision:
    """Raises ValueError for a backend that does not exist or cannot take the request."""
    if wanted != "auto":
        named = {backend.name: backend for backend in backends}
        if wanted not in named:
            raise ValueError(f"{request.op}: no backend {wanted!r}; there are auto, {', '.join(named)}")
        obstacle = named[wanted].cannot(request, machine)
        if obstacle:
            raise ValueError(f"{request.op}: backend {wanted!r} cannot run this: {obstacle}")
        return Decision(wanted, ())
    rejected: list[tuple[str, str]] = []
    for backend in backends:
        obstacle = backend.cannot(request, machine) or backend.would_not(request, machine)
        if obstacle is None:
            return Decision(backend.name, tuple(rejected))
        rejected.append((backend.name, obstacle))
    raise ValueError(f"{request.op}: no backend can run this: {'; '.join(f'{n}: {why}' for n, why in rejected)}")


def no_triton(request: Request, machine: Machine) -> str | None:
    """What keeps any Triton kernel back. Each op's own limits come on top."""
    found = machine.version_of("triton")
    if found is None:
        return "Triton is not installed (pip install triton; Linux only)"
    if tuple(int(part) for part in found.split(".")[:2]) < (3, 6):
        return f"Triton {found} is older than 3.6"
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels are for float32, bf16 and fp16, not {str(request.dtype).removeprefix('torch.')}"
    if request.device not in ("cuda", "cpu"):
        return f"no kernels for {request.device}"
    return None


def interpreted(request: Request, machine: Machine) -> str | None:
    """Kernels on the CPU run program by program in an interpreter: for tests, never by themselves."""
    return "on a CPU Triton is only interpreted" if request.device == "cpu" else None


def no_c_kernels(request: Request, machine: Machine) -> str | None:
    """What keeps the C kernels of the CPU back."""
    if request.device != "cpu":
        return "the C kernels are for CPUs"
    if request.dtype not in (torch.float32, torch.bfloat16):
        return f"the C kernels are for float32 and bf16, not {str(request.dtype).removeprefix('torch.')}"
    return machine.compiled


def never(request: Request, machine: Machine) -> str | None:
    return None


TRITON = Backend("triton", no_triton, interpreted)
NATIVE = Backend("native", no_c_kernels)
REFERENCE = Backend("reference", never)

ROWS = (TRITON, NATIVE, REFERENCE)
"""Ops on rows: norms, gated activations, rotary positions."""


def _no_table_gradients(kernels: Obstacle) -> Obstacle:
    """Rotary kernels turn by constant tables."""

    def obstacle(request: Request, machine: Machine) -> str | None:
        wanted = request.feature("table gradients", False)
        return "the kernels give the tables no gradient" if wanted else kernels(request, machine)

    return obstacle


def _no_c_rope(request: Request, machine: Machine) -> str | None:
    interleaved = request.feature("interleaved", False)
    return "the C kernel turns halves, not interleaved pairs" if interleaved else no_c_kernels(request, machine)


ROPE = (
    Backend("triton", _no_table_gradients(no_triton), interpreted),
    Backend("native", _no_table_gradients(_no_c_rope)),
    REFERENCE,
)


def _no_triton_route(request: Request, machine: Machine) -> str | None:
    columns, k = request.feature("columns", 0), request.feature("k", 1)
    if columns > 512 or k > 16:
        return f"the kernel takes 512 experts, groups filled up to powers of two, and top 16, not {columns} and {k}"
    return no_triton(request, machine)


def _no_cpu(request: Request, machine: Machine) -> str | None:
    return None if request.device == "cpu" else "it reads offsets as numbers, for which a GPU would have to wait"


def _no_cpu_route(request: Request, machine: Machine) -> str | None:
    wide = request.dtype.itemsize > 4
    return "it packs float32 beside the expert's number" if wide else _no_cpu(request, machine)


def _no_grouped_mm(request: Request, machine: Machine) -> str | None:
    """torch.nn.functional.grouped_mm: its kernel is for bf16 on sm_90 and later, and rows of whole 16 bytes."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return "this PyTorch has no grouped_mm"
    if request.dtype != torch.bfloat16 or request.feature("bias", False):
        return "PyTorch's grouped_mm is for bf16 and adds no bias"
    if request.device == "cuda" and request.chip not in ("sm_90", "sm_100"):
        return f"PyTorch's grouped_mm has no kernel for {request.chip}"
    aligned = request.feature("aligned", True)
    return None if aligned else "grouped_mm needs rows, widths that 8 divides, and a dense weight"


def _no_gain(request: Request, machine: Machine) -> str | None:
    return "on a CPU grouped_mm is the same loop" if request.device == "cpu" else None


CPU = Backend("cpu", _no_cpu)
"""PyTorch by index, and loops over experts."""
MOE_ROUTE = (Backend("triton", _no_triton_route, interpreted), Backend("cpu", _no_cpu_route), REFERENCE)
MOE_ROWS = (TRITON, CPU, REFERENCE)
GROUPED_GEMM = (
    Backend("grouped_mm", _no_grouped_mm, _no_gain), TRITON, CPU, REFERENCE, Backend("batched", never),
)  # fmt: skip
"""`batched`: one product over all experts, filled up to the largest; asked for by name alone."""


def _no_c_loss(request: Request, machine: Machine) -> str | None:
    """Its rows are float32, whatever narrower dtype is multiplied."""
    if request.device != "cpu":
        return "the C kernels are for CPUs"
    return "the C kernel computes in float32, not float64" if request.dtype == torch.float64 else machine.compiled


LOSS = (TRITON, Backend("native", _no_c_loss), Backend("torch", never))
"""`torch`: the same chunks by PyTorch's own functions; so `reference`, which makes all logits, is never automatic."""


def _no_torch_scaled_mm(request: Request, machine: Machine) -> str | None:
    recipes = request.feature("recipes", ())
    if not set(recipes) <= {"tensorwise", "rowwise"}:
        return "torch._scaled_mm is for scales of tensors and of rows"
    if request.device != "cuda":
        return None
    if request.chip not in ("sm_90", "sm_100"):
        return f"no OCP FP8 products on {request.chip}"
    if not request.feature("aligned") or request.feature("empty"):
        return "cuBLAS wants N and K to be multiples of 16"
    if request.feature("e5m2"):
        return "cuBLAS multiplies no e5m2 by e5m2"
    if "rowwise" in recipes and request.dtype != torch.bfloat16:
        return "cuBLAS gives products of scaled rows in bf16 alone"
    return None


def _no_faster(request: Request, machine: Machine) -> str | None:
    return "on a CPU it does what the reference does, no faster" if request.device == "cpu" else None


SCALED_MM = (Backend("torch", _no_torch_scaled_mm, _no_faster), TRITON, NATIVE, REFERENCE)
TORCH = Backend("torch", never)


def _no_torch_adamw(request: Request, machine: Machine) -> str | None:
    return None if request.feature("one dtype") else "torch._fused_adamw_ wants weights, gradients and moments alike"


@constant_when_compiled
def choose(op: str, wanted: str, device: str, dtype: torch.dtype, features: tuple[tuple[str, Any], ...] = ()) -> str:
    """The backend for tensors of `dtype` on `device`; see `decide`."""
    return _decided(op, wanted, device, dtype, features).backend


@functools.cache
def _decided(op: str, wanted: str, device: str, dtype: torch.dtype, features: tuple[tuple[str, Any], ...]) -> Decision:
    return decide(backends_of(op), Request(op, device, chip_name(device), dtype, features), this_machine(), wanted)


def chip_name(device: str) -> str:
    if device != "cuda":
        return ""
    from megalite_kernels.gpu.chips import chip_of

    return chip_of(torch.device(device)).name


def backends_of(op: str) -> tuple[Backend, ...]:
    return OPS[op]


OPS: dict[str, tuple[Backend, ...]] = {
    "rms_norm": ROWS,
    "layer_norm": ROWS,
    "rope": ROPE,
    "swiglu": ROWS,
    "geglu": ROWS,
    "swiglu_clamped": (TRITON, REFERENCE),
    "relu2": (TRITON, REFERENCE),
    "gelu": (TRITON, REFERENCE),
    "gelu_tanh": (TRITON, REFERENCE),
    "linear_cross_entropy": (*LOSS, REFERENCE),
    "vocabulary_parallel_cross_entropy": LOSS,
    "moe_route": MOE_ROUTE,
    "moe_permute": MOE_ROWS,
    "moe_unpermute": MOE_ROWS,
    "grouped_gemm": GROUPED_GEMM,
    "fp8_amax": (TRITON, NATIVE, REFERENCE),
    "quantize_fp8": (TRITON, NATIVE, REFERENCE),
    "scaled_mm": SCALED_MM,
    "adamw": (TRITON, Backend("torch", _no_torch_adamw), REFERENCE),
    "gradient_norm": (TRITON, TORCH, REFERENCE),
    "newton_schulz": (TRITON, TORCH, REFERENCE),
}
"""Every op and its backends, the preferred one first."""
