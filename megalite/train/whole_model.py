"""A model put together again from all ranks' parts, to be sampled from or looked at on one process."""

from collections.abc import Mapping

import torch

from megalite.comm import Communicator
from megalite.config.schema import Config
from megalite.mesh import AXES
from megalite.model.transformer import Transformer
from megalite.parallel.boxes import Held
from megalite.parallel.parameter import declared_parameters, materialize
from megalite.precision import choose_precision


@torch.no_grad()
def gathered_model(
    config: Config,
    comm: Communicator,
    vocab: int,
    weights: Mapping[str, Held],
    dtype: torch.dtype,
    device: torch.device,
) -> Transformer | None:
    """The whole model in `dtype` on rank 0 (None elsewhere) from every rank's `weights`, keyed `model.<name>`.

    Communicates over all axes, one logical tensor at a time.
    """
    with torch.device("meta"):
        model = Transformer(config.model, vocab, config.model.max_positions or config.data.sequence_length)
    declared = [(name, declaration.shape) for name, _, declaration in declared_parameters(model)]
    if comm.mesh.rank == 0:
        materialize(model, device, config.train.seed, dtype)
    parameters = dict(model.named_parameters())
    wide = choose_precision(config.precision, device).main
    for name, shape in declared:
        whole = torch.full(shape, -torch.inf, dtype=wide, device=device)
        held = weights.get(f"model.{name}")
        for (offsets, sizes), values in () if held is None else held.parts:
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = values
        comm.all_reduce(whole, *AXES, op="max")  # exact: all that hold an element hold the same value
        if comm.mesh.rank == 0:
            parameters[name].copy_(whole)
    return model if comm.mesh.rank == 0 else None
