"""`megalite eval`: validation loss, perplexity, bits per byte of a checkpoint, on any layout."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from megalite.config.options import parse_options
from megalite.config.schema import ParallelConfig, key
from megalite.errors import UserError
from megalite.world import join, leave, world_from_environment

USAGE = """Usage: megalite eval runs/NAME [checkpoint=step_00000100] [parallel.tp=2] [key=value ...]

Without parallel.* keys each process holds the whole model and reads samples of its own."""


@dataclass
class EvalOptions:
    run: str = key("", "Folder of the run.")
    checkpoint: str = key("", "Name of one of its checkpoints; empty: the newest.")
    batches: int = key(0, "Global batches to read; 0: the whole validation set.", minimum=0)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def run(arguments: list[str]) -> int:
    options = parse_options(EvalOptions, arguments, USAGE, positional=("run",))
    world = world_from_environment()
    from megalite.train.standalone import evaluate_run

    if not options.run:
        raise UserError("run: missing; give the folder of a run, such as run=runs/quickstart")
    try:
        join(world)
        for result in evaluate_run(Path(options.run), options.checkpoint, options.batches, options.parallel):
            bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
            if world.rank == 0:
                perplexity = math.exp(min(result.loss, 700.0))
                print(
                    f"{result.name}: loss {result.loss:.6f}, perplexity {perplexity:.3f}{bits}, {result.tokens} tokens"
                )
    finally:
        leave()
    return 0
