"""`megalite train`: pretrain from a configuration; alone, as all ranks of this host, or as one rank of torchrun's."""

import os
import sys

from megalite.cli.job import Job, parse_job
from megalite.cli.local import run_ranks
from megalite.cli.multirun import multirun
from megalite.config.load import config_yaml
from megalite.errors import UserError

USAGE = """Usage: megalite train [group=choice ...] [key=value ...]

Pretrain a model; started again, it goes on from the run folder's newest complete checkpoint.

  megalite train experiment=quickstart
  megalite train --nproc-per-node 2 experiment=quickstart optim.lr=1e-3
  torchrun --nproc-per-node 2 -m megalite train experiment=quickstart     the same, with torchrun's restarts and hosts
  megalite train --config-dir runs/quickstart --config-name config run.name=again     repeat a run
  megalite train --multirun optim.lr=1e-3,2e-3                        one run after the other
  megalite train experiment=quickstart --cfg job                      print the configuration, run nothing

Every key: docs/config.md. What is set and why: megalite config [the same words]."""


def run(arguments: list[str]) -> int:
    job = parse_job(arguments, USAGE)
    if job.processes > 1 and "RANK" in os.environ:
        raise UserError("--nproc-per-node: not under torchrun, which has started the processes; leave it out")
    if job.multirun:
        return multirun(job)
    if job.processes > 1 and not job.cfg:
        return run_ranks([sys.executable, "-m", "megalite", "train", *job.place(), *job.overrides], job.processes)
    return train(job)


def train(job: Job) -> int:
    """This process as the only rank, or as the one that the environment says."""
    from megalite.world import join, leave, world_from_environment  # torch: the start of several ranks does without

    world = world_from_environment()
    try:
        config = job.config(max(world.size, job.processes))
    except UserError:
        if world.rank == 0:
            raise
        return UserError.exit_code  # every rank reads the same words: rank 0 speaks for all
    if job.cfg:
        if world.rank == 0:
            print(config_yaml(config), end="")
        return 0
    from megalite.report.run_report import summary
    from megalite.train.trainer import Trainer

    try:
        join(world)
        trainer = Trainer(config)
        trainer.fit()
        if world.rank == 0 and config.log.progress != "none":
            report = [f"report: {trainer.run_dir / 'report.html'}"] if config.log.report else []
            print(*summary(trainer.run_dir), *report, sep="\n", flush=True)
    except UserError as error:
        if world.rank == 0 or not error.on_every_rank:
            raise
        return error.exit_code
    finally:
        leave()
    return 0
