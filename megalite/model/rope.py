"""Rotary position tables: frequencies and their scalings in float64, then cos and sin in float32 (float64 for fp64).

The tables are no parameters and no buffers: they are made when first needed, on the device that needs them, so a model
built on the meta device works, and a model that reads short sequences never holds tables for its longest.
"""

import math

import torch
from torch import Tensor

from megalite.config.rope import scaling_of, stretched_theta, yarn_factor
from megalite.config.schema import RopeConfig, RopeScaling

Rotation = tuple[Tensor, Tensor]
"""cos and sin [B, S, R]; the two halves of the rotated dimensions R carry the same angles."""


def inverse_frequencies(rope: RopeConfig, rotated: int) -> tuple[Tensor, float]:
    """Angles per position [rotated / 2], float64, and the factor on cos and sin (1 except for yarn)."""
    scaling, theta = scaling_of(rope), stretched_theta(rope, rotated)
    frequency = theta ** -(torch.arange(0, rotated, 2, dtype=torch.float64, device="cpu") / rotated)
    if scaling.rope_type == "linear":
        return frequency / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequency, scaling), 1.0
    if scaling.rope_type == "yarn":
        return _yarn(frequency, scaling, theta), yarn_factor(scaling)
    return frequency, 1.0


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, linear in between."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def _yarn(frequency: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """YaRN (arXiv 2309.00071), eq. 22-23: a ramp over the dimension index between two numbers of rotations."""

    rotated, length = 2 * len(frequency), scaling.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        return rotated * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, rotated - 1)
    index = torch.arange(rotated // 2, dtype=torch.float64, device="cpu")
    scaled = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency * (1 - scaled) + frequency / scaling.factor * scaled


class RopeTables:
    """cos and sin for every position up to the longest asked for, kept per device and dtype."""

    def __init__(self, rope: RopeConfig, rotated: int) -> None:
        self.rope, self.rotated = rope, rotated
        self.tables: dict[tuple[torch.device, torch.dtype], Rotation] = {}

    def at(
        self, start: int, batch: int, length: int, positions_BS: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> Rotation:
        """The rotation of tokens at `positions_BS` (below `length`), or at start … start + length - 1 in every row.

        Written out for every row, once for all layers: each keeps it for backward, and kernels take rows of tokens.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tables = self._up_to(start + length, device, wide)
        if positions_BS is not None:
            return tables[0][positions_BS], tables[1][positions_BS]
        cos, sin = (table[start:].expand(batch, -1, -1).contiguous() for table in tables)
        return cos, sin

    def _up_to(self, length: int, device: torch.device, dtype: torch.dtype) -> Rotation:
        """cos and sin of positions 0 … length-1, [length, R] in `dtype`."""
        cos, sin = self.tables.get((device, dtype), (None, None))
        if cos is None or sin is None or len(cos) < length:
            # Inference tensors could not be saved for a later backward, should evaluation come before training.
            with torch.inference_mode(False), torch.no_grad():
                cos, sin = self._make(max(256, 1 << (length - 1).bit_length()), device, dtype)
            self.tables[device, dtype] = cos, sin
        return cos[:length], sin[:length]

    def _make(self, length: int, device: torch.device, dtype: torch.dtype) -> Rotation:
        frequency, factor = inverse_frequencies(self.rope, self.rotated)
        angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequency).repeat(1, 2)
        return (angles.cos() * factor).to(device, dtype), (angles.sin() * factor).to(device, dtype)
