"""Rules of what watches the numbers of a run."""

from collections.abc import Iterator

from megalite.config.rules import Job, Rules

RULES = Rules()
LEAST_FACTOR = 3
"""One in 700 steps of normal noise."""


@RULES.reads("debug.numerics", "train.compile", "parallel.engine")
def modules_can_be_watched(job: Job) -> Iterator[str]:
    config = job.config
    if not config.debug.numerics:
        return
    if config.train.compile:
        yield "debug.numerics=true: not with train.compile, which runs no module by itself; set train.compile=false"
    if config.parallel.engine == "deepspeed":
        yield "debug.numerics=true: not built for parallel.engine=deepspeed; set false, or parallel.engine=megalite"


@RULES.reads("train.spike_factor", "train.spike_rewinds", "checkpoint.every", "parallel.engine")
def spikes_can_be_left_behind(job: Job) -> Iterator[str]:
    train, config = job.config.train, job.config
    if 0 < train.spike_factor < LEAST_FACTOR:
        given = f"train.spike_factor={train.spike_factor:g}"
        yield f"{given}: takes noise for spikes; at least {LEAST_FACTOR}, or 0 for none"
    if train.spike_rewinds == 0:
        return
    which = f"train.spike_rewinds={train.spike_rewinds}"
    if train.spike_factor == 0:
        yield f"{which}: has no effect with train.spike_factor=0; set that, to 10 for example, or 0 here"
    if config.checkpoint.every == 0:
        yield f"{which}: needs checkpoints to go back to; add for example checkpoint.every=100"
    if config.parallel.engine == "deepspeed":
        yield f"{which}: not built for parallel.engine=deepspeed; set 0, or parallel.engine=megalite"


@RULES.reads("log.statistics", "precision.fp8", "train.compile", "parallel.overlap", "parallel.engine")
def products_can_be_measured(job: Job) -> Iterator[str]:
    config = job.config
    which = f"log.statistics={config.log.statistics}"
    if config.log.statistics == 0:
        return
    if config.train.compile:
        yield f"{which}: not with train.compile, which runs no layer by itself; set train.compile=false, or 0 here"
    if config.precision.fp8 == "nvfp4":
        yield f"{which}: not built for precision.fp8=nvfp4; set 0, or another recipe"
    if config.parallel.overlap:
        yield f"{which}: not with parallel.overlap, whose products come in pieces; set that false, or 0 here"
    if config.parallel.engine == "deepspeed":
        yield f"{which}: not built for parallel.engine=deepspeed; set 0, or parallel.engine=megalite"
