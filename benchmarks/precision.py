"""The quickstart, dense and with experts, in every precision beside float32: final loss, curves, docs/precision.md.

    python benchmarks/precision.py [experiments=quickstart,moe_quickstart] [recipes=fp32,bf16,…] [out=runs/precision]

Each run is `megalite train experiment=… precision=… precision.fp8=…` with the experiment's own values, in a folder of
its own under `out`: what is finished is not run again, what was cut off goes on. FP8 is emulated on a CPU: a run takes
longer than in float32. Then the table between the marks in docs/precision.md is written anew, and
docs/precision_EXPERIMENT.svg with each recipe's loss less float32's. `steps=N` trains less, to see that all of it runs.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.options import given

from megalite.config import schema

RECIPES: dict[str, tuple[str, ...]] = {
    "fp32": ("precision=fp32",),
    "bf16": ("precision=bf16",),
    "bf16_pure": ("precision=bf16_pure",),
    "fp16": ("precision=fp16",),
    "delayed": ("precision=bf16", "precision.fp8=delayed"),
    "tensorwise": ("precision=bf16", "precision.fp8=tensorwise"),
    "rowwise": ("precision=bf16", "precision.fp8=rowwise"),
    "blockwise": ("precision=bf16", "precision.fp8=blockwise"),
    "mxfp8": ("precision=bf16", "precision.fp8=mxfp8"),
}
EXPERIMENTS = ("quickstart", "moe_quickstart")
DOCS = Path(__file__).parents[1] / "docs"
MARKS = "<!-- quickstarts -->", "<!-- end of quickstarts -->"
WINDOW = 25
"""Steps over which a curve is a mean: single batches differ more than precisions do."""


@dataclass(kw_only=True)
class Options:
    experiments: list[str] = schema.key(list(EXPERIMENTS), "Which quickstarts.", choices=EXPERIMENTS)
    recipes: list[str] = schema.key(
        list(RECIPES), "Which precisions; fp32 is what they are held against.", choices=tuple(RECIPES)
    )
    out: str = schema.key("runs/precision", "Folder of the runs.")
    nproc: int = schema.key(2, "Processes of a run.", minimum=1)
    steps: int = schema.key(0, "Steps instead of the experiment's own; 0: those.", minimum=0)


def train(experiment: str, recipe: str, options: Options) -> Path:
    """The folder of a finished run."""
    folder = Path(options.out) / f"{experiment}_{recipe}"
    words = [
        f"experiment={experiment}",
        *RECIPES[recipe],
        f"run.dir={folder}",
        "log.baselines=false",
        "log.sample=null",
    ]
    words += [f"train.steps={options.steps}", "optim.warmup_steps=0"] if options.steps else []
    command = [sys.executable, "-m", "megalite", "train", "--nproc-per-node", str(options.nproc), *words]
    print(f"== {folder}", flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"{' '.join(command)}: failed")
    return folder


def losses(folder: Path) -> tuple[list[float], float]:
    """Training loss by step, and the whole validation set's at the end, in nats a token."""
    by_step: dict[int, Any] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        by_step[entry["step"]] = entry
    steps = [by_step[step] for step in sorted(by_step)]
    return [entry["loss"] for entry in steps], steps[-1]["val_loss"]


def curve(values: list[float]) -> list[float]:
    return [statistics.fmean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]


def picture(experiment: str, found: dict[str, tuple[list[float], float]]) -> Path:
    """How far each recipe's loss is from float32's, in percent, by step."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "megalite"  # the same picture gives the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    exact = curve(found["fp32"][0])
    for recipe, (values, _) in found.items():
        if recipe != "fp32":
            axes.plot([100 * (a / b - 1) for a, b in zip(curve(values), exact, strict=True)], label=recipe, linewidth=1)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel=f"% above fp32 (mean of {WINDOW} steps)", title=f"{experiment}: training loss")
    axes.legend(ncols=2, fontsize=8)
    path = DOCS / f"precision_{experiment}.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def table(experiment: str, found: dict[str, tuple[list[float], float]]) -> list[str]:
    exact = found["fp32"][1]
    rows = [f"| {experiment}, {len(found['fp32'][0])} steps | validation loss | beside fp32 |", "| --- | --: | --: |"]
    rows += [f"| {recipe} | {value:.4f} | {value / exact - 1:+.2%} |" for recipe, (_, value) in found.items()]
    return [*rows, ""]


def main() -> None:
    options = given(Options, __doc__)
    recipes = ["fp32", *(recipe for recipe in options.recipes if recipe != "fp32")]
    which = f"experiments={','.join(options.experiments)} recipes={','.join(recipes)}"
    which += f" nproc={options.nproc}" if options.nproc != Options.nproc else ""
    lines = [MARKS[0], "", f"    python benchmarks/precision.py {which}", ""]
    for experiment in options.experiments:
        found = {recipe: losses(train(experiment, recipe, options)) for recipe in recipes}
        lines += [*table(experiment, found), f"![{experiment}]({picture(experiment, found).name})", ""]
    print("\n".join(lines))
    page = DOCS / "precision.md"
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    if options.steps == 0 and rest:
        page.write_text(before + "\n".join([*lines, MARKS[1]]) + after)


if __name__ == "__main__":
    main()
