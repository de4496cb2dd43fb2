"""Composition, files of the user's own, the way back to YAML, and origins."""

from pathlib import Path

import pytest
import yaml

from megalite.config.build import build
from megalite.config.load import as_values, config_from_yaml, config_yaml, load_config
from megalite.config.origin import explained
from megalite.config.schema import Config
from megalite.config.words import GROUPS, choices
from megalite.errors import UserError

EXPERIMENTS = choices("experiment", None)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_a_good_configuration(experiment: str) -> None:
    config = load_config(f"experiment={experiment}")
    assert config.run.name == experiment
    assert config_from_yaml(config_yaml(config)) == config


CHOICES = [f"{group}={choice}" for group in GROUPS if group != "experiment" for choice in choices(group, None)]


@pytest.mark.parametrize("word", CHOICES)
def test_every_choice_is_a_good_configuration(word: str) -> None:
    group, _, choice = word.partition("=")
    config = load_config(word)
    if group == "optim":
        assert config.optim.name == choice
    if group == "precision":
        recipe = {"fp8_current": "tensorwise"}.get(choice, choice.removeprefix("fp8_"))
        assert recipe == (config.precision.fp8 if choice == "nvfp4" or "fp8" in choice else config.precision.name)
    if group == "recompute":
        assert config.recompute.mode == choice


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("experiment=quickstart",),
        ("model=qwen3_8b", "optim=muon", "optim.lr=1e-7", "data.blend={/a/b: 0.3, c: 1e-9}"),
        ("log.sample=say: \"hi\" # 'x'", "run.name=007", "data.split=0.9,0.1", "data.tokenizer=yes"),
        ("model=gemma2_2b", "run.dir=/tmp/ü x", "data.validation={w: '1'}"),
    ],
)
def test_printed_configuration_fed_back_is_the_same(words: tuple[str, ...], tmp_path: Path) -> None:
    config = load_config(*words)
    text, problems = explained(words, None, "train", None)
    assert problems == []
    assert config_from_yaml(text) == config
    for name, content in (("printed", text), ("saved", config_yaml(config))):
        (tmp_path / f"{name}.yaml").write_text(content)
        assert load_config(config_dir=tmp_path, config_name=name) == config
        again, _ = explained((), tmp_path, name, None)
        assert yaml.safe_load(again) == as_values(config)
    assert load_config("train.seed=5", config_dir=tmp_path, config_name="printed").train.seed == 5


def test_groups_can_be_chosen_over_a_saved_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_yaml(load_config("experiment=quickstart")))
    config = load_config("optim=sgd", "model=tiny", config_dir=tmp_path, config_name="config.yaml")
    assert (config.optim.name, config.model.name, config.run.name) == ("sgd", "tiny", "quickstart")


def test_files_and_groups_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {steps: 7}\n")
    (tmp_path / "based.yaml").write_text("defaults: [train, {override optim: sgd}, _self_]\ntrain: {steps: 8}\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "ours.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\ntrain: {seed: 3}\n"
    )
    assert load_config(config_dir=tmp_path, config_name="mine").train.steps == 7
    based = load_config("experiment=ours", config_dir=tmp_path, config_name="based")
    assert (based.optim.name, based.train.steps, based.train.seed, based.model.name) == ("sgd", 8, 3, "tiny")
    text, _ = explained(["experiment=ours"], tmp_path, "mine", None)
    origin = {line.split(":")[0].strip(): line.split("#")[1].strip() for line in text.splitlines() if "#" in line}
    assert origin["steps"] == str(tmp_path / "mine.yaml")
    assert origin["seed"] == str(tmp_path / "experiment" / "ours.yaml")
    assert origin["heads"] == "configs/model/tiny.yaml"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("train: {stepz: 7}", "train.stepz: unknown key; nearest: train.steps"),
        ("train: 7", "train=7: holds keys of its own"),
        ("trian: {steps: 7}", "trian: unknown key"),
        ("- 1", "holds no keys"),
        ("a: [", "cannot be read"),
        ("defaults: [train, {experiment: nope}]", "nope"),
    ],
)
def test_mistakes_in_a_users_file(content: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        load_config(config_dir=tmp_path, config_name="mine")
    assert part in str(caught.value)
    assert "\n" not in caught.value.lines[0]


def test_nothing_of_the_users_is_shadowed_in_silence(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("train: {steps: 7}")
    with pytest.raises(UserError, match="engine's own root"):
        load_config(config_dir=tmp_path)
    (tmp_path / "train.yaml").unlink()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "quickstart.yaml").write_text("# @package _global_\ntrain: {steps: 7}")
    with pytest.raises(UserError, match="give yours another name"):
        load_config("experiment=quickstart", config_dir=tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(UserError, match="no such file; --config-dir holds a"):
        load_config(config_dir=tmp_path, config_name="b")
    with pytest.raises(UserError, match="needs --config-dir"):
        load_config(config_name="b")


def test_origins_and_derived_values() -> None:
    text, problems = explained(["experiment=llama3_8b", "train.seed=9", "model.head_dim=null"], None, "train", 2)
    assert problems == []
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["seed"].endswith("# command line")
    assert lines["steps"].endswith("# configs/experiment/llama3_8b.yaml")
    assert lines["beta2"].endswith("# configs/optim/adamw.yaml")
    assert lines["order"].endswith("# schema default")
    assert lines["dp"].endswith("# schema default; derived: 2")
    assert "command line; derived: " in lines["head_dim"]
    assert "derived: runs/llama3_8b" in lines["dir"]


def test_violations_do_not_hide_the_configuration() -> None:
    text, problems = explained(["train.global_batch=7"], None, "train", None)
    assert "global_batch: 7" in text
    assert len(problems) == 1


def test_a_saved_configuration_is_checked_for_types() -> None:
    with pytest.raises(UserError, match=r"train\.steps=x: expects a whole number"):
        config_from_yaml("train: {steps: x}")
    with pytest.raises(UserError, match="not YAML"):
        config_from_yaml("a: [")
    assert config_from_yaml("") == Config() == build(Config, {})


def test_loading_twice_and_inside_another_hydra_application(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    (tmp_path / "other.yaml").write_text("a: 1")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert load_config("train.steps=3").train.steps == 3
        assert compose("other").a == 1
