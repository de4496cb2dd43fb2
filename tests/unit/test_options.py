"""A verb's own options."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megalite.config.options import HelpRequested, parse_options, required
from megalite.config.schema import key
from megalite.errors import UserError


@dataclass(kw_only=True)
class Bake:
    output: Path = required("Where it goes.")
    kind: str = key("rye", "Sort of bread.", choices=("rye", "wheat"))
    loaves: int = key(1, "How many.", minimum=1)
    salt: float | None = key(None, "Grams; null: to taste.")
    inputs: list[str] = field(default_factory=list, metadata={"help": "Files.", "choices": (), "minimum": None})
    hot: bool = key(False, "Serve at once.")


def test_words_become_a_typed_record() -> None:
    words = ["output=a=b", "kind=wheat", "loaves=3", "salt=1e1", "inputs=x,y", "hot=true"]
    assert parse_options(Bake, words, "bake") == Bake(
        output=Path("a=b"), kind="wheat", loaves=3, salt=10.0, inputs=["x", "y"], hot=True
    )
    assert parse_options(Bake, ["there", "salt=null"], "bake", positional=["output"]) == Bake(output=Path("there"))


def test_all_mistakes_at_once() -> None:
    words = ["kind=oat", "loaves=0", "loafs=2", "salt=x", "hot=1.5", "plain", "kind=rye", "hot=true"]
    with pytest.raises(UserError) as caught:
        parse_options(Bake, words, "bake")
    assert caught.value.lines == (
        "kind=oat: not a choice; legal: rye, wheat",
        "loaves=0: at least 1",
        "loafs: unknown key; nearest: loaves, hot, salt",
        "salt=x: expects a number or null",
        "hot=1.5: expects true or false",
        "plain: expects key=value; keys are output, kind, loaves, salt, inputs, hot",
        "output: is needed (Where it goes.)",
    )
    with pytest.raises(UserError, match="kind: given twice"):
        parse_options(Bake, ["output=a", "kind=rye", "kind=rye"], "bake")


def test_help_lists_every_option() -> None:
    with pytest.raises(HelpRequested) as caught:
        parse_options(Bake, ["--help"], "Usage: bake")
    text = str(caught.value)
    assert text.startswith("Usage: bake")
    assert "kind    Sort of bread. [rye|wheat] (default rye)" in text
    assert "output  Where it goes. (needed)" in text
