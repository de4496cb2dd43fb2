"""Pipeline schedules: `make_schedule` writes the computation by name, `lower` makes it executable.

No torch here: the configuration's rules and the command line read schedules too.
"""

from megalite.pipeline.schedule.lower import lower
from megalite.pipeline.schedule.named import RECIPES, default_chunks, make_schedule, memory_bound, schedule_problems
from megalite.pipeline.schedule.ops import Kind, Op, Schedule

__all__ = [
    "NAMES", "Kind", "Op", "Schedule", "default_chunks", "lower", "make_schedule", "memory_bound", "schedule_problems",
]  # fmt: skip

NAMES = tuple(RECIPES)
"""What parallel.schedule may be; or a FILE.csv."""
