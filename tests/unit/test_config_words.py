"""Words of the command line: what is accepted, what is refused, and the help that a refusal gives."""

import pytest

from megalite.config.load import load_config
from megalite.config.words import expand, quoted
from megalite.errors import UserError


def refusal(*words: str, **where: object) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load_config(*words, **where)  # type: ignore[arg-type]
    assert all("\n" not in line for line in caught.value.lines)
    return caught.value.lines


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("model.hiden=8", "model.hidden"),
        ("hidden=8", "model.hidden"),
        ("+hidden=8", "model.hidden"),
        ("++train.step=8", "train.steps"),
        ("~train.step", "train.steps"),
        ("lr=1", "optim.lr"),
        ("+model.rope.thta=1", "model.rope.theta"),
        ("train.globalbatch=8", "train.global_batch"),
        ("optimizer.lr=1", "optim.lr"),
        ("hydra.run.dir=x", "run.dir"),
        ("train.micro_batch_size=1", "train.micro_batch"),
    ],
)
def test_unknown_key_names_the_nearest_three(word: str, nearest: str) -> None:
    (line,) = refusal(word)
    assert "unknown key; nearest: " in line
    near = line.split("nearest: ")[1].split(", ")
    assert len(near) == 3
    assert nearest in near


def test_every_mistake_is_told_at_once() -> None:
    lines = refusal("model.hiden=8", "train.steps=1", "train.steps=2", "optim=adm", "foo")
    assert len(lines) == 4
    lines = refusal("train.steps=x", "optim.lr=fast", "train.compile=maybe", "model.layers=1.5")
    assert lines == (
        "train.steps=x: expects a whole number",
        "train.compile=maybe: expects true or false",
        "model.layers=1.5: expects a whole number",
        "optim.lr=fast: expects a number",
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("train.steps=1", "+train.steps=1"), "train.steps: given twice"),
        (("optim=sgd", "optim=muon"), "optim: given twice"),
        (("optim=adm",), "nearest: adamw"),
        (("experiment=quickstrt",), "nearest: quickstart"),
        (("model=llama_8b",), "llama3_8b"),
        (("optim=adamw,sgd",), "--multirun"),
        (("optim.lr=1,2",), "--multirun"),
        (("model={hidden: 8}",), "no such choice"),
        (("train=5",), "holds keys of its own"),
        (("train",), "holds keys of its own"),
        (("train.steps",), "expects train.steps=VALUE"),
        (("optim",), "expects optim=CHOICE; choices: adamw, muon, sgd"),
        (("~optim",), "expects optim=CHOICE"),
        (("~train.steps",), "cannot be removed; set train.steps=1000"),
        (("train.steps='1",), "cannot be read"),
        (("model.layers=[1",), "cannot be read"),
        (("foo",), "expects key=value"),
        (("=5",), "unknown key"),
        (("train.steps=null",), "expects a whole number"),
        (("train.steps=",), "expects a whole number"),
        (("train.steps=true",), "expects a whole number"),
        (("data.blend=5",), "expects a mapping {name: a number}"),
        (("data.blend={a: x}",), "expects a mapping"),
        (("optim.lr=nan",), "expects a number"),
        (("optim.lr=inf",), "not a finite number"),
        (("train.steps=${nope}",), "configuration: "),
    ],
)
def test_refusals(words: tuple[str, ...], part: str) -> None:
    assert any(part in line for line in refusal(*words))


def test_text_is_taken_as_it_stands() -> None:
    config = load_config('log.sample=def f(x): """a, \\', "data.split=0.9,0.1", "run.name=1e3")
    assert config.log.sample == 'def f(x): """a, \\'
    assert config.data.split == "0.9,0.1"
    assert config.run.name == "1e3"
    config = load_config("log.sample='quoted, text'", "run.dir=null", "data.path=${data.tokenizer}")
    assert (config.log.sample, config.run.dir, config.data.path) == ("quoted, text", None, "bpe")


@pytest.mark.parametrize("text", ["", "plain", '"', "\\", '\\"', "a\\\\", "é ¶ 漢", "a: {b, c}", "'", "#x", "$", " x "])
def test_quoting_is_exact(text: str) -> None:
    assert load_config(f"log.sample={quoted(text)}").log.sample == text


def test_numbers_convert_as_a_person_means_them() -> None:
    config = load_config("train.steps=1e3", "optim.lr=1", "train.compile=yes", "model.window=null")
    assert (config.train.steps, config.optim.lr, config.train.compile, config.model.window) == (1000, 1.0, True, None)
    assert isinstance(config.train.steps, int)
    assert isinstance(config.optim.lr, float)


def test_signs_before_known_words_change_nothing() -> None:
    assert load_config("+train.seed=5", "++optim.lr=1", "+experiment=quickstart") == load_config(
        "train.seed=5", "optim.lr=1", "experiment=quickstart"
    )


def test_entries_of_mappings() -> None:
    config = load_config("data.blend={/a/b: 0.5}", "+data.blend.c=2")
    assert config.data.blend == {"/a/b": 0.5, "c": 2.0}
    assert load_config("data.validation={wiki: /d/wiki}").data.validation == {"wiki": "/d/wiki"}


def test_a_typed_word_wins_over_experiment_and_group() -> None:
    config = load_config("experiment=llama3_8b", "model=tiny", "optim=sgd", "optim.lr=7")
    assert (config.model.name, config.optim.name, config.optim.lr) == ("tiny", "sgd", 7.0)
    assert config.train.global_batch == 512


def test_multirun_expands_every_combination() -> None:
    jobs = expand(["optim.lr=1e-3,2e-3", "train.seed=1", "optim=adamw,sgd", "train.steps=range(1,3)"])
    assert len(jobs) == 8
    assert jobs[0] == ["optim.lr=0.001", "train.seed=1", "optim=adamw", "train.steps=1"]
    assert len(expand(["optim=glob(*)"])) == 3
