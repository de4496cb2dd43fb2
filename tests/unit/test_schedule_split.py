"""Layers to stages: against trying every split, and the lines a user sees."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.errors import UserError
from megalite.pipeline.split import split_layers


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.5, 4.0]), min_size=1, max_size=9),
    st.integers(1, 9),
    st.sampled_from([0.0, 1.0, 2.5]),
    st.sampled_from([0.0, 1.0, 3.0]),
)
def test_no_other_split_has_a_faster_slowest_stage(
    costs: list[float], stages: int, embedding: float, head: float
) -> None:
    layers, stages = len(costs), min(stages, len(costs))

    def work(split: list[range]) -> list[float]:
        found = [sum(costs[layer] for layer in layers) for layers in split]
        found[0] += embedding
        found[-1] += head
        return found

    ours = split_layers(layers, stages, costs=costs, embedding=embedding, head=head)
    assert list(itertools.chain(*ours)) == list(range(layers))
    assert len(ours) == stages
    assert all(ours)
    every = [
        work([range(a, b) for a, b in itertools.pairwise([0, *cuts, layers])])
        for cuts in itertools.combinations(range(1, layers), stages - 1)
    ]
    best = min((max(found), sum(cost**2 for cost in found)) for found in every)
    assert (max(work(ours)), sum(cost**2 for cost in work(ours))) == pytest.approx(best)


def test_even_splits_and_slots_for_embedding_and_head() -> None:
    assert split_layers(12, 4) == [range(3), range(3, 6), range(6, 9), range(9, 12)]
    assert [len(stage) for stage in split_layers(10, 4)] == [2, 2, 3, 3]
    assert [len(stage) for stage in split_layers(126, 16, embedding=1, head=1)] == [7, *[8] * 14, 7]  # Llama 3 405B


def test_a_large_model_is_split_in_a_moment() -> None:
    started = time.process_time()
    split_layers(128, 64, embedding=1.3, head=2.1)
    assert time.process_time() - started < 10


def test_a_list() -> None:
    assert split_layers(6, 3, counts=[1, 3, 2]) == [range(1), range(1, 4), range(4, 6)]
    assert [len(stage) for stage in split_layers(2, 4, counts=[0, 1, 1, 0])] == [0, 1, 1, 0]
    with pytest.raises(UserError) as caught:
        split_layers(6, 3, counts=[0, 0, 2, 1])
    assert caught.value.lines == (
        "parallel.layers: lists 4 stages; pp x parallel.chunks is 3; list 3",
        "parallel.layers: at least 1 a stage; 0 only in the first and the last",
        "parallel.layers: lists 3 layers; model.layers is 6; their sum must be that",
    )
    with pytest.raises(UserError, match=r"8 stages .* for model.layers 4; at most 4"):
        split_layers(4, 8)
    with pytest.raises(ValueError, match="2 costs for 4 layers"):
        split_layers(4, 2, costs=[1.0, 2.0])
