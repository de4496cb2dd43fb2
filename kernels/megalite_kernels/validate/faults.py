"""Bugs that are planted in the kernels, one at a time, to see whether the evidence would have told of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """In gpu/`file`.py `old` becomes `new`; `level` must see it in the cases of `op` whose names contain `case`."""

    name: str
    level: str
    op: str
    file: str
    old: str
    new: str
    case: str = ""


FAULTS = (
    Fault(
        "a load without its mask", "E3", "rms_norm", "norm",
        "x_ptr + place, mask=inside, other=0.0", "x_ptr + place", "33 rows",
    ),
    Fault(
        "divided by the tile's width, not the row's", "E1", "rms_norm", "norm",
        "tl.sum(x * x, axis=1) / width", "tl.sum(x * x, axis=1) / BLOCK",
    ),
    Fault(
        "all programs store to one place", "E3", "rms_norm", "norm",
        "grad_weight_ptr + part * width", "grad_weight_ptr + 0 * width", "33 rows",
    ),
    Fault(
        "the last rows dropped", "E3", "rms_norm", "norm",
        "last = tl.minimum((part + 1) * rows_of_part, rows)", "last = tl.minimum((part + 1) * rows_of_part, rows - 1)",
        "33 rows",
    ),
    Fault(
        "an offset of 32 bits", "E3 far", "layer_norm", "norm",
        "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)",
    ),
)  # fmt: skip
