"""Chooses tiles by measuring them: every candidate of one kernel of an op after another, the others as they are best.

Needs a way to measure, `seconds(tiles)`, so that the choice can be tested without a GPU. See megalite_kernels.tuning.
"""

from collections.abc import Callable, Sequence
from itertools import chain, product

import torch

from megalite_kernels.gpu import attention_config, grouped_gemm
from megalite_kernels.gpu.attention_tiles import padded
from megalite_kernels.gpu.chips import Chip
from megalite_kernels.tuning import OPTIONS

Config = dict[str, int]
Sizes = Sequence[int]
"""attention: size of a query, of a value, queries, keys. grouped_gemm: rows, experts, depth, width."""
TRIED = {
    "M": (32, 64, 128), "N": (32, 64, 128), "BM": (64, 128), "BN": (64, 128, 256), "BD": (64, 128),
    "BF": (64, 128, 256), "BK": (32, 64), "num_warps": (4, 8), "num_stages": (1, 2, 3),
}  # fmt: skip


def defaults(op: str, chip: Chip, dtype: torch.dtype, sizes: Sizes) -> list[Config]:
    """What each kernel of the op takes where nothing was measured."""
    if op == "attention":
        choices = (attention_config.config, attention_config.config_keys, attention_config.config_queries)
        return [choose(chip, dtype, sizes[0], sizes[1]) for choose in choices]
    return [grouped_gemm.config(chip, dtype, sizes[0], sizes[1]), grouped_gemm.weight_config(chip, dtype)]


def shared_bytes(op: str, number: int, config: Config, dtype: torch.dtype, sizes: Sizes) -> int:
    """About what a kernel keeps in shared memory: the tiles it walks along, a stage each, and the one that stays."""
    if op == "attention":
        columns = padded(sizes[0]) + padded(sizes[1])
        walked, stays = (config["M"], config["N"]) if number == 1 else (config["N"], config["M"])
        return dtype.itemsize * columns * (walked * config["num_stages"] + stays)
    across = sum(value for name, value in config.items() if name in ("BM", "BN", "BD", "BF"))
    return dtype.itemsize * across * config["BK"] * config["num_stages"]


def candidates(op: str, number: int, chip: Chip, dtype: torch.dtype, sizes: Sizes) -> list[Config]:
    """Tiles to try for one kernel, its default first; those that cannot fit into shared memory are left out."""
    names = OPTIONS[op][number]
    default = defaults(op, chip, dtype, sizes)[number]
    found = [dict(zip(names, values, strict=True)) for values in product(*(TRIED[name] for name in names))]
    fitting = [c for c in found if shared_bytes(op, number, c, dtype, sizes) <= chip.shared_bytes]
    return [default, *(config for config in fitting if config != default)]


def fastest(tried: Sequence[Config], seconds: Sequence[float]) -> Config:
    """The one of least time, the earlier of equal ones. Raises ValueError where none ran, all times being inf."""
    if min(seconds) == float("inf"):
        raise ValueError(f"tune: none of {len(tried)} candidates ran")
    return tried[seconds.index(min(seconds))]


def flat(op: str, configs: Sequence[Config]) -> list[int]:
    """The values of all kernels one after another, as an op takes them."""
    pairs = zip(OPTIONS[op], configs, strict=True)
    return list(chain.from_iterable([config[name] for name in names] for names, config in pairs))


def tune(
    op: str, chip: Chip, dtype: torch.dtype, sizes: Sizes, seconds: Callable[[list[int]], float]
) -> list[int]:  # fmt: skip
    """The best tiles found. `seconds`: what the op takes with tiles, inf where it fails."""
    best = defaults(op, chip, dtype, sizes)
    for number in range(len(best)):
        tried = candidates(op, number, chip, dtype, sizes)
        times = [seconds(flat(op, [*best[:number], config, *best[number + 1 :]])) for config in tried]
        best[number] = fastest(tried, times)
    return flat(op, best)
