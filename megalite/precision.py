"""The precision policy of a run, as data: which dtype each thing that is kept or summed has."""

from dataclasses import dataclass, fields, replace

import torch

SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Precision:
    """`compute`: parameters in the model, activations, and what of them ranks exchange. `accumulate`: gradients, as
    they add up over microbatches and over ranks. `main`: the weights that are updated; `moments`: the optimizer's
    state; both narrower than `accumulate`: updates are computed there and rounded stochastically. `scaled`: the loss is
    multiplied by a dynamic scale, because gradients in `compute` would underflow. `reason`: why auto took it.
    """

    name: str
    compute: torch.dtype
    accumulate: torch.dtype
    main: torch.dtype
    moments: torch.dtype
    scaled: bool = False
    reason: str = ""

    @property
    def stochastic(self) -> bool:
        return self.main.itemsize < self.accumulate.itemsize

    def __str__(self) -> str:
        kept = "; ".join(
            f"{field.name} {SHORT[value]}" for field in fields(self) if (value := getattr(self, field.name)) in SHORT
        )
        notes = [self.reason] if self.reason else []
        if len({self.compute, self.accumulate, self.main, self.moments}) > 1:
            notes.append(kept)
        if self.stochastic:
            notes.append("updates rounded stochastically")
        if self.scaled:
            notes.append("dynamic loss scale")
        return f"{self.name} ({'; '.join(notes)})" if notes else self.name


def _mixed(name: str, compute: torch.dtype, wide: torch.dtype, scaled: bool = False) -> Precision:
    return Precision(name, compute, wide, wide, wide, scaled)


PRESETS = {
    "fp64": _mixed("fp64", torch.float64, torch.float64),
    "fp32": _mixed("fp32", torch.float32, torch.float32),
    "bf16": _mixed("bf16", torch.bfloat16, torch.float32),
    "bf16_pure": Precision("bf16_pure", torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
    "fp16": _mixed("fp16", torch.float16, torch.float32, scaled=True),
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
    return replace(chosen, reason=f"auto: bf16 matmul is {'' if native else 'not '}native here")
