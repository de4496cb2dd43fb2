"""model.rope.scaling: a mapping in the configuration, as people paste it from a config.json; typed for who reads it."""

import math
from collections.abc import Iterator

from megalite.config.build import build
from megalite.config.rules import Job, Rules
from megalite.config.schema import RopeConfig, RopeScaling
from megalite.config.tree import leaves, outside
from megalite.errors import UserError

RULES = Rules()
KEY = "model.rope.scaling"


def scaling_of(rope: RopeConfig) -> RopeScaling:
    """The scaling with its defaults. Raises UserError for names and types that it does not have."""
    try:
        return build(RopeScaling, rope.scaling)
    except UserError as error:
        raise UserError(*(f"{KEY}.{line}" for line in error.lines)) from None


def stretched_theta(rope: RopeConfig, rotated: int) -> float:
    """The base for `rotated` dimensions of a head; static NTK-aware scaling stretches it."""
    scaling = scaling_of(rope)
    stretch = scaling.factor ** (rotated / (rotated - 2)) if scaling.rope_type == "ntk" else 1.0
    return float(rope.theta * stretch)


def yarn_factor(scaling: RopeScaling) -> float:
    """What yarn multiplies cos and sin by (arXiv 2309.00071, section 3.4)."""
    stated = scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if stated is None else stated


@RULES.reads("model.position", KEY)
def rope_scaling_is_whole(job: Job) -> Iterator[str]:
    model = job.config.model
    try:
        scaling = scaling_of(model.rope)
    except UserError as error:
        yield from error.lines
        return
    kind = scaling.rope_type
    wrong = [line for leaf in leaves(RopeScaling).values() if (line := outside(leaf, getattr(scaling, leaf.path)))]
    yield from (f"{KEY}.{line}" for line in wrong)
    if kind != "default" and model.position != "rope":
        yield f"{KEY}.rope_type={kind}: needs model.position=rope (it is {model.position}); or set default"
    if model.rope.scaling and "rope_type" not in model.rope.scaling:
        yield f"{KEY}={model.rope.scaling}: has no effect without rope_type (linear, ntk, yarn, llama3)"
    if kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (
            f"{KEY}.high_freq_factor={scaling.high_freq_factor}: must be above low_freq_factor"
            f" {scaling.low_freq_factor}; Llama 3 uses 4 and 1"
        )
    if kind == "yarn" and scaling.beta_fast <= scaling.beta_slow:
        yield (
            f"{KEY}.beta_fast={scaling.beta_fast}: must be above beta_slow {scaling.beta_slow};"
            " the YaRN paper uses 32 and 1"
        )
