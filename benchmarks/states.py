"""What narrow optimizer states cost: bytes of a parameter, error of an update, loss of a small training.

    python benchmarks/states.py [optim=adamw,muon,sgd] [states=bf16,fp8,int8] [steps=100]

A small model on the embedded corpus, in bf16 with float32 main weights. One training keeps float32 moments; beside it
the others get the same gradients and the same weights in every step, with moments of their own, and the update of the
last step is compared: ‖its - float32's‖ / ‖float32's‖ over all weights, and of the tensor where it is largest. Then
each trains by itself; its validation loss is beside that of float32 moments, and beside how far two seeds are apart.
Predicted bytes are those of train/memory.py.
"""

import sys
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import torch
from megalite_kernels import tune_allocator

from megalite import Trainer, load_config
from megalite.config import schema
from megalite.config.options import HelpRequested, parse_options
from megalite.optim.optimizer import Optimizer
from megalite.train.memory import predict

LR = {"adamw": 3e-3, "muon": 3e-3, "sgd": 0.3}
JOB = (
    "precision=bf16", "model.layers=2", "model.hidden=256", "model.heads=4", "model.ffn=512", "train.micro_batch=4",
    "train.global_batch=4", "train.threads=1", "train.dry_run=false", "data.sequence_length=64", "data.vocab=512",
    "data.max_bytes=500000", "train.final_eval=false", "checkpoint.every=null", "log.report=false",
    "log.progress=none",
)  # fmt: skip

EVALUATED = 64
"""Global batches of the validation set."""


@dataclass(kw_only=True)
class Options:
    optim: list[str] = schema.key(["adamw", "muon", "sgd"], "Update rules.", choices=tuple(LR))
    states: list[str] = schema.key(["bf16", "fp8", "int8"], "States beside fp32.", choices=("bf16", "fp8", "int8"))
    steps: int = schema.key(100, "Steps.", minimum=1)


class Shadow:
    """Moments that see the gradients of another's training."""

    def __init__(self, trainer: Trainer, states: str) -> None:
        precision = replace(trainer.precision, moments=states)
        self.real = trainer.optimizer
        arguments = trainer.stages, trainer.gradients, trainer.config.optim, trainer.config.train.steps
        self.optimizer = Optimizer(*arguments, precision, trainer.config.train.seed)

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """What this step would add to the weights."""
        pairs = list(zip(self.real.main.items(), self.optimizer.main.values(), strict=True))
        for (_, theirs), ours in pairs:
            ours.data.copy_(theirs)
        self.optimizer.step(step)
        return {piece.slot.name: (ours - theirs).detach() for (piece, theirs), ours in pairs}

    def bytes(self) -> float:
        """Of moments, a parameter."""
        elements = sum(main.numel() for main in self.optimizer.main.values())
        held = self.optimizer.state_tensors().items()
        return sum(h.bytes for name, h in held if name.startswith("optim.") and not name.endswith(".step")) / elements

    def predicted(self, trainer: Trainer) -> float:
        precision = replace(trainer.precision, moments=self.optimizer.kept_as)
        memory = predict(trainer.config, trainer.vocab, precision)
        return memory.optimizer / (memory.weights / precision.compute.itemsize) - precision.main.itemsize


def distance(update: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], names: list[str]) -> float:
    off = sum((update[name] - exact[name]).double().square().sum() for name in names)
    return float((off / sum(exact[name].double().square().sum() for name in names)).sqrt())


def updates(optim: str, options: Options, folder: str) -> dict[str, tuple[float, float, float, float]]:
    """states -> bytes predicted and measured, error of the last update, and of its worst tensor."""
    trainer = Trainer(load_config(*job(optim, "fp32", options, folder)), callbacks=[])
    shadows = {states: Shadow(trainer, states) for states in ("fp32", *options.states)}
    made: dict[str, dict[str, torch.Tensor]] = {}
    real = trainer.optimizer.step

    def step(number: int) -> None:
        made.update({states: shadow.update(number) for states, shadow in shadows.items()})
        real(number)

    trainer.optimizer.step = step  # type: ignore[method-assign]
    for _ in range(options.steps):
        trainer.train_step()
    exact = made["fp32"]
    return {
        states: (
            shadow.predicted(trainer),
            shadow.bytes(),
            distance(made[states], exact, list(exact)),
            max(distance(made[states], exact, [name]) for name in exact),
        )
        for states, shadow in shadows.items()
    }


def job(optim: str, states: str, options: Options, folder: str, seed: int = 1) -> list[str]:
    own = f"run.dir={folder}/{optim}-{states}-{seed}", f"optim.name={optim}", f"optim.lr={LR[optim]}"
    return [*JOB, *own, f"precision.states={states}", f"train.steps={options.steps}", f"train.seed={seed}"]


def loss(optim: str, states: str, options: Options, folder: str, seed: int = 1) -> float:
    """Validation loss of a training."""
    trainer = Trainer(load_config(*job(optim, states, options, folder, seed)), callbacks=[])
    trainer.fit()
    if trainer.step < options.steps:
        sys.exit(f"stopped after {trainer.step} of {options.steps} steps")
    return trainer.evaluate(EVALUATED)[0].loss


def main() -> int:
    try:
        options = parse_options(Options, sys.argv[1:], __doc__ or "")
    except HelpRequested as help:
        print(help)
        return 0
    tune_allocator()
    print("| optimizer | moments | bytes predicted | measured | error of the update | worst tensor | loss | off fp32 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with TemporaryDirectory() as folder:
        for optim in options.optim:
            plain = loss(optim, "fp32", options, folder)
            seed = loss(optim, "fp32", options, folder, seed=2)
            for states, (predicted, measured, whole, worst) in updates(optim, options, folder).items():
                final = plain if states == "fp32" else loss(optim, states, options, folder)
                off = (
                    f"another seed {100 * (seed / plain - 1):+.2f}%"
                    if states == "fp32"
                    else f"{100 * (final / plain - 1):+.2f}%"
                )
                row = f"{predicted:.3f} | {measured:.3f} | {whole:.4f} | {worst:.4f} | {final:.4f} | {off}"
                print(f"| {optim} | {states} | {row} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
