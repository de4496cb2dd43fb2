"""What a finished run leaves for a reader: sample.txt, baselines.json and report.html."""

import os
from pathlib import Path

import torch

from megalite.errors import UserError
from megalite.report.baselines import write_baselines
from megalite.report.run_report import write_report
from megalite.train.callback import Callback, TrainerView
from megalite.train.sampling import generate

SAMPLE_TOKENS = 300
SHORTEST_TEXT = 1000


class ReportWriter(Callback):
    """At the end. An interrupted run gets its report too, without sample and baselines."""

    def on_end(self, trainer: TrainerView) -> None:
        log = trainer.config.log
        if trainer.step >= trainer.config.train.steps:
            if log.sample is not None:
                write_sample(trainer, log.sample)
            if log.baselines:
                self._baselines(trainer)
        if log.report:
            write_report(trainer.run_dir)

    def _baselines(self, trainer: TrainerView) -> None:
        """A text that cannot be had back must not cost a finished run its report: it is said, and they are left out."""
        try:
            train, valid = (trainer.data.raw_bytes(split) for split in ("train", "validation"))
        except UserError as error:
            trainer.event("warning", message=str(error))
            return
        if len(train) < SHORTEST_TEXT or not valid:
            trainer.event("warning", message="log.baselines: too little text to count n-grams on, so there are none")
            return
        write_baselines(trainer.run_dir, train, valid)


def write_sample(trainer: TrainerView, prompt: str) -> Path:
    """Continue `prompt` with the trained weights (seed: train.seed) into sample.txt, prompt included."""
    tokenizer = trainer.data.tokenizer
    start = [tokenizer.eod, *tokenizer.encode(prompt)]
    with torch.compiler.set_stance("force_eager"):  # every new length would be compiled again
        new = generate(trainer.model, start, SAMPLE_TOKENS, seed=trainer.config.train.seed, stop=tokenizer.eod)
    target = trainer.run_dir / "sample.txt"
    temporary = target.with_name("sample.txt.part")
    temporary.write_text(prompt + tokenizer.decode(new), encoding="utf-8")
    os.replace(temporary, target)
    return target
