"""ZeRO 3 gathers weights that are multiplied in FP8 as codes: a byte a number instead of two or four.

Where a tensor shares a scale, the ranks that share a weight out agree on its largest value before they send it; what
arrives is widened again, and the product, told that value, finds the same codes in it. So the numbers are those of one
process. All weights of a unit travel in one message, those that stay wide too.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from megalite_kernels.fp8 import dequantize_fp8, fp8_amax, fp8_scale
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megalite.comm import Communicator
from megalite.parallel.fp8 import FORMATS, Fp8, factor
from megalite.parallel.fp8_grouped import GroupedFp8

Products = Mapping[tuple[nn.Module, str], Fp8 | GroupedFp8]
"""How the parameter of that name of a module is multiplied."""


class Part(NamedTuple):
    """One parameter in a rank's flat shard of a unit: so many `numbers`. Where `fp8`: it has `scales`, of which this
    shard's are `here`; `apart`: every rank's shard has others."""

    numbers: int
    fp8: Fp8 | GroupedFp8 | None = None
    scales: int = 1
    here: int = 1
    apart: bool = False


def parts_of(unit: FSDPModule, products: Products) -> list[Part]:
    """As FSDP2 lays a unit's shard out, which nothing public tells."""
    parts = []
    for group in unit._get_fsdp_state()._fsdp_param_groups:
        for held in group.fsdp_params:
            shape, whole = held.padded_sharded_param_size, held._orig_size
            fp8 = products.get((held._module_info.module, held._module_info.param_name))
            if isinstance(fp8, GroupedFp8):
                parts.append(Part(shape.numel(), fp8, whole[0], shape[0], held.fsdp_placement.dim == 0))
            else:
                parts.append(Part(shape.numel(), fp8))
    return parts


def gather_codes(comm: Communicator, axis: str, parts: Sequence[Part], whole: Tensor, shard: Tensor) -> None:
    """Fill flat `whole` with every rank's flat `shard`, as `Communicator.all_gather_into` does."""
    ranks, place, form = comm.mesh.size(axis), comm.mesh.index(axis), FORMATS["e4m3"]
    mine = shard.split([part.numbers for part in parts])
    amaxes = _agreed(comm, axis, parts, mine)
    sent = [
        values.view(torch.uint8)
        if amax is None
        else factor(values.view(part.here, -1), "rowwise", form, amax[place][:, None]).codes.view(torch.uint8).flatten()
        for part, values, amax in zip(parts, mine, amaxes, strict=True)
    ]
    message = torch.cat(sent)
    got = message.new_empty(ranks * len(message))
    comm.all_gather_into(got, message, axis)
    came = got.view(ranks, -1).split([len(of) for of in sent], 1)
    filled = whole.view(ranks, -1).split([part.numbers for part in parts], 1)
    for part, amax, arrived, into in zip(parts, amaxes, came, filled, strict=True):
        if amax is None:
            into.copy_(arrived.contiguous().view(whole.dtype))
            continue
        codes, scales = arrived.reshape(ranks * part.here, -1).view(form), fp8_scale(amax.reshape(-1, 1), dtype=form)
        into.copy_(dequantize_fp8(codes, scales, recipe="rowwise", dtype=whole.dtype).view_as(into))


def _knows(fp8: Fp8 | GroupedFp8) -> bool:
    return fp8.history is not None and fp8.history.knows("weight")


def _agreed(comm: Communicator, axis: str, parts: Sequence[Part], mine: Sequence[Tensor]) -> list[Tensor | None]:
    """Of each part in FP8 the largest values that scale every rank's shard [ranks, here]; its product is told of them.
    Communicates over `axis` and what else cuts the weights, unless all are known from histories."""
    ranks, place = comm.mesh.size(axis), comm.mesh.index(axis)
    tables, over = [], {axis}
    for part, values in zip(parts, mine, strict=True):
        if part.fp8 is not None:
            table = torch.zeros(ranks if part.apart else 1, part.here, device=values.device)
            table[place * part.apart] = fp8_amax(values.view(part.here, -1), recipe="rowwise").flatten()
            tables.append(table)
            over |= {*part.fp8.over["N"], *part.fp8.over["K"]}
    if not tables:
        return [None] * len(parts)
    flat = torch.cat([table.flatten() for table in tables]).nan_to_num(torch.inf, torch.inf)
    if not all(_knows(part.fp8) for part in parts if part.fp8 is not None):
        for along in sorted(over):
            comm.all_reduce(flat, along, op="max")
    agreed = iter(flat.split([table.numel() for table in tables]))
    found: list[Tensor | None] = []
    for part in parts:
        if part.fp8 is None:
            found.append(None)
            continue
        amax = next(agreed)
        used = part.fp8.gather(amax[: part.scales])
        padded = torch.cat((used, amax[part.scales :]))  # a last shard may be longer than what is left for it
        found.append(padded.view(-1, part.here).expand(ranks, -1))
    return found
