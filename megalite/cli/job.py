"""The words after `megalite train` and `megalite config`: overrides and the few flags Hydra users know."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalite.config.load import load_config
from megalite.config.options import HelpRequested
from megalite.config.schema import Config
from megalite.errors import UserError

FLAGS = """\
  --config-dir DIR      a folder with YAML files and groups of your own
  --config-name NAME    start from DIR/NAME.yaml
  --cfg job             print the configuration and stop
  --multirun, -m        a job for each combination of values listed with commas, one after another
  --nproc-per-node N    start N processes on this host; with --multirun: for each job
  --world-size N        check the configuration for a job of N ranks"""


@dataclass
class Job:
    """`cfg`: print the configuration instead of running. `multirun`: one job for every combination of comma lists."""

    overrides: list[str] = field(default_factory=list)
    config_dir: Path | None = None
    config_name: str = "train"
    cfg: bool = False
    multirun: bool = False
    processes: int = 1
    world_size: int | None = None

    def config(self, world_size: int | None = None) -> Config:
        return load_config(
            *self.overrides,
            config_dir=self.config_dir,
            config_name=self.config_name,
            world_size=self.world_size or world_size,
        )

    def place(self) -> list[str]:
        """The flags that name where the configuration starts and its world size, for another process."""
        folder = [] if self.config_dir is None else ["--config-dir", str(self.config_dir)]
        size = [] if self.world_size is None else ["--world-size", str(self.world_size)]
        return [*folder, "--config-name", self.config_name, *size]


def parse_job(arguments: Sequence[str], usage: str) -> Job:
    """Split flags from overrides; UserError for an unknown flag or a missing value, HelpRequested for --help."""
    job, words = Job(), list(arguments)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if not flag.startswith("-"):
            job.overrides.append(flag + equals + value)
        elif flag in ("-h", "--help"):
            raise HelpRequested(_help(usage))
        elif flag in ("-m", "--multirun"):
            job.multirun = True
        elif flag in TAKERS:
            if not equals and not words:
                raise UserError(f"{flag}: needs a value")
            TAKERS[flag](job, flag, value if equals else words.pop(0))
        else:
            known = ", ".join(["--help", "--multirun", *(name for name in TAKERS if name.startswith("--"))])
            raise UserError(f"{flag}: unknown flag; known are {known}")
    return job


def _take_dir(job: Job, flag: str, value: str) -> None:
    job.config_dir = Path(value)
    if not job.config_dir.is_dir():
        raise UserError(f"{flag} {value}: no such folder")


def _take_name(job: Job, flag: str, value: str) -> None:
    job.config_name = value


def _take_cfg(job: Job, flag: str, value: str) -> None:
    if value != "job":
        raise UserError(f"{flag} {value}: only --cfg job is known")
    job.cfg = True


def _take_processes(job: Job, flag: str, value: str) -> None:
    job.processes = _count(flag, value)


def _take_world_size(job: Job, flag: str, value: str) -> None:
    job.world_size = _count(flag, value)


def _count(flag: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{flag} {value}: expects a number of processes, 1 or more")
    return int(value)


TAKERS = {
    "--config-dir": _take_dir,
    "-cd": _take_dir,
    "--config-name": _take_name,
    "-cn": _take_name,
    "--cfg": _take_cfg,
    "-c": _take_cfg,
    "--nproc-per-node": _take_processes,
    "--world-size": _take_world_size,
}


def _help(usage: str) -> str:
    from megalite.config.words import GROUPS, choices

    groups = (f"  {group + '=':<12} {' '.join(choices(group, None))}" for group in GROUPS)
    return "\n".join([usage.rstrip(), "", "Flags:", FLAGS, "", "Groups:", *groups])
