"""`megalite config`: the resolved configuration, where each value came from, and every violated rule at once."""

from megalite.cli.job import parse_job
from megalite.errors import UserError

USAGE = """Usage: megalite config [group=choice ...] [key=value ...]

Print the configuration that `megalite train` would use for the same words, with the origin of each value.
The output is YAML: in a file NAME.yaml, `--config-dir . --config-name NAME` repeats it."""


def run(arguments: list[str]) -> int:
    job = parse_job(arguments, USAGE)
    if job.multirun:
        raise UserError("--multirun: config shows one configuration at a time; leave it out")
    if job.processes > 1:
        raise UserError(f"--nproc-per-node: config starts nothing; use --world-size {job.processes}")
    from megalite.config.origin import explained

    text, problems = explained(job.overrides, job.config_dir, job.config_name, job.world_size)
    print(text, end="")
    if problems:
        raise UserError(*problems)
    return 0
