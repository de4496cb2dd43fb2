"""Everything that watches a run, one file an observer; `make_observers` reads log.* and train.profile_step."""

from megalite.config.schema import Config
from megalite.train.callback import Callback
from megalite.train.observers.files import EventsFile, MetricsFile
from megalite.train.observers.profiler import StepProfiler
from megalite.train.observers.progress_line import ProgressLine
from megalite.train.observers.report_writer import ReportWriter
from megalite.train.observers.tensorboard import TensorBoardLog
from megalite.train.observers.wandb import WandbLog


def make_observers(config: Config) -> list[Callback]:
    """The observers this configuration asks for, in the order they are called.

    Files come first, so that what is drawn is already kept; the report comes last, when the files are complete. Raises
    UserError when a package that was asked for is missing.
    """
    observers: list[Callback] = []
    if config.train.profile_step:
        observers.append(StepProfiler(config.train.profile_step))
    observers += [MetricsFile(), EventsFile(), ProgressLine(config.log.progress)]
    if config.log.tensorboard:
        observers.append(TensorBoardLog())
    if config.log.wandb != "disabled":
        observers.append(WandbLog(config.log.wandb))
    return [*observers, ReportWriter()]
