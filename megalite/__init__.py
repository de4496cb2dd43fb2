"""megalite: pretraining of language models. Importing it loads nothing heavy; names below load on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalite.config.load import load_config
    from megalite.train.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["Trainer", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    if name == "load_config":
        from megalite.config.load import load_config

        return load_config
    if name == "Trainer":
        from megalite.train.trainer import Trainer

        return Trainer
    raise AttributeError(f"module 'megalite' has no attribute {name!r}")
