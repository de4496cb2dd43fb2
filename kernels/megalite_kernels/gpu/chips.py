"""The accelerators that the kernels are built for: limits a compiled kernel must keep, and peaks for rooflines."""

import functools
from dataclasses import dataclass

import torch

from megalite_kernels.gpu.launch import elsewhere


@dataclass(frozen=True)
class Chip:
    """One architecture, with the datasheet figures of the part in `part`: dense TFLOP/s by dtype and GB/s of memory."""

    name: str
    part: str
    target: int | str
    """What Triton's compiler is told: a compute capability times ten, or AMD's name."""
    warp: int
    shared_bytes: int
    """Shared memory (LDS) that one block may have."""
    registers: int
    tensor_memory_columns: int
    descriptors: bool
    """Tensor memory access: blocks move through hardware descriptors (TMA)."""
    bandwidth: float
    bf16: float
    fp32: float
    fp8: float | None

    def tflops(self, dtype: torch.dtype) -> float | None:
        if dtype.itemsize == 1:
            return self.fp8
        return self.bf16 if dtype.itemsize == 2 else self.fp32


# Limits: CUDA C++ programming guide, table of compute capabilities; peaks: the parts' datasheets, without sparsity.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "A100 SXM4 80GB", 80, 32, 166_912, 255, 0, False, 2_039, 312, 19.5, None),
        Chip("sm_90", "H100 SXM5", 90, 32, 232_448, 255, 0, True, 3_352, 989, 67, 1_979),
        Chip("sm_100", "B200", 100, 32, 232_448, 255, 512, True, 8_000, 2_250, 75, 4_500),
        Chip("gfx942", "MI300X", "gfx942", 64, 65_536, 512, 0, False, 5_300, 1_307, 163, 2_615),
    )
}
PORTABLE = CHIPS["sm_80"]
"""The chip whose configurations run in the interpreter, and on a GPU that is not in the table."""


def chip_of(device: torch.device) -> Chip:
    """The nearest chip at or below the GPU at `device`; PORTABLE for a CPU, where kernels are interpreted, unless its
    launches go elsewhere."""
    if device.type != "cuda" and not elsewhere.get():
        return PORTABLE
    return _gpu(device if device.type == "cuda" else torch.device(elsewhere.get()))


@functools.cache
def _gpu(device: torch.device) -> Chip:
    if torch.version.hip:
        return CHIPS["gfx942"]
    major = torch.cuda.get_device_capability(device)[0]
    return CHIPS["sm_100"] if major == 10 else CHIPS["sm_90"] if major == 9 else PORTABLE
