"""Hydra composition made strict: unknown and repeated keys and unknown choices are errors that name the nearest known ones.

Hydra sees only words that were found good. The result is plain values; types and rules are `build` and `validate`.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalite.config.build import unknown_key
from megalite.config.schema import Config
from megalite.config.tree import branches, leaves, nearest
from megalite.errors import UserError

PACKAGE = "megalite.configs"
GROUPS = ("model", "data", "optim", "precision", "recompute", "experiment")
"""Hydra groups in the order in which they are laid over each other."""
USER_ROOT = "user_configuration"
WORD = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=]*?)(?P<rest>=.*)?", re.DOTALL)


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
    if root != "train" or config_dir is not None and (config_dir / "train.yaml").exists():
        sources[USER_ROOT] = _user_root(config_dir, root)
        root = USER_ROOT
    if config_dir is not None:
        overrides.append(f"hydra.searchpath=[{_quoted('file://' + str(config_dir.resolve()))}]")
    try:
        with initialize_config_module(PACKAGE, version_base="1.3"):
            composed = hydra_compose(root, overrides=overrides)
            values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
            layers = _layers(root, overrides, sources, config_dir) if trace else []
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"configuration: {' '.join(str(error).split())}") from error
    if trace:
        layers.append(("command line", _nested(words)))
    return Composition({str(name): value for name, value in values.items()}, layers)  # type: ignore[union-attr]


def expand(words: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """The jobs of `--multirun`: every combination of the values that words list (`optim.lr=1e-3,3e-4 train.seed=1,2`)."""
    axes: list[list[str]] = []
    for word in words:
        override = _parse(word)
        value = override.value()
        if isinstance(value, Glob):
            names = value.filter(_choices(override.key_or_group, config_dir))
            axes.append([f"{override.key_or_group}={name}" for name in names])
        elif override.is_sweep_override():
            axes.append([f"{override.key_or_group}={text}" for text in override.sweep_string_iterator()])
        else:
            axes.append([word])
    return [list(job) for job in itertools.product(*axes)]


def checked(words: Sequence[str], config_dir: Path | None) -> list[str]:
    """The words as Hydra is to see them. Raises UserError with every mistake found in them."""
    problems: list[str] = []
    accepted: list[str] = []
    seen: set[str] = set()
    for word in words:
        try:
            key, hydra_word = _check(word, config_dir)
        except UserError as error:
            problems += error.lines
            continue
        if key in seen:
            problems.append(f"{key}: given twice; keep one")
        seen.add(key)
        accepted.append(hydra_word)
    if problems:
        raise UserError(*problems)
    return accepted


def _check(word: str, config_dir: Path | None) -> tuple[str, str]:
    """(key, word for Hydra). Signs are dropped: a known key needs none, and an unknown one is an error behind them too."""
    match = WORD.fullmatch(word)
    assert match is not None
    sign, key, rest = match["sign"] or "", match["key"].partition("@")[0].strip(), match["rest"]
    known = leaves(Config)
    if key in GROUPS:
        if rest is None or sign == "~":
            raise UserError(f"{word}: expects {key}=CHOICE; choices are {', '.join(_choices(key, config_dir))}")
        _check_choice(key, rest[1:].strip("'\""), config_dir)
        return key, f"{key}{rest}"
    entry_of = next((path for path, leaf in known.items() if leaf.kind is dict and key.startswith(f"{path}.")), None)
    if key not in known and entry_of is None:
        if key in branches(Config):
            example = next(path for path in known if path.startswith(f"{key}."))
            raise UserError(f"{key}: holds keys of its own; set one of them, such as {example}=...")
        raise UserError(unknown_key(Config, key) if rest or sign or "." in key or not key else _not_a_word(word))
    if sign == "~":
        if entry_of is None:
            raise UserError(f"{word}: a key cannot be removed; set {key}={_shown(known[key].default)} for its default")
        return key, word
    if rest is None:
        raise UserError(f"{word}: expects {key}=VALUE")
    if entry_of is not None:
        return key, f"++{key}{rest}"
    text = rest[1:]
    if known[key].kind is str and _is_literal(text, known[key].optional):
        return key, f"{key}={_quoted(text)}"
    if _parse(f"{key}={text}").is_sweep_override():
        raise UserError(f"{key}={text}: several values make several jobs; add --multirun, or give one")
    return key, f"{'++' if known[key].kind is dict else ''}{key}={text}"


def _not_a_word(word: str) -> str:
    near = nearest(word.lstrip("-"), [*leaves(Config), *GROUPS])
    return f"{word}: expects key=value; nearest keys: {', '.join(near)}"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _is_literal(text: str, optional: bool) -> bool:
    """Text for a text key is taken as it stands, without Hydra's syntax, unless quoted, null or an interpolation."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return not quoted and "${" not in text and not (optional and text.lower() == "null")


def _quoted(text: str) -> str:
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text)
    return f'"{escaped}"'


def _parse(word: str) -> Override:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        key = word.partition("=")[0]
        what = str(error).splitlines()[0]
        raise UserError(f"{word}: cannot be read ({what}); quote the value twice for the shell: '{key}=\"...\"'") from None


def _choices(group: str, config_dir: Path | None) -> list[str]:
    """Names of the group's files: the engine's and those of the user's folder."""
    names = {entry.name for entry in (resources.files(PACKAGE) / group).iterdir()}
    if config_dir is not None and (config_dir / group).is_dir():
        names |= {entry.name for entry in (config_dir / group).iterdir()}
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _check_choice(group: str, choice: str, config_dir: Path | None) -> None:
    choices = _choices(group, config_dir)
    if choice == "null":
        return
    if choice not in choices:
        if "," in choice:
            raise UserError(f"{group}={choice}: several choices make several jobs; add --multirun, or give one")
        near = ", ".join(nearest(choice, choices))
        raise UserError(f"{group}={choice}: no such choice; nearest: {near}; all: {', '.join(choices)}")
    mine = None if config_dir is None else config_dir / group / f"{choice}.yaml"
    if mine is not None and mine.exists() and (resources.files(PACKAGE) / group / f"{choice}.yaml").is_file():
        raise UserError(f"{mine}: the engine has its own {group}={choice}; give yours another name")


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


def _nested(words: Sequence[str]) -> dict[str, Any]:
    """The keys that override words set, nested, with the word as the value."""
    tree: dict[str, Any] = {}
    for key in _keys(words):
        *outer, last = key.split(".")
        branch = tree
        for name in outer:
            branch = branch.setdefault(name, {})
        branch[last] = True
    return tree


def _keys(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        match = WORD.fullmatch(word)
        assert match is not None
        key = match["key"].partition("@")[0].strip()
        if key not in GROUPS:
            yield next((path for path, leaf in leaves(Config).items() if leaf.kind is dict and key.startswith(path)), key)
