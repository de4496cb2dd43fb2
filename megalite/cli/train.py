"""`megalite train`: pretrain from a configuration; alone or, started by torchrun, as one rank of many."""

import subprocess
import sys
from itertools import product

from megalite.cli.job import Job, parse_job
from megalite.config.load import config_yaml
from megalite.errors import UserError
from megalite.world import World, join, leave, world_from_environment

USAGE = """Usage: megalite train [group=choice ...] [key=value ...]

Pretrain a model; started again, it goes on from the run folder's newest complete checkpoint.

  megalite train experiment=quickstart
  torchrun --nproc-per-node 2 -m megalite train experiment=quickstart optim.lr=1e-3
  megalite train --config-dir runs/quickstart --config-name config     repeat a run
  megalite train --multirun optim.lr=1e-3,2e-3                        one run after the other
  megalite train experiment=quickstart --cfg job                      print the configuration, run nothing

Every key: docs/config.md. What is set and why: megalite config [the same words]."""


def run(arguments: list[str]) -> int:
    job = parse_job(arguments, USAGE)
    world = world_from_environment()
    if job.multirun:
        return sweep(job, world)
    try:
        config = job.config(world.size)
    except UserError:
        if world.rank == 0:
            raise
        return UserError.exit_code  # every rank reads the same words: rank 0 speaks for all
    if job.cfg:
        if world.rank == 0:
            print(config_yaml(config), end="")
        return 0
    from megalite.train.trainer import Trainer

    try:
        join(world)
        Trainer(config).fit()
    except UserError as error:
        if world.rank == 0 or not error.on_every_rank:
            raise
        return error.exit_code
    finally:
        leave()
    return 0


def sweep(job: Job, world: World) -> int:
    """One process after the other, never inside torchrun: there every rank would sweep by itself."""
    if world.size > 1:
        raise UserError("--multirun: not under torchrun, every rank would sweep; start one torchrun a job")
    choices = []
    for word in job.overrides:
        key, equals, values = word.partition("=")
        plain = not equals or values[:1] in ("[", "{", "'", '"')
        choices.append([word] if plain else [f"{key}={value}" for value in values.split(",")])
    flags = ["--config-name", job.config_name] + (["--config-dir", job.config_dir] if job.config_dir else [])
    combinations = list(product(*choices))
    names = [word for word in job.overrides if word.startswith("run.name=")]
    worst = 0
    for number, words in enumerate(combinations):
        name = names[0].partition("=")[2] if names else "sweep"
        own = [word for word in words if not word.startswith("run.name=")] + [f"run.name={name}-{number}"]
        print(f"[{number + 1}/{len(combinations)}] {' '.join(own)}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, "-m", "megalite", "train", *flags, *own]).returncode)
    return worst
