"""Which implementation each op takes here, and why: the lines of a run's header."""

import torch

from megalite_kernels.build import library
from megalite_kernels.capability import bf16_matmul_hardware


def explain(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, compiled: bool = False
) -> list[str]:
    """One line an op group for tensors of `dtype` on `device`; `compiled`: blocks run under torch.compile."""
    device, name = torch.device(device), str(dtype).removeprefix("torch.")
    if device.type != "cpu":
        return [
            "attention: PyTorch's fused kernel; with window, softcap or documents a block of queries at a time",
            f"linear: PyTorch ({device.type}, {name}); cross-entropy: chunked; other ops: PyTorch",
        ]
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
