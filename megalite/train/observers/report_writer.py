"""What a finished run leaves for a reader: sample.txt, baselines.json and report.html."""

from collections.abc import Callable
from pathlib import Path

import torch

from megalite.disk import replace_text
from megalite.errors import UserError
from megalite.report.baselines import write_baselines
from megalite.report.run_report import write_report
from megalite.train.callback import Callback, TrainerView
from megalite.train.sampling import generate

SAMPLE_TOKENS = 300
SAMPLE_TEMPERATURE = 0.6
"""Lower than what `generate` takes by default: models this early are too unsure for more."""
SHORTEST_TEXT = 1000


class ReportWriter(Callback):
    """At the end. An interrupted run gets its report too, without sample and baselines.

    The run is over and kept by then: what fails here is said in a warning, and the rest goes on.
    """

    def on_end(self, trainer: TrainerView) -> None:
        log = trainer.config.log
        prompt = log.sample
        if trainer.step >= trainer.config.train.steps:
            if prompt is not None:
                _attempt(trainer, "log.sample", lambda: write_sample(trainer, prompt))
            if log.baselines:
                _attempt(trainer, "log.baselines", lambda: measure_baselines(trainer))
        if log.report:
            _attempt(trainer, "log.report", lambda: write_report(trainer.run_dir))


def _attempt(trainer: TrainerView, key: str, write: Callable[[], object]) -> None:
    try:
        write()
    except UserError as error:
        trainer.event("warning", message=str(error))
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        trainer.event("warning", message=f"{key}: failed, the rest goes on ({what})")


def measure_baselines(trainer: TrainerView) -> None:
    """baselines.json of the first validation set. Raises UserError when its text cannot be had back or is too short."""
    train, valid = (trainer.data.raw_bytes(split) for split in ("train", "validation"))
    if len(train) < SHORTEST_TEXT or not valid:
        raise UserError("log.baselines: too little text to count n-grams on, so there are none")
    first = trainer.data.validation[0]
    write_baselines(trainer.run_dir, train, valid, validation=first.name, validation_tokens=first.n_tokens)


def write_sample(trainer: TrainerView, prompt: str) -> Path:
    """Continue `prompt` with the trained weights (seed: train.seed) into sample.txt, prompt included."""
    tokenizer = trainer.data.tokenizer
    start = [tokenizer.eod, *tokenizer.encode(prompt)]
    with torch.compiler.set_stance("force_eager"):  # every new length would be compiled again
        new = generate(
            trainer.model,
            start,
            SAMPLE_TOKENS,
            temperature=SAMPLE_TEMPERATURE,
            seed=trainer.config.train.seed,
            stop=tokenizer.eod,
            vocab=tokenizer.vocab,
        )
    target = trainer.run_dir / "sample.txt"
    replace_text(target, prompt + tokenizer.decode(new))
    return target
