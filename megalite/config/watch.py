"""Rules of what watches the numbers of a run: debug.numerics."""

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
