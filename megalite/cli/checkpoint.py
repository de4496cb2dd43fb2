"""`megalite checkpoint ACTION`: models between this engine's folders and Hugging Face's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megalite.config.options import HelpRequested, parse_options, required
from megalite.config.schema import key
from megalite.config.tree import nearest
from megalite.errors import UserError

if TYPE_CHECKING:
    from megalite.checkpoint.stored_model import StoredModel


@dataclass(kw_only=True)
class ImportOptions:
    source: str = required("Hugging Face folder: config.json and safetensors.")
    output: str = required("Model folder to create.")
    shard_gb: float = key(5.0, "Largest file to write, in GB; a bigger model is split.", minimum=1e-6)


@dataclass(kw_only=True)
class ExportOptions:
    checkpoint: str = required("Model folder, or training checkpoint.")
    output: str = required("Hugging Face folder to create.")
    shard_gb: float = key(5.0, "Largest file to write, in GB; a bigger model is split.", minimum=1e-6)


@dataclass(kw_only=True)
class UpcycleOptions:
    source: str = required("Dense model: a model folder, Hugging Face folder, run or checkpoint.")
    output: str = required("Model folder to create.")
    experts: int = key(8, "Copies of each MLP.", minimum=1)
    top_k: int = key(2, "Copies that a token meets.", minimum=1)
    granularity: int = key(1, "Parts that each copy is cut into, experts of their own.", minimum=1)
    seed: int = key(0, "Fixes the new router.", minimum=0)
    shard_gb: float = key(5.0, "Largest file to write, in GB; a bigger model is split.", minimum=1e-6)


@dataclass(kw_only=True)
class InspectOptions:
    checkpoint: str = required("Training checkpoint, run folder (its newest), or model folder.")


@dataclass(kw_only=True)
class CheckpointOptions:
    checkpoint: str = required("Training checkpoint, or a run folder (its newest).")


def inspect(arguments: Sequence[str]) -> int:
    options = parse_options(InspectOptions, arguments, "Usage: megalite checkpoint inspect FOLDER", ("checkpoint",))
    from megalite.checkpoint.model_folder import describe_model, is_model
    from megalite.checkpoint.training import describe

    path = Path(options.checkpoint)
    print(describe_model(path) if is_model(path) else describe(path))
    return 0


def verify(arguments: Sequence[str]) -> int:
    options = parse_options(CheckpointOptions, arguments, "Usage: megalite checkpoint verify FOLDER", ("checkpoint",))
    from megalite.checkpoint.store import verify as verify_digests
    from megalite.checkpoint.training import find_checkpoint

    checkpoint = find_checkpoint(Path(options.checkpoint))
    verify_digests(checkpoint)
    print(f"{checkpoint}: every file has the size and SHA-256 of its manifest")
    return 0


def import_model(arguments: Sequence[str]) -> int:
    usage = "Usage: megalite checkpoint import source=FOLDER output=FOLDER"
    options = parse_options(ImportOptions, arguments, usage)
    from megalite.checkpoint.huggingface.folder import open_huggingface
    from megalite.checkpoint.model_folder import save_model

    model = open_huggingface(Path(options.source))
    save_model(model, Path(options.output), int(options.shard_gb * 1e9))
    return _say(model, options.output)


def export_model(arguments: Sequence[str]) -> int:
    usage = "Usage: megalite checkpoint export checkpoint=FOLDER output=FOLDER"
    options = parse_options(ExportOptions, arguments, usage)
    from megalite.checkpoint.huggingface.folder import export_huggingface
    from megalite.checkpoint.model_folder import open_model

    model = open_model(options.checkpoint)
    export_huggingface(model, Path(options.output), int(options.shard_gb * 1e9))
    return _say(model, options.output)


def upcycle(arguments: Sequence[str]) -> int:
    usage = "Usage: megalite checkpoint upcycle FROM TO [experts=8 top_k=2 granularity=1]"
    options = parse_options(UpcycleOptions, arguments, usage, ("source", "output"))
    from megalite.checkpoint.model_folder import open_model, save_model
    from megalite.checkpoint.upcycle import upcycled

    dense = open_model(options.source)
    model = upcycled(dense, options.experts, options.top_k, options.granularity, options.seed)
    save_model(model, Path(options.output), int(options.shard_gb * 1e9))
    return _say(model, options.output)


def _say(model: "StoredModel", output: str) -> int:
    print("; ".join([f"{output}: written ({model.config.family})", *model.notes]))
    return 0


ACTIONS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "inspect": (inspect, "what a training checkpoint holds"),
    "verify": (verify, "check every file against the manifest's digests"),
    "import": (import_model, "a Hugging Face folder into a model folder"),
    "upcycle": (upcycle, "a dense model into one with experts that computes the same"),
    "export": (export_model, "a model or checkpoint into a Hugging Face folder"),
}


def run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {action:<8} {help}" for action, (_, help) in ACTIONS.items()]
        raise HelpRequested("\n".join(["Usage: megalite checkpoint ACTION [key=value ...]", "", *lines]))
    action, rest = arguments[0], arguments[1:]
    if action not in ACTIONS:
        raise UserError(f"{action}: unknown action; nearest: {', '.join(nearest(action, ACTIONS))}")
    return ACTIONS[action][0](rest)
