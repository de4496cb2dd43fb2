"""From YAML groups and overrides to one typed, validated Config, and back to YAML."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from megalite.config.build import build
from megalite.config.schema import Config
from megalite.config.validate import validate
from megalite.errors import UserError


def load_config(
    *overrides: str,
    config_dir: str | os.PathLike[str] | None = None,
    config_name: str = "train",
    world_size: int | None = None,
) -> Config:
    """The configuration that `megalite train` would use for the same words.

    `world_size`: ranks of the job, for the rules that join batch and layout; None where no job is running yet: then the
    layout's own product. Raises UserError with every mistake at once.
    """
    from megalite.config.compose import compose  # Hydra loads only where something is composed

    config = build(Config, compose(overrides, None if config_dir is None else Path(config_dir), config_name).values)
    validate(config, world_size)
    return config


def as_values(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values; `build(Config, values)` gives it back."""
    return dataclasses.asdict(config)


def config_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load_config(config_dir=..., config_name=...)` on its file gives it back."""
    return yaml.safe_dump(as_values(config), sort_keys=False, allow_unicode=True, width=1000)


def config_from_yaml(text: str) -> Config:
    """The Config that `config_yaml` wrote. Keys and types are checked; rules across keys are not."""
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"configuration: not YAML: {' '.join(str(error).split())}") from None
    return build(Config, values)
