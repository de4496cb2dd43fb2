"""A dense model as one with experts that computes the same at first: copies of its MLPs, or of their parts, and a new
router (arXiv:2212.05055; granular: arXiv:2410.07524).

Each of `experts` copies of an MLP is cut along its inner values into `granularity` shards, experts of their own, whose
rows of the router begin equal: a token that chooses one shard of a copy chooses all, and they sum to the copy.
Dimensions: E copies, G shards, F inner values, D hidden.
"""

import dataclasses

import torch
from torch import Tensor

from megalite.checkpoint.stored_model import StoredModel, empty_model
from megalite.config.rules import divisors_near
from megalite.config.schema import MoEConfig
from megalite.errors import UserError
from megalite.parallel.parameter import declared_parameters, initial_values

FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Where such a model has a Hugging Face form."""


def upcycled(dense: StoredModel, experts: int, top_k: int, granularity: int = 1, seed: int = 0) -> StoredModel:
    """`dense` with E = `experts` copies of every MLP, of which a token meets `top_k`. `seed`: of the router.

    Probabilities of the chosen are divided by their sum, and with G shards each is a G-th of its copy's, so they are
    multiplied by G (model.moe.scale). UserError when `dense` has experts or its inner width is no multiple of G.
    """
    before = dense.config
    if before.moe.experts:
        raise UserError(
            f"{dense.folder}: has experts already (model.moe.experts={before.moe.experts}); give a dense model"
        )
    if before.ffn % granularity:
        legal = divisors_near(granularity, before.ffn)
        raise UserError(f"granularity={granularity}: does not divide the {before.ffn} inner values; nearest: {legal}")
    if top_k > experts:
        raise UserError(f"top_k={top_k}: there are {experts} experts; at most that")
    config = dataclasses.replace(
        before,
        name=f"{before.name}_x{experts}",
        family=FAMILIES.get(before.family, "none") if granularity == 1 else "none",
        moe=MoEConfig(
            experts=experts * granularity,
            top_k=top_k * granularity,
            ffn=before.ffn // granularity,
            scale=float(granularity),
        ),
    )
    routers = {
        name: declared
        for name, _, declared in declared_parameters(empty_model(config, dense.vocab, dense.max_positions))
        if declared.role == "router"
    }

    def tensor(name: str) -> Tensor:
        if name in routers:
            copies = dataclasses.replace(routers[name], shape=(experts, config.hidden))
            return initial_values(copies, name, seed).repeat_interleave(granularity, 0).to(dense.dtype)
        if ".mlp.experts." not in name:
            return dense.tensor(name)
        block, _, kind = name.partition(".experts.")
        matrix, _, bias = kind.partition("_")
        return _shards(dense.tensor(f"{block}.{matrix}.{bias or 'weight'}"), kind, experts, granularity)

    return dataclasses.replace(dense, config=config, tensor=tensor)


def _shards(whole: Tensor, kind: str, experts: int, granularity: int) -> Tensor:
    """[E·G, ...] from one of an MLP's tensors: up and gate [F, D], down [D, F], and their biases."""
    if kind == "down_bias":  # of every shard a part, for their sum
        parts = (whole / granularity).expand(granularity, -1)
    elif kind == "down":
        parts = torch.stack(whole.chunk(granularity, dim=1))
    else:
        parts = whole.unflatten(0, (granularity, -1))
    return parts.repeat(experts, *(1 for _ in parts.shape[1:]))
