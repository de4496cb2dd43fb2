"""What a checkpoint holds beyond weights and moments, and how a run takes it up again: bit for bit where it stopped."""

import dataclasses
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megalite.checkpoint.model_folder import is_model
from megalite.checkpoint.store import complete_steps, read_trainer
from megalite.config.load import as_values
from megalite.config.schema import Config
from megalite.config.tree import leaves, value_at
from megalite.errors import UserError
from megalite.parallel.boxes import Held

if TYPE_CHECKING:
    from megalite.train.trainer import Trainer

PROBES = 8
"""Samples, spread over those already trained on, whose digests a checkpoint keeps: a changed order is noticed."""
MAY_CHANGE = ("run.", "log.", "checkpoint.", "parallel.", "train.threads", "train.dry_run", "train.profile_step")
"""Keys that change nothing of what is computed, so nothing is said of them."""
WITH_STATE = {
    "precision.fp8": ("delayed",),
    "precision.name": ("bf16_pure",),
    "precision.states": ("bf16", "fp8", "int8"),
}
"""Values of keys that leave something in a checkpoint which other values could not go on from."""
LABELS = ("model.name", "model.family")
OF_TRAINING = tuple(
    f"model.moe.{name}"
    for name in ("aux_loss", "z_loss", "jitter", "capacity", "drop", "pad", "force_balance", "bias_rate")
)
"""Keys of the model that its weights don't depend on; bias_rate as long as there is a bias. Told, not refused."""


@dataclasses.dataclass(frozen=True)
class Resumed:
    """`path`: the checkpoint loaded. `branch`: the checkpoint.resume path this course began at, if it began at one."""

    path: str
    branch: str | None
    changed: list[str]
    set_aside: list[str]

    def record(self) -> dict[str, Any]:
        """The event's content, without what is empty."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


def training_state(trainer: "Trainer") -> tuple[dict[str, Held], dict[str, Any]]:
    """Tensors (weights, moments, every rank's random state) and counters of this instant."""
    tensors = trainer.optimizer.state_tensors()
    tensors[f"rng.{trainer.mesh.rank}"] = Held.whole(torch.get_rng_state())
    samples = (trainer.step + trainer.spikes.skipped) * trainer.config.train.global_batch
    counters = {
        "step": trainer.step,
        "samples": samples,
        "order": order_digest(trainer, samples),
        "branch": trainer.resumed.branch if trainer.resumed else None,
        "seed": trainer.config.train.seed,
        "skipped_in_a_row": trainer.skipped_in_a_row,
        "loss_scale": trainer.loss_scale.state() if trainer.precision.scaled else None,
        "spikes": trainer.spikes.state() if trainer.spikes.kept else None,
        "back_to": _back_to(trainer),
        "moments": trainer.precision.moments,
        "layout": trainer.mesh.sizes,
        "vocab": trainer.vocab,
        "max_positions": trainer.stages[0].max_positions,
        "config": as_values(trainer.config),
    }
    return tensors, counters


def order_digest(trainer: "Trainer", samples: int) -> str:
    """Digest of a few of the first `samples` samples: equal while the same text comes in the same order."""
    chosen = sorted({index * (samples - 1) // max(1, PROBES - 1) for index in range(PROBES)}) if samples else []
    digest = 0
    for number in chosen:
        batch = trainer.data.train.batch([number])
        digest = zlib.crc32(batch.targets.numpy().tobytes(), zlib.crc32(batch.tokens.numpy().tobytes(), digest))
    return f"{digest:08x}"


def resume(trainer: "Trainer") -> Resumed | None:
    """Load the checkpoint that checkpoint.resume names into `trainer`; None for a fresh start."""
    chosen = trainer.comm.on_rank_zero(lambda: choose_checkpoint(trainer))
    if chosen is None:
        return None
    path, branch = Path(chosen["path"]), chosen["branch"]
    if chosen["weights"]:
        from megalite.train.start import start_from

        start_from(trainer, path)
        return Resumed(str(path), branch, [], trainer.store.set_aside_after(trainer.step))
    counters = trainer.store.verify(path)
    trainer.comm.on_rank_zero(lambda: check_continuity(trainer, path, counters, chosen["at_branch"]))
    load(trainer, path, counters)
    set_aside = trainer.store.set_aside_after(trainer.step) if chosen["at_branch"] else []
    return Resumed(str(path), branch, changes(trainer.config, counters["config"]), set_aside)


def load(trainer: "Trainer", path: Path, counters: dict[str, Any]) -> None:
    """Make `trainer` what it was when it saved the verified checkpoint at `path`. A collective."""
    from megalite.checkpoint.dcp import load_tensors, read_metadata  # a second of imports that a fresh start is spared

    tensors = trainer.optimizer.state_tensors()
    random_state = f"rng.{trainer.mesh.rank}"
    if random_state in read_metadata(path).state_dict_metadata:
        tensors[random_state] = Held.whole(torch.get_rng_state())
    load_tensors(path, tensors, trainer.comm)
    if random_state in tensors:
        torch.set_rng_state(tensors.pop(random_state).parts[0][1])
    trainer.optimizer.load_state_tensors(tensors)
    trainer.step, trainer.skipped_in_a_row = counters["step"], counters["skipped_in_a_row"]
    trainer.loss_scale.load(counters.get("loss_scale"))
    trainer.fp8.rescale(trainer.loss_scale.value / _scale_of(counters))
    trainer.spikes.load(counters.get("spikes"))
    trainer.saved = _saved(trainer, path, counters.get("back_to", {"step": trainer.step, "path": None}))


def _scale_of(counters: dict[str, Any]) -> float:
    """What the losses behind a checkpoint were multiplied by; older versions did not keep a scale that never moves."""
    scaled = at(counters["config"], "precision.name") == "fp16"
    usual = at(counters["config"], "precision.loss_scale") if scaled else 1.0
    return float((counters.get("loss_scale") or {"value": usual})["value"])


def _back_to(trainer: "Trainer") -> dict[str, Any] | None:
    """Where a rewind goes, for the counters; `path`: the checkpoint of another run that this one branched off from."""
    if trainer.saved is None:
        return None
    step, path = trainer.saved
    return {"step": step, "path": None if path.parent == trainer.store.folder else str(path.resolve())}


def _saved(trainer: "Trainer", path: Path, back_to: dict[str, Any] | int | None) -> tuple[int, Path] | None:
    """Where a rewind goes after `path` was loaded: not there where a stop left it, for an unbroken run would not go
    back there; but there if what the counters name is gone."""
    if back_to is None:
        return None
    if isinstance(back_to, int):  # of an older version
        back_to = {"step": back_to, "path": None}
    named = Path(back_to["path"]) if back_to["path"] else path.with_name(trainer.store.path(back_to["step"]).name)
    there = trainer.comm.on_rank_zero(named.is_dir)
    return (back_to["step"], named) if there else (trainer.step, path)


def rewind(trainer: "Trainer") -> None:
    """Back to the last checkpoint, and on from there with the data behind the step just done (PaLM, arXiv:2204.02311,
    section 5.1: restart before the spike, skip the data around it). A collective."""
    assert trainer.saved is not None
    spikes, at, (_, path) = trainer.spikes, trainer.step, trainer.saved
    rewinds, skipped, found = spikes.rewinds + 1, spikes.skipped, spikes.found
    load(trainer, path, trainer.store.verify(path))
    spikes.rewinds, spikes.skipped = rewinds, skipped + at - trainer.step
    if path.parent != trainer.store.folder:  # of the run that this one branched off from
        trainer.save()
    trainer.store.set_aside_after(trainer.step)  # a stop's checkpoint of the course that is left
    batches = f"batches {trainer.step + skipped + 1} to {at + skipped} of the data are skipped"
    message = f"from step {at} back to {trainer.step} ({rewinds} of {spikes.limit}); {batches}"
    trainer.event("rewind", at=at, rewinds=rewinds, skipped=spikes.skipped, why=found, message=message)


def choose_checkpoint(trainer: "Trainer") -> dict[str, Any] | None:
    """The checkpoint to resume from, or the model folder (`weights`) to start from; None for a fresh start. Run by rank
    0.

    A path is a place to branch off, once: when the run's newest checkpoint already descends from it, the job was only
    started again (by its launcher, or by hand with the same words) and goes on with that one.
    """
    wanted = trainer.config.checkpoint.resume
    own = complete_steps(trainer.store.folder)
    newest: dict[str, Any] | None = None
    if own:
        newest = {"path": str(own[-1]), "branch": read_trainer(own[-1])["branch"], "at_branch": False, "weights": False}
    if wanted in ("auto", "none"):
        return newest
    path = Path(wanted)
    branch = str(path.resolve())
    if newest is not None and newest["branch"] == branch:
        return newest
    if not path.is_dir():
        raise UserError(
            f"checkpoint.resume: no folder {path}; give auto, none or the path of a step_… folder or of a model"
        )
    return {"path": str(path), "branch": branch, "at_branch": True, "weights": is_model(path)}


def check_continuity(trainer: "Trainer", path: Path, counters: dict[str, Any], at_branch: bool) -> None:
    """UserError when going on from `path` with this configuration would not be the same training."""
    config, saved = trainer.config, counters["config"]
    for key in ("train.seed", "train.global_batch", "optim.name"):
        before, now = at(saved, key), value_at(config, key)
        if before != now:
            raise UserError(
                f"{key}: {now}, but {path} was trained with {before}; set {key}={before} or another run.name"
            )
    both = {key: (at(saved, key), value_at(config, key)) for key in WITH_STATE}
    if "moments" in counters:  # what auto stands for
        both["precision.states"] = counters["moments"], trainer.precision.moments
    for key, kinds in WITH_STATE.items():
        before, now = both[key]
        if before != now and (before in kinds or now in kinds):
            raise UserError(
                f"{key}: {now}, but {path} keeps the state of {before}; set {key}={before} or another run.name"
            )
    for key in ("precision.fp8_history", "precision.fp8_skip") if config.precision.fp8 == "delayed" else ():
        before, now = at(saved, key), value_at(config, key)
        if before != now:
            raise UserError(f"{key}: {now}, but {path} keeps the histories of {before}; set {key}={before}")
    for key in leaves(Config):
        before, now = at(saved, key), value_at(config, key)
        freely = key in LABELS or (key in OF_TRAINING and ("bias" not in key or None not in (before, now)))
        if key.startswith("model.") and not freely and before != now:
            raise UserError(f"{key}: {now}, but {path} is a model with {before}; choose another run.name")
    if counters["step"] > config.train.steps:
        raise UserError(f"train.steps: {config.train.steps}, but {path} already has {counters['step']} steps")
    position = counters["samples"] + (config.train.steps - counters["step"]) * config.train.global_batch
    if position > trainer.data.train.n_samples:
        raise UserError(
            f"train.spike_rewinds: {config.train.spike_rewinds} leaves too little data behind what {path} has skipped;"
            f" set {at(saved, 'train.spike_rewinds')}, and checkpoint.every={at(saved, 'checkpoint.every')}, as before"
        )
    if not at_branch and order_digest(trainer, counters["samples"]) != counters["order"]:
        raise UserError(
            f"data: {path} was trained on other samples, or in another order, than data.* and train.steps give now"
            " (a changed file or key, or steps that need one more epoch); restore them, or branch off with"
            f" checkpoint.resume={path}"
        )


def at(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key in nested plain values; its default where an older version did not have the key."""
    found: Any = values
    for name in key.split("."):
        if not isinstance(found, dict) or name not in found:
            return leaves(Config)[key].default
        found = found[name]
    return found


def changes(config: Config, saved: dict[str, Any]) -> list[str]:
    """`key: before -> now` for every key that bears on the computation and differs from the checkpoint's."""
    pairs = ((key, at(saved, key), value_at(config, key)) for key in leaves(Config) if not key.startswith(MAY_CHANGE))
    return [f"{key}: {before} -> {now}" for key, before, now in pairs if before != now]
