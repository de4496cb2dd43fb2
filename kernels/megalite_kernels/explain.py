"""Which implementation each op takes here, and why: the lines of a run's header."""

from typing import Any

import torch

from megalite_kernels.build import library
from megalite_kernels.capability import bf16_matmul_hardware
from megalite_kernels.dispatch import Decision, Machine, Request, backends_of, chip_name, decide, this_machine

TRAINING = ("rms_norm", "rope", "swiglu", "linear_cross_entropy")
"""Ops of a dense model besides attention, whose choice depends on more than device and dtype."""


def decision(
    op: str, device: str, dtype: torch.dtype, *, backend: str = "auto", chip: str | None = None,
    machine: Machine | None = None, **features: Any,
) -> Decision:  # fmt: skip
    """Which backend `op` takes for such tensors, and what keeps the others back; `chip` and `machine`: of another one.

    Raises ValueError for a `backend` that cannot do it.
    """
    where = chip_name(device) if chip is None else chip
    request = Request(op, device, where, dtype, tuple(features.items()))
    return decide(backends_of(op), request, machine or this_machine(), backend)


def explain(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, compiled: bool = False,
    backend: str = "auto", attention: dict[str, Any] | None = None,
) -> list[str]:  # fmt: skip
    """One line an op group for tensors of `dtype` on `device`.

    `compiled`: blocks run under torch.compile. `backend`: asked for by name. `attention`: its features, as
    `attention_choice` names them. Raises ValueError for a backend that cannot do it.
    """
    device, name = torch.device(device), str(dtype).removeprefix("torch.")
    if device.type != "cpu" or backend != "auto":
        asked: dict[str, Any] = {"dims": (128, 128), "aligned": True} | (attention or {})
        first = decision("attention", device.type, dtype, backend=backend, **asked)
        others = {op: str(decision(op, device.type, dtype, backend=backend)) for op in TRAINING}
        same = {said: [op for op in TRAINING if others[op] == said] for said in others.values()}
        lines = [f"attention: {first}", *(f"{', '.join(ops)}: {said}" for said, ops in same.items())]
        return [*lines, f"linear: PyTorch ({device.type}, {name})"]
    built = library()
    where = "" if built.threaded or built.functions is None else ", one thread (no libgomp of PyTorch to share)"
    if dtype not in (torch.float32, torch.bfloat16):
        native = f"PyTorch, because the compiled CPU kernels are for float32 and bf16, not {name}"
    elif built.functions is None:
        native = f"PyTorch, because {built.reason}"
    else:
        native = f"CPU kernel in C ({built.reason}{where})"
    blocked = native.replace("PyTorch,", "PyTorch, a block of queries at a time,")
    hardware = bf16_matmul_hardware()
    if dtype != torch.bfloat16:
        linear = f"PyTorch ({name})"
    elif hardware is None:
        linear = "fp32 product rounded to bf16, because this CPU has no bf16 multiply (avx512_bf16, amx)"
    else:
        linear = f"PyTorch (bf16 by {hardware})"
    elementwise = "fused by torch.compile" if compiled else native
    return [
        f"attention: {blocked}",
        f"linear: {linear}",
        f"cross-entropy: chunks of rows, logits never whole; rows: {native}",
        f"rms_norm, swiglu, rope: {elementwise}",
    ]
