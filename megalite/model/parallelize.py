"""Everything done to a plain model before it trains, in one fixed order: stages, FP8, tp, cp, kernels, recompute,
compile.

The model is on the meta device until the end, so a rank never holds more than its part. ZeRO is not here: it shards
what the optimizer and the gradients hold, not what the model computes (`parallel/data.py`).
"""

from collections.abc import Sequence

import torch
from torch import nn

from megalite.comm import Communicator
from megalite.config.schema import Config, RecomputeConfig
from megalite.model.experts import Experts
from megalite.model.linear import Linear
from megalite.model.moe import MoE
from megalite.model.transformer import Transformer
from megalite.parallel.context import ContextParallel
from megalite.parallel.deferred import DeferredWeights
from megalite.parallel.experts import ONE_SOURCE, Sources, make_dispatcher
from megalite.parallel.fp4 import Fp4, Text
from megalite.parallel.fp8 import USUAL_BACKWARD, Fp8, Recipe
from megalite.parallel.fp8_grouped import GroupedFp8
from megalite.parallel.parameter import shard_parameters
from megalite.parallel.tensor import TensorParallel


def parallelize(
    model: Transformer, comm: Communicator, config: Config, layers: Sequence[Sequence[int]], placement: Sequence[int]
) -> list[Transformer]:
    """This rank's stages of `model`. `layers[stage]`: its blocks; `placement[stage]`: its rank along pp."""
    mine = [stage for stage, rank in enumerate(placement) if rank == comm.mesh.index("pp")]
    stages = [model.stage(layers[stage], stage == 0, stage == len(layers) - 1) for stage in mine]
    apply_fp8(stages, comm, config)
    apply_fp4(stages, comm, config)
    tp = TensorParallel(comm, config.parallel.sp, config.parallel.overlap)
    spread_tensors(stages, tp, sorted({placement[0], placement[-1]}))
    spread_context(stages, comm)
    spread_experts(stages, comm, config)
    for stage in stages:
        apply_kernels(stage, config.train.kernels)
        apply_recompute(stage, config.recompute)
        if config.train.compile:
            apply_compile(stage)
    return stages


def apply_fp8(stages: Sequence[Transformer], comm: Communicator, config: Config) -> None:
    """Let the linears and experts of the chosen blocks multiply in FP8. Not the embedding, head, norms, routers, nor
    multi-token modules."""
    recipe, chosen = fp8_recipe(config), fp8_layers(config)
    if recipe is None:
        return
    blocks = [block for stage in stages for layer, block in stage.layers.items() if layer in chosen]
    with torch.device("meta"):
        for module in (module for block in blocks for module in block.modules()):
            if isinstance(module, Linear):
                fp8 = Fp8(recipe, comm, module.split, config.parallel.sp)
                module.multiply_in(fp8, config.precision.fp8_history)
            elif isinstance(module, Experts):
                module.multiply_in(recipe, comm, config.precision.fp8_history)


def apply_fp4(stages: Sequence[Transformer], comm: Communicator, config: Config) -> None:
    """Let the linears of the chosen blocks multiply in NVFP4."""
    for stage in stages:
        for layer, block in stage.layers.items() if config.precision.fp8 == "nvfp4" else ():
            if layer not in fp8_layers(config):
                continue
            text = Text()
            block.attention.register_forward_pre_hook(text.note)
            for name, module in block.named_modules():
                if isinstance(module, Linear):
                    of = f"{layer}.{name}"
                    module.fp8 = Fp4(comm, module.split, config.parallel.sp, config.train.seed, of, text)


def fp8_recipe(config: Config) -> Recipe | None:
    precision = config.precision
    if precision.fp8 in ("none", "nvfp4"):
        return None
    usual = USUAL_BACKWARD[precision.fp8]
    return Recipe(precision.fp8, usual if precision.fp8_backward == "auto" else precision.fp8_backward)


def fp8_weights(stage: nn.Module) -> dict[tuple[nn.Module, str], Fp8 | GroupedFp8]:
    """How parameters, of a module by name, are multiplied whose tensors share a scale."""
    found: dict[tuple[nn.Module, str], Fp8 | GroupedFp8] = {}
    for module in stage.modules():
        if isinstance(module, Linear) and isinstance(module.fp8, Fp8):
            found[module, "weight"] = module.fp8
        elif isinstance(module, Experts):
            found |= {(module, name): fp8 for name, fp8 in module.fp8.items()}
    return {key: fp8 for key, fp8 in found.items() if fp8.recipe.blocks("weight") == "tensorwise"}


def fp8_layers(config: Config) -> range:
    """The layers whose linears multiply in FP8, where there is a recipe."""
    first, last = config.precision.fp8_skip
    return range(first, config.model.layers - last)


def spread_tensors(stages: Sequence[nn.Module], tp: TensorParallel, ends: Sequence[int] = (0,)) -> None:
    """Cut every weight to this rank's part over tp, and tell each module that communicates. `ends`: the places along pp
    of the first and the last stage, which both hold a tied embedding."""
    tied: dict[nn.Parameter, Sequence[int]] = {}
    for stage in stages:
        if isinstance(stage, Transformer) and len(ends) > 1 and (weight := stage.tied_weight) is not None:
            tied[weight] = ends
    shard_parameters(stages, tp.comm.mesh, tp.sp, tied)
    for module in (module for stage in stages for module in stage.modules()):
        if hasattr(module, "tp"):
            module.tp = tp  # type: ignore[assignment]


def spread_context(stages: Sequence[nn.Module], comm: Communicator) -> None:
    """Spread sequence positions over cp, where there is any."""
    if comm.mesh.size("cp") > 1:
        cp = ContextParallel(comm)
        for module in (module for stage in stages for module in stage.modules()):
            if hasattr(module, "cp"):
                module.cp = cp  # type: ignore[assignment]


def spread_experts(stages: Sequence[nn.Module], comm: Communicator, config: Config) -> None:
    """Tell the layers with experts how tokens reach them, and routers what share of a step a microbatch is."""
    parallel, train = config.parallel, config.train
    for module in (module for stage in stages for module in stage.modules()):
        if isinstance(module, MoE):
            sources = Sources.of(comm.mesh) if module.experts.fp8 else ONE_SOURCE
            module.dispatcher = make_dispatcher(
                parallel.dispatcher, comm, config.model.moe.experts, parallel.node_ranks, sources
            )
            module.dispatcher.backend = config.train.kernels
            module.dispatcher.fp8 = config.precision.fp8_dispatch
            module.experts.first_part = comm.mesh.index("etp") == 0
            module.router.share, module.router.seed = train.micro_batch / train.global_batch, train.seed


def apply_kernels(model: nn.Module, backend: str) -> None:
    """Tell every module that calls kernels which to take."""
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend  # type: ignore[assignment]


def apply_recompute(model: Transformer, recompute: RecomputeConfig) -> None:
    """Chooses what backward computes again instead of keeping, in every n-th layer, and what waits in host memory.

    "activation": what the norms and the MLP's activation function give, the cheapest memory there is (norms not where
    everything waits in host memory). "selective": attention probabilities too; no weight matmul runs twice but the last
    of the experts'. "full": whole blocks; only their inputs are kept. Every mode gives the same bits.
    """
    mode = recompute.mode
    assert mode in ("none", "activation", "selective", "full"), mode
    for layer, block in model.layers.items():
        chosen = layer % recompute.layers == 0
        block.keeping.again = chosen and mode == "full"
        block.keeping.norms = chosen and mode in ("activation", "selective") and not recompute.offload
        block.keeping.offload = recompute.offload
        block.attention.recompute = chosen and mode == "selective"
        block.mlp.recompute = chosen and mode in ("activation", "selective")


def apply_compile(model: Transformer) -> None:
    """torch.compile of each block alone: equal blocks share their compiled code, and a break stays inside one. Experts
    stay as they are: their sizes depend on the data, and most of it is communication."""
    for block in model.layers.values():
        if isinstance(block.mlp, MoE):
            block.mlp.forward = torch.compiler.disable(block.mlp.forward)  # type: ignore[method-assign]
        block.compile()


def defer_weights(stage: nn.Module) -> DeferredWeights:
    """Let the weight gradients of the stage's linears wait for a W of a zero-bubble schedule."""
    deferred = DeferredWeights()
    for module in stage.modules():
        if isinstance(module, Linear):
            module.deferred = deferred
    return deferred
