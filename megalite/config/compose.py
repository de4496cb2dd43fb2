"""Composition by Hydra. It sees only words that were found good and gives plain values; types and rules come later."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalite.config.schema import Config
from megalite.config.words import GROUPS, PACKAGE, checked, keys_set, quoted
from megalite.errors import UserError

USER_ROOT = "user_configuration"


@dataclass(frozen=True)
class Composition:
    """`values`: nested plain values. `layers`: (where from, nested values) in the order laid over each other."""

    values: dict[str, Any]
    layers: list[tuple[str, dict[str, Any]]]


def compose(
    words: Sequence[str], config_dir: Path | None = None, config_name: str = "train", trace: bool = False
) -> Composition:
    """Composes the groups, the user's file and the override `words`. Raises UserError. `trace` fills `layers`."""
    overrides = checked(words, config_dir)
    ConfigStore.instance().store(name="schema", node=asdict(Config()))
    root = config_name.removesuffix(".yaml")
    sources: dict[str, dict[str, Any]] = {}
    if root != "train" or (config_dir is not None and (config_dir / "train.yaml").exists()):
        sources[USER_ROOT] = _user_root(config_dir, root)
        root = USER_ROOT
    if config_dir is not None:
        overrides.append(f"hydra.searchpath=[{quoted('file://' + str(config_dir.resolve()))}]")
    try:
        with _apart_from_the_users_hydra(), initialize_config_module(PACKAGE, version_base="1.3"):
            composed = hydra_compose(root, overrides=overrides)
            values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
            layers = _layers(root, overrides, sources, config_dir) if trace else []
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"configuration: {' '.join(str(error).split())}") from error
    if trace:
        layers.append(("command line", keys_set(words)))
    return Composition({str(name): value for name, value in values.items()}, layers)  # type: ignore[union-attr]


@contextmanager
def _apart_from_the_users_hydra() -> Iterator[None]:
    """A program that is itself a Hydra application may load a configuration of ours."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = outer


def _user_root(config_dir: Path | None, name: str) -> dict[str, Any]:
    """The user's file as a root: laid over the schema, with every group open to `group=choice` words above it."""
    if config_dir is None:
        raise UserError(f"--config-name {name}: needs --config-dir DIR, the folder that holds {name}.yaml")
    path = config_dir / f"{name}.yaml"
    if name == "train":
        raise UserError(f"{path}: train.yaml is the engine's own root; give yours another name and --config-name")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        found = sorted(entry.stem for entry in config_dir.glob("*.yaml")) if config_dir.is_dir() else []
        raise UserError(f"{path}: no such file; --config-dir holds {', '.join(found) or 'no .yaml file'}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no keys; expects YAML such as 'train: {{steps: 100}}'")
    defaults = content.pop("defaults", None)
    if defaults is None:
        defaults = ["schema", "_self_", *({group: None} for group in GROUPS)]
    elif not {"train", "schema"} & {entry for entry in defaults if isinstance(entry, str)}:
        named = {str(key).split("/")[-1].split()[-1] for entry in defaults if isinstance(entry, dict) for key in entry}
        defaults = ["schema", *({group: None} for group in GROUPS if group not in named), *defaults]
    ConfigStore.instance().store(name=USER_ROOT, node={"defaults": defaults, **content})
    return {"": str(path), **content}


def _layers(
    root: str, overrides: list[str], sources: dict[str, dict[str, Any]], config_dir: Path | None
) -> list[tuple[str, dict[str, Any]]]:
    """What each file of the defaults list sets, in Hydra's own order."""
    loader = GlobalHydra.instance().config_loader()
    found: list[tuple[str, dict[str, Any]]] = []
    for entry in loader.compute_defaults_list(root, overrides, RunMode.RUN).defaults:
        if entry.config_path is None or entry.config_path.startswith("hydra/") or entry.config_path == "schema":
            continue
        if entry.config_path in sources:
            content = dict(sources[entry.config_path])
            found.append((content.pop(""), content))
            continue
        label, text = _file_of(entry.config_path, config_dir)
        content = yaml.safe_load(text) or {}
        content.pop("defaults", None)
        for name in reversed(entry.package.split(".") if entry.package else []):
            content = {name: content}
        found.append((label, content))
    return found


def _file_of(config_path: str, config_dir: Path | None) -> tuple[str, str]:
    """(label, text) of a file of a group: the engine's, or else the user's."""
    shipped = resources.files(PACKAGE).joinpath(f"{config_path}.yaml")
    if shipped.is_file():
        return f"configs/{config_path}.yaml", shipped.read_text(encoding="utf-8")
    assert config_dir is not None
    mine = config_dir / f"{config_path}.yaml"
    return str(mine), mine.read_text(encoding="utf-8")
