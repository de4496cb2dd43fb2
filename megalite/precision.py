"""Which dtypes a run computes, accumulates and keeps its weights in."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """`compute`: parameters in the model and activations. `main`: gradient accumulation, main weights and moments."""

    name: str
    compute: torch.dtype
    main: torch.dtype
    reason: str = ""


PRESETS = {
    "fp64": Precision("fp64", torch.float64, torch.float64),
    "fp32": Precision("fp32", torch.float32, torch.float32),
    "bf16": Precision("bf16", torch.bfloat16, torch.float32),
}


def choose_precision(name: str, device: torch.device) -> Precision:
    """The preset of that name; "auto" takes bf16 only where the hardware multiplies it natively."""
    if name != "auto":
        return PRESETS[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    chosen = PRESETS["bf16" if native else "fp32"]
    return Precision(
        chosen.name, chosen.compute, chosen.main, f"auto: bf16 matmul is {'' if native else 'not '}native here"
    )
