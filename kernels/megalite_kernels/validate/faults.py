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
    Fault(
        "a tile of too few warps", "E4", "rms_norm", "norm",
        "max(1, min(16, rows * block // elements))", "1", "8192 × 8192",
    ),
    Fault(
        "a row read twice", "E5", "rms_norm", "norm", "y = x * scale[:, None] * weight[None, :]",
        "y = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) * scale[:, None] * weight[None, :]",
        "33 rows",
    ),
    Fault(
        "the mask's edge one key late", "E1", "attention", "attention_forward",
        "(key[None, :] < high[:, None])", "(key[None, :] <= high[:, None])", "causal, ragged",
    ),
    Fault(
        "no rescale in the online softmax", "E1", "attention", "attention_forward",
        "acc * shrink[:, None]", "acc", "several tiles",
    ),
    Fault(
        "softmax's backward without its mean", "E1", "attention", "attention_backward",
        "weights * (grad_weights - delta)", "weights * grad_weights", "causal, ragged",
    ),
    Fault(
        "the log-sum-exp's gradient forgotten", "E1", "attention", "attention_backward",
        "delta -= tl.load(grad_lse_ptr", "delta -= 0.0 * tl.load(grad_lse_ptr", "gradient through lse",
    ),
    Fault(
        "32-bit offsets of a batch", "E3 far", "attention", "attention_tiles",
        "start = x + ((batch.to(tl.int64) * length", "start = x + ((batch * length",
    ),
    Fault(
        "the tail of the vocabulary dropped", "E1", "cross_entropy", "cross_entropy",
        "for start in range(0, width, BLOCK):", "for start in range(0, width - BLOCK + 1, BLOCK):", "9 rows",
    ),
    Fault(
        "a tile runs into the next expert's rows", "E3", "grouped_gemm", "grouped_gemm",
        "inside = (row < end)[:, None] & (column < width)[None, :]",
        "inside = (row < rows)[:, None] & (column < width)[None, :]", "empty experts",
    ),
    Fault(
        "every block of slots begins at the first", "E3", "moe_permute", "moe_permute",
        "starts_ptr + block.to(tl.int64) * experts + index", "starts_ptr + index", "two blocks of slots",
    ),
    Fault(
        "scales stored without a mask", "E3", "quantize_fp8", "quantize",
        "tl.store(scale_ptr + place, scale, mask=held)", "tl.store(scale_ptr + place, scale)",
    ),
)  # fmt: skip
