"""What the header says of FP8: which modules multiply in it and which do not, with which scales, by which kernel."""

import torch
from megalite_kernels.dispatch import Decision
from megalite_kernels.explain import decision

from megalite.config.schema import Config
from megalite.model.parallelize import fp8_layers, fp8_recipe
from megalite.model.size import moe_layers
from megalite.precision import SHORT, Precision

SCALES = {
    "delayed": "a scale a tensor, from the largest values of the last {steps} steps",
    "tensorwise": "a scale a tensor, from its own values",
    "rowwise": "a scale a row of each factor",
    "blockwise": "a scale for 1x128 of inputs and gradients, 128x128 of weights",
    "mxfp8": "a power of two for each 32 that a product adds up",
    "nvfp4": "a scale for 1x16 of inputs and gradients, 16x16 of weights, and one a tensor",
}
SIZES = {"blockwise": 128, "mxfp8": 32, "nvfp4": 16}


def fp8_lines(config: Config, precision: Precision, device: torch.device) -> list[str]:
    """Modules in FP8 and their scales; those that are not; what travels in it; how products are made.
    Nothing without FP8."""
    recipe, name = fp8_recipe(config), config.precision.fp8
    sent = ["fp8 dispatch: tokens to experts, their gradients back from them: e4m3, a power of two for each 128"]
    sent = sent if config.precision.fp8_dispatch else []
    if name == "none":
        return sent
    layers, compute = config.model.layers, SHORT[precision.compute]
    chosen = fp8_layers(config)
    kept = [_layers(part) for part in (range(chosen.start), range(chosen.stop, layers)) if part]
    others = ["embedding", "norms", "attention's products of activations", "head"]
    if config.model.mtp:
        others.append("multi-token modules")
    moe = moe_layers(config.model) > 0
    if moe and recipe is None:
        others.append("experts")
    scales = SCALES[name].format(steps=config.precision.fp8_history)
    formats = "e2m1, gradients rounded stochastically" if recipe is None else f"e4m3, gradients {recipe.backward}"
    products = "linears and experts" if moe and recipe is not None else "linears"
    lines = [
        f"{name if recipe is None else f'fp8 {name}'}: {products} of {_layers(chosen)}; {formats}; {scales}",
        f"{compute}: {', '.join([*kept, *others])}" + f"; {config.model.moe.router_dtype} or wider: router" * moe,
    ]
    size, parallel = SIZES.get(name), config.parallel
    if size and parallel.tp * parallel.cp * parallel.etp > 1:
        axes = "tp, cp and etp" if moe else "tp and cp"
        lines.append(f"blocks of {size} start anew with each rank's part of a tensor, as {axes} cut it")
    if recipe is None:
        return [*lines, *sent, f"nvfp4 products: {_emulation(precision)}"]
    recipes = recipe.blocks("input"), recipe.blocks("weight")
    made = decision("scaled_mm", device.type, precision.compute, recipes=recipes, aligned=True)
    lines += [*sent, f"fp8 products: {_by(made, precision)}"]
    if moe:  # each sums over as many rows as its expert has, into what microbatches add up in
        recipes = (recipe.blocks("gradient"),) * 2
        made = decision("scaled_mm", device.type, _summed(precision), recipes=recipes, aligned=False)
        lines.append(f"fp8 gradients of experts' weights: {_by(made, precision)}")
    return lines


def _by(made: Decision, precision: Precision) -> str:
    return f"{made}: {_emulation(precision)}" if made.backend in ("native", "reference") else f"{made}"


def _emulation(precision: Precision) -> str:
    return f"exact emulation, quantised, widened and summed in {str(_summed(precision)).removeprefix('torch.')}"


def _summed(precision: Precision) -> torch.dtype:
    return torch.promote_types(precision.compute, torch.float32)


def _layers(chosen: range) -> str:
    return f"layer {chosen[0]}" if len(chosen) == 1 else f"layers {chosen[0]} to {chosen[-1]}"
