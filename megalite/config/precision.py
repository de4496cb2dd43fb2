"""Rules of the precision policy."""

import math
from collections.abc import Iterator

from megalite.config.rules import Job, Rules
from megalite.config.schema import PrecisionConfig

RULES = Rules()
LARGEST_LOSS_SCALE = 2.0**32
"""So that float32 holds the sum of squares of what is scaled."""


@RULES.reads(
    *("precision.name", "precision.loss_scale", "precision.loss_scale_window", "precision.loss_scale_hysteresis")
)
def loss_scale_is_a_power_of_two(job: Job) -> Iterator[str]:
    precision, usual = job.config.precision, PrecisionConfig()
    scale = precision.loss_scale
    if math.frexp(scale)[0] != 0.5 or scale > LARGEST_LOSS_SCALE:
        near = min(LARGEST_LOSS_SCALE, 2.0 ** round(math.log2(scale)))
        yield f"precision.loss_scale={scale:g}: a power of two up to 2^32, so that it rounds nothing; nearest: {near:g}"
    if precision.name != "fp16":
        for name in ("loss_scale", "loss_scale_window", "loss_scale_hysteresis"):
            if getattr(precision, name) != getattr(usual, name):
                yield f"precision.{name}={getattr(precision, name)}: has no effect without precision=fp16; leave it out"


@RULES.reads("precision.name", "parallel.zero", "parallel.engine")
def pure_bf16_has_its_own_update(job: Job) -> Iterator[str]:
    config = job.config
    if config.precision.name != "bf16_pure" or config.parallel.engine == "deepspeed":
        return
    if config.parallel.zero == 3:
        yield "parallel.zero=3: not built for precision=bf16_pure; legal: 0, 1, 2; or precision=bf16"


@RULES.reads("precision.states", "precision.communicate", "parallel.engine")
def deepspeed_has_dtypes_of_its_own(job: Job) -> Iterator[str]:
    for name in ("states", "communicate") if job.config.parallel.engine == "deepspeed" else ():
        value = getattr(job.config.precision, name)
        if value != "auto":
            legal = "set auto, or parallel.engine=megalite"
            yield f"precision.{name}={value}: parallel.engine=deepspeed has its own; {legal}"


@RULES.reads(
    *("precision.fp8", "precision.fp8_backward", "precision.fp8_skip"),
    *("precision.fp8_history", "model.layers", "parallel.overlap", "parallel.engine", "train.compile"),
)
def fp8_reaches_a_layer(job: Job) -> Iterator[str]:
    config, precision, usual = job.config, job.config.precision, PrecisionConfig()
    chosen = precision.fp8 != "none"
    for name in ("fp8_backward", "fp8_skip"):
        if not chosen and getattr(precision, name) != getattr(usual, name):
            yield f"precision.{name}={getattr(precision, name)}: has no effect with precision.fp8=none; leave it out"
    if precision.fp8 == "nvfp4" and precision.fp8_backward != usual.fp8_backward:
        yield f"precision.fp8_backward={precision.fp8_backward}: precision.fp8=nvfp4 has gradients in e2m1; set auto"
    if precision.fp8 != "delayed" and precision.fp8_history != usual.fp8_history:
        steps = precision.fp8_history
        yield f"precision.fp8_history={steps}: has no effect without precision.fp8=delayed; leave it out"
    if not chosen:
        return
    layers, skipped = config.model.layers, precision.fp8_skip
    if len(skipped) != 2 or min(skipped) < 0:
        yield f"precision.fp8_skip={skipped}: expects two numbers, of first and of last layers, such as [1,1] or [0,0]"
    elif sum(skipped) >= layers:
        yield f"precision.fp8_skip={skipped}: leaves none of {layers} layers; together at most {layers - 1}"
    if config.parallel.overlap:
        yield f"parallel.overlap=true: not built for precision.fp8={precision.fp8}; set false"
    if config.parallel.engine == "deepspeed":
        legal = "set none, or parallel.engine=megalite"
        yield f"precision.fp8={precision.fp8}: parallel.engine=deepspeed has none; {legal}"
    if config.train.compile:
        yield f"train.compile=true: not built for precision.fp8={precision.fp8}; set false"


@RULES.reads("precision.fp8", "model.moe.pad", "model.mlp_bias", "model.moe.experts")
def padding_sets_no_scale(job: Job) -> Iterator[str]:
    """Rows of zeros give zeros all the way through an expert, but for its biases."""
    model, fp8 = job.config.model, job.config.precision.fp8
    if fp8 not in ("none", "nvfp4") and model.moe.experts and model.moe.pad and model.mlp_bias:
        yield f"model.moe.pad=true: with precision.fp8={fp8} and model.mlp_bias, what fills up sets scales; set false"


@RULES.reads("precision.fp8_dispatch", "model.moe.experts")
def tokens_travel_to_experts(job: Job) -> Iterator[str]:
    if job.config.precision.fp8_dispatch and not job.config.model.moe.experts:
        yield "precision.fp8_dispatch=true: has no effect without model.moe.experts; leave it out"
