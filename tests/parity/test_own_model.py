"""The model that docs/parallelism.md shows, run as it stands there: the same losses on 1, 2 and 4 processes."""

from pathlib import Path

import torch

from tests.ranks import run_ranks

DOCUMENT = Path(__file__).parents[2] / "docs" / "parallelism.md"


def program() -> str:
    return DOCUMENT.read_text().split("```python\n")[1].split("```")[0]


def train() -> list[float]:
    names: dict[str, object] = {"__name__": "shown"}
    exec(compile(program(), str(DOCUMENT), "exec"), names)
    return names["train"]()  # type: ignore[operator, no-any-return]


def test_the_shown_model_is_the_same_on_any_layout() -> None:
    alone = run_ranks(1, train)[0]
    assert alone[-1] < alone[0], "it does not learn"
    for world in (2, 4):
        for losses in run_ranks(world, train):
            torch.testing.assert_close(losses, alone, rtol=1e-11, atol=0)


def test_making_it_parallel_takes_less_than_sixty_lines() -> None:
    lines = [line for line in program().split("VOCAB, HIDDEN")[1].splitlines() if line.strip()]
    assert len(lines) < 60
