"""Everything that watches a run. `make_observers` reads log.* and train.profile_step; the rest is one file an observer."""

from megalite.config.schema import Config
from megalite.train.callback import Callback
from megalite.train.observers.files import EventsFile, MetricsFile
from megalite.train.observers.progress_line import ProgressLine


def make_observers(config: Config) -> list[Callback]:
    """The observers this configuration asks for, in the order they are called."""
    return [MetricsFile(), EventsFile(), ProgressLine(config.log.progress)]
