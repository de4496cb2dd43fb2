"""The words after `megalite train` and `megalite config`: overrides and the few flags Hydra users know."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megalite.config.load import load_config
from megalite.config.options import HelpRequested
from megalite.config.schema import Config
from megalite.errors import UserError


@dataclass
class Job:
    """`cfg`: print the configuration instead of running. `multirun`: one job for every combination of comma lists."""

    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    config_name: str = "train"
    cfg: bool = False
    multirun: bool = False

    def config(self, world_size: int | None = None) -> Config:
        return load_config(
            *self.overrides, config_dir=self.config_dir, config_name=self.config_name, world_size=world_size
        )


def parse_job(arguments: Sequence[str], usage: str) -> Job:
    """Split flags from overrides; UserError for an unknown flag or a missing value."""
    job, words = Job(), list(arguments)
    while words:
        word = words.pop(0)
        flag, _, value = word.partition("=")
        if word in ("-h", "--help"):
            raise HelpRequested(usage)
        if word in ("-m", "--multirun"):
            job.multirun = True
        elif flag in ("--config-dir", "-cd", "--config-name", "-cn", "--cfg", "-c"):
            if not value:
                if not words:
                    raise UserError(f"{flag}: needs a value")
                value = words.pop(0)
            if flag in ("--config-dir", "-cd"):
                job.config_dir = value
            elif flag in ("--config-name", "-cn"):
                job.config_name = value
            elif value == "job":
                job.cfg = True
            else:
                raise UserError(f"{flag} {value}: only --cfg job is known")
        elif word.startswith("-"):
            raise UserError(f"{word}: unknown flag; known are --config-dir, --config-name, --cfg job, --multirun, --help")
        else:
            job.overrides.append(word)
    return job
