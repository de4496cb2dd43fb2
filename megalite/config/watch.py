"""Rules of what watches the numbers of a run."""

from collections.abc import Iterator

from megalite.config.rules import Job, Rules

RULES = Rules()


@RULES.reads("debug.numerics", "train.compile", "parallel.engine")
def modules_can_be_watched(job: Job) -> Iterator[str]:
    config = job.config
    if not config.debug.numerics:
        return
    if config.train.compile:
        yield "debug.numerics=true: not with train.compile, which runs no module by itself; set train.compile=false"
    if config.parallel.engine == "deepspeed":
        yield "debug.numerics=true: not built for parallel.engine=deepspeed; set false, or parallel.engine=megalite"


@RULES.reads("train.spike_rewinds", "checkpoint.every", "parallel.engine")
def spikes_can_be_left_behind(job: Job) -> Iterator[str]:
    config = job.config
    which = f"train.spike_rewinds={config.train.spike_rewinds}"
    if not config.train.spike_rewinds:
        return
    if not config.checkpoint.every:
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
