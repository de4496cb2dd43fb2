"""Sampling: filters against plain definitions, greedy against argmax of whole forward passes, seeds, long contexts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config.schema import ModelConfig
from megalite.model.transformer import Transformer
from megalite.parallel.parameter import materialize
from megalite.train.sampling import choose, generate, keep_likely, stream

VOCAB, POSITIONS = 61, 24


def make_model(**changes: object) -> Transformer:
    values = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "init_std": 0.3}
    with torch.device("meta"):
        model = Transformer(ModelConfig(**{**values, **changes}), VOCAB, POSITIONS)  # type: ignore[arg-type]
    materialize(model, torch.device("cpu"), seed=7, dtype=torch.float64)
    return model


def probabilities(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(value - largest) for value in logits]
    return [weight / sum(weights) for weight in weights]


numbers = st.lists(st.floats(-20, 20), min_size=1, max_size=40)


@settings(deadline=None, max_examples=200)
@given(numbers, st.integers(0, 45), st.floats(0.01, 1.0))
def test_filters_follow_their_definitions(values: list[float], top_k: int, top_p: float) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    kept = torch.isfinite(keep_likely(logits, top_k, top_p))
    chosen, left_out = logits[kept], logits[~kept]
    assert 1 <= len(chosen) <= (top_k or len(values))
    assert torch.equal(keep_likely(logits, top_k, top_p)[kept], chosen)
    if len(left_out):
        assert chosen.min() >= left_out.max()
    candidates = sorted(values, reverse=True)[: top_k or None]
    mass = probabilities(candidates)
    if top_p == 1:
        assert len(chosen) == len(candidates)
        return
    # the fewest whose sum reaches top_p: without the last of them it is not reached
    assert sum(mass[: len(chosen)]) >= top_p - 1e-9
    assert sum(mass[: len(chosen) - 1]) <= top_p + 1e-9


def test_everything_stays_by_default() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_likely(logits, 0, 1.0), logits)


def test_ties_are_settled_by_id() -> None:
    assert torch.isfinite(keep_likely(torch.zeros(6), 2, 1.0)).tolist() == [True, True, False, False, False, False]


def test_draws_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    generator = torch.Generator().manual_seed(3)
    draws = torch.tensor([choose(logits, 0.5, 3, 1.0, generator) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=5) / 4000
    expected = torch.softmax(torch.tensor([2.0, 1.0, -math.inf, -math.inf, 3.0]) / 0.5, 0)
    assert (shares - expected).abs().max() < 0.03


@pytest.mark.parametrize("changes", [{}, {"position": "learned"}, {"window": 5}, {"tied_embeddings": True}])
def test_greedy_is_argmax_of_whole_passes(changes: dict[str, object]) -> None:
    model, tokens = make_model(**changes), [3, 1, 4, 1, 5]
    expected = list(tokens)
    with torch.no_grad():
        for _ in range(12):
            expected.append(int(model.logits(model(torch.tensor([expected])))[0, -1].argmax()))
    assert generate(model, tokens, 12, temperature=0) == expected[len(tokens) :]
    assert generate(model, tokens, 12, temperature=1.0, top_k=1) == expected[len(tokens) :]


def test_the_seed_decides() -> None:
    model = make_model()
    first = generate(model, [1], 15, temperature=1.0, top_k=0, top_p=1.0, seed=1)
    torch.rand(5)  # the global random state plays no part
    assert generate(model, [1], 15, temperature=1.0, top_k=0, top_p=1.0, seed=1) == first
    assert generate(model, [1], 15, temperature=1.0, top_k=0, top_p=1.0, seed=2) != first


def test_global_random_state_is_left_alone() -> None:
    model, state = make_model(), torch.get_rng_state()
    generate(model, [1], 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_and_vocabulary() -> None:
    model = make_model()
    tokens = generate(model, [1], 20, temperature=1.0, top_k=0, top_p=1.0, seed=1)
    stop = tokens[5]
    assert (
        generate(model, [1], 20, temperature=1.0, top_k=0, top_p=1.0, seed=1, stop=stop) == tokens[: tokens.index(stop)]
    )
    few = generate(model, [1], 20, temperature=2.0, top_k=0, top_p=1.0, seed=1, vocab=4)
    assert len(few) == 20
    assert max(few) < 4


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_longer_than_the_model(position: str) -> None:
    model = make_model(position=position)
    assert len(generate(model, [1, 2], 3 * POSITIONS, temperature=0)) == 3 * POSITIONS
    prompt = list(range(POSITIONS + 10))
    assert len(generate(model, prompt, 4, temperature=0)) == 4
    assert generate(model, prompt, 1, temperature=0) == generate(model, prompt[-POSITIONS:], 1, temperature=0)


def test_training_mode_is_restored() -> None:
    model = make_model()
    model.train()
    tokens = stream(model, [1], 5)
    next(tokens)
    tokens.close()
    assert model.training


def test_bad_requests() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, [], 3)
    for options in ({"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"temperature": -0.1}):
        with pytest.raises(ValueError, match="top_p"):
            generate(model, [1], 3, **options)
