"""Weights that published folders hold in few bits, read as bfloat16: gpt-oss's experts in MXFP4, DeepSeek-V3 in FP8."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.tensor_folder import TensorFolder
from megalite.errors import UserError

BLOCKS, SCALES, INVERSE = "_blocks", "_scales", "_scale_inv"
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a value of four bits, E2M1; its highest bit is the sign."""
GROUP = 32
"""Values that share a scale in MXFP4 (OCP Microscaling Formats 1.0): 16 bytes, the earlier value in the lower bits."""
SQUARE = 128
"""Side of the squares of a weight that share a scale in DeepSeek-V3's FP8 (arXiv:2412.19437, section 3.3)."""
METHODS = ("mxfp4", "fp8")


class Dequantized(Mapping[str, Tensor]):
    """The tensors of a folder. `NAME_blocks` and `NAME_scales` appear as NAME, bfloat16 [E, inputs, outputs]; NAME with
    a NAME_scale_inv as bfloat16. `notes`: what was found of these, for people. UserError for other forms."""

    def __init__(self, folder: TensorFolder, stated: Any) -> None:
        self.folder, self.shapes = folder, dict(folder.shapes)
        method = stated.get("quant_method") if isinstance(stated, dict) else stated
        if method is not None and method not in METHODS:
            raise UserError(
                f"{folder.folder}: quantization_config.quant_method={method} is not supported; supported:"
                f" {', '.join(METHODS)}; convert the weights to bfloat16"
            )
        self.packed = {name.removesuffix(BLOCKS) for name in folder if name.endswith(BLOCKS)}
        self.scaled = {name.removesuffix(INVERSE) for name in folder if name.endswith(INVERSE)}
        for name in self.packed:
            blocks, scales = self.shapes.pop(name + BLOCKS), self.shapes.pop(name + SCALES, ())
            if len(blocks) != 4 or blocks[3] != GROUP // 2 or scales != blocks[:3]:
                raise self._damaged(name + SCALES)
            self.shapes[name] = (blocks[0], blocks[2] * GROUP, blocks[1])
        for name in self.scaled:
            scales, shape = self.shapes.pop(name + INVERSE), self.shapes.get(name, ())
            if len(shape) != 2 or scales != tuple(math.ceil(size / SQUARE) for size in shape):
                raise self._damaged(name + INVERSE)
        kinds = [("MXFP4", self.packed), ("FP8", self.scaled)]
        self.notes = tuple(f"{len(names)} tensors in {kind} became bfloat16" for kind, names in kinds if names)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.packed:
            return _unpacked(self.folder[name + BLOCKS], self.folder[name + SCALES]).mT
        if name in self.scaled:
            return _scaled(self.folder[name], self.folder[name + INVERSE])
        return self.folder[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _damaged(self, name: str) -> UserError:
        return UserError(f"{self.folder.folder}: {name} does not fit its weight; fetch the folder again")


def _unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, outputs, inputs] from bytes [E, outputs, groups, 16] and exponents, biased by 127, [E, outputs, groups]."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise UserError(
            f"MXFP4 weights are {blocks.dtype} with scales {scales.dtype}, not bytes; fetch the folder again"
        )
    table = torch.tensor([*FP4, *(-value for value in FP4)], dtype=torch.bfloat16)
    made = torch.empty(*blocks.shape[:2], blocks.shape[2] * GROUP, dtype=torch.bfloat16)
    for e, packed in enumerate(blocks):  # the rest of a layer's experts need not be wide at the same time
        values = torch.stack((table[(packed & 15).int()], table[(packed >> 4).int()]), dim=-1).flatten(-2)
        made[e] = torch.ldexp(values.float(), (scales[e].int() - 127)[..., None]).flatten(-2)
    return made


def _scaled(weight: Tensor, scales: Tensor) -> Tensor:
    if not (weight.is_floating_point() and scales.is_floating_point()):
        raise UserError(
            f"FP8 weights are {weight.dtype} with scales {scales.dtype}, not floats; fetch the folder again"
        )
    rows, columns = weight.shape
    wide = scales.float().repeat_interleave(SQUARE, 0)[:rows].repeat_interleave(SQUARE, 1)[:, :columns]
    return (weight.float() * wide).bfloat16()
