"""The precision policy of a run, as data: which dtype each thing that is kept or summed has."""

from dataclasses import dataclass, fields, replace

import torch

from megalite.config.schema import PrecisionConfig

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORT = {dtype: name for name, dtype in DTYPES.items()}
SCALE_BYTES = 4 / 256
MOMENT_BYTES = {"fp8": (1 + SCALE_BYTES, 2 + SCALE_BYTES), "int8": (1 + SCALE_BYTES, 1 + SCALE_BYTES)}
"""Of what is kept in blocks of 256: of the first moment (or the only one), and of the second."""


@dataclass(frozen=True)
class Precision:
    """`compute`: parameters in the model, activations, and what of them ranks exchange. `accumulate`: gradients, as
    they add up over microbatches and over ranks; `communicate`: what they travel in to who adds them up. `main`: the
    weights that are updated, rounded stochastically where they are narrower than `accumulate`, in which updates are
    computed. `moments`: the optimizer's state: a dtype's name (bf16: rounded stochastically); "fp8": the first in e4m3,
    the second in float16; "int8": both in dynamic 8-bit codes; those with a scale for every 256 of a row. `scaled`: the
    loss is multiplied by a dynamic scale, because gradients in `compute` would underflow. `reason`: why auto took it.
    """

    name: str
    compute: torch.dtype
    accumulate: torch.dtype
    communicate: torch.dtype
    main: torch.dtype
    moments: str
    scaled: bool = False
    reason: str = ""

    @property
    def compact(self) -> bool:
        """Whether weights or moments are kept in less than their updates are computed in."""
        return {self.main, DTYPES.get(self.moments)} != {self.accumulate}

    def moment_bytes(self, of: int) -> float:
        """Of an element of the first moment (0; or of the only one) or of the second (1)."""
        return MOMENT_BYTES[self.moments][of] if self.moments in MOMENT_BYTES else DTYPES[self.moments].itemsize

    def __str__(self) -> str:
        kept = {
            field.name: SHORT.get(value, value)
            for field in fields(self)
            if (value := getattr(self, field.name)) in SHORT or field.name == "moments"
        }
        notes = [self.reason] if self.reason else []
        if len(set(kept.values())) > 1:
            notes.append("; ".join(f"{name} {value}" for name, value in kept.items()))
        if "bf16" in (kept["main"], kept["moments"]):
            notes.append("updates rounded stochastically")
        if self.scaled:
            notes.append("dynamic loss scale")
        return f"{self.name} ({'; '.join(notes)})" if notes else self.name


def _mixed(name: str, compute: torch.dtype, wide: torch.dtype, scaled: bool = False) -> Precision:
    return Precision(name, compute, wide, wide, wide, SHORT[wide], scaled)


PRESETS = {
    "fp64": _mixed("fp64", torch.float64, torch.float64),
    "fp32": _mixed("fp32", torch.float32, torch.float32),
    "bf16": _mixed("bf16", torch.bfloat16, torch.float32),
    "bf16_pure": Precision("bf16_pure", torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, "bf16"),
    "fp16": _mixed("fp16", torch.float16, torch.float32, scaled=True),
}


def choose_precision(config: PrecisionConfig, device: torch.device) -> Precision:
    """The preset of `config.name`, with what other keys change of it; "auto" takes bf16 only where the hardware
    multiplies it natively."""
    chosen = _automatic(device) if config.name == "auto" else PRESETS[config.name]
    if config.communicate != "auto":
        chosen = replace(chosen, communicate=DTYPES[config.communicate])
    return chosen if config.states == "auto" else replace(chosen, moments=config.states)


def _automatic(device: torch.device) -> Precision:
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    chosen = PRESETS["bf16" if native else "fp32"]
    return replace(chosen, reason=f"auto: bf16 matmul is {'' if native else 'not '}native here")
