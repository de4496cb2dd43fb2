"""What every precision keeps: bytes a parameter, and the peak of a process, predicted and measured.

    python benchmarks/memory.py [precision=fp32,bf16,…] [model=s19]

Kept are weights, gradients, optimizer state and, from a step's first product to its end, weights in FP8: predicted by
train/memory.py, measured by adding up what the trainer's tensors lie in. The peak is that of `megalite train` with
AdamW, four sequences a step, in a process of its own: the prediction of its header, and what it reports. A dense model
in float64 to FP8; nvfp4 keeps nothing of a step.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from peers.options import given

from megalite import Trainer, load_config
from megalite.config import schema
from megalite.parallel.fp8 import WeightFactors
from megalite.train.memory import predict

PRESETS = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "configs" / "precision").glob("*.yaml")))
JOB = (
    "data=bytes", "data.sequence_length=256", "train.micro_batch=4", "train.global_batch=4", "train.steps=2",
    "train.threads=1", "optim.warmup_steps=0", "train.final_eval=false", "checkpoint.every=null",
    "log.report=false", "log.baselines=false", "log.sample=null", "log.progress=none",
)  # fmt: skip


@dataclass(kw_only=True)
class Options:
    precision: list[str] = schema.key([name for name in PRESETS if name != "auto"], "Presets.", choices=PRESETS)
    model: str = schema.key("s19", "A model of configs/model.")


def held(trainer: Trainer) -> int:
    """Bytes that weights, gradients and optimizer state lie in."""
    weights = [parameter for stage in trainer.stages for parameter in stage.parameters()]
    state = [tensor for held in trainer.optimizer.state_tensors().values() for _, tensor in held.parts]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*weights, *state)}
    return sum(storages.values()) + trainer.gradients.kept_bytes()


def in_fp8(factors: WeightFactors) -> int:
    return sum(one.codes.nbytes + one.scales.nbytes for made in (factors.kept or {}).values() for one in made)


def kept(words: list[str]) -> tuple[float, float]:
    """Bytes a parameter, predicted and measured."""
    trainer = Trainer(load_config(*words, "train.dry_run=false"), callbacks=())
    sizes: list[int] = []
    for factors in trainer.fp8.weights:

        def end(factors: WeightFactors = factors, drop: object = factors.end) -> None:
            sizes.append(in_fp8(factors))
            drop()  # type: ignore[operator]

        factors.end = end  # type: ignore[method-assign]
    trainer.train_step()
    parameters = sum(parameter.numel() for stage in trainer.stages for parameter in stage.parameters())
    memory = predict(trainer.config, trainer.vocab, trainer.precision)
    predicted = memory.weights + memory.gradients + memory.optimizer
    return predicted / parameters, (held(trainer) + sum(sizes)) / parameters


def peak(words: list[str], folder: Path) -> tuple[float, float]:
    """GB of a process, predicted and measured."""
    subprocess.run([sys.executable, "-m", "megalite", "train", *words], check=True, stdout=subprocess.DEVNULL)
    facts = json.loads((folder / "environment.json").read_text())["facts"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return facts["predicted_memory_gb"], last["memory_gb"]


def main() -> None:
    options = given(Options, __doc__)
    print(
        "| `precision=` | kept, bytes a parameter: predicted | measured | peak of a process, GB: predicted | measured |"
    )
    print("| --- | --: | --: | --: | --: |")
    for name in options.precision:
        with TemporaryDirectory() as folder:
            words = [f"precision={name}", f"model={options.model}", *JOB]
            of_a_parameter = kept([*words, f"run.dir={folder}/kept"])
            of_a_process = peak([*words, f"run.dir={folder}/run"], Path(folder) / "run")
        row = " | ".join(f"{value:.2f}" for value in (*of_a_parameter, *of_a_process))
        print(f"| `{name}` | {row} |", flush=True)


if __name__ == "__main__":
    main()
