"""The three indices and the blend against goldens from Megatron and against plain loops written from its rules."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.blend import build_blend, normalised, samples_wanted
from megalite.data.samples import build_sample_index, cached_sample_index, epochs_needed
from megalite.errors import UserError


def test_golden_indices():
    lengths = np.array([4, 3, 2, 9, 6], np.int32)
    epochs = epochs_needed(24, 4, 14)
    assert epochs == (3, True)
    index = build_sample_index(lengths, 0, 4, epochs, 1234)
    assert index.documents.tolist() == [2, 2, 4, 1, 0, 3, 4, 0, 1, 3, 0, 4, 3, 2, 1]
    rows = "(0,0)(2,0)(2,4)(3,2)(4,3)(5,3)(5,7)(6,2)(7,0)(8,0)(9,1)(9,5)(10,0)(11,0)(11,4)(12,2)(12,6)(13,1)"
    assert "".join(f"({a},{b})" for a, b in index.samples.tolist()) == rows
    assert index.shuffle.tolist() == [3, 9, 2, 1, 7, 5, 4, 0, 8, 6, 10, 16, 12, 15, 14, 11, 13]
    assert (index.documents.dtype, index.samples.dtype, index.shuffle.dtype) == (np.int32, np.int32, np.uint32)


def loops(lengths, first, length, n_samples, seed):
    """Megatron's construction, a token at a time."""
    total, copies = int(sum(lengths)), 1
    while copies * total < n_samples * length + 1:
        copies += 1
    before_last = ((copies - 1) * total - 1) // length
    separate = copies > 1 and n_samples - before_last < int(0.80 * ((total - 1) // length))
    random = np.random.RandomState(seed)
    documents = []
    for group in [copies - 1, 1] if separate else [copies]:
        part = np.array([first + i for _ in range(group) for i in range(len(lengths))], np.int32)
        random.shuffle(part)
        documents += part.tolist()
    rows, at, offset = [(0, 0)], 0, 0
    for _ in range((copies * total - 1) // length):
        remaining = length + 1
        while remaining:
            left = lengths[documents[at] - first] - offset
            remaining -= left
            if remaining <= 0:
                offset += remaining + left - 1
                remaining = 0
            else:
                at, offset = at + 1, 0
        rows.append((at, offset))
    shuffle = []
    for low, high in [(0, before_last), (before_last, len(rows) - 1)] if separate else [(0, len(rows) - 1)]:
        part = np.arange(low, high, dtype=np.uint32)
        random.shuffle(part)
        shuffle += part.tolist()
    return documents, rows, shuffle


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 0),
    st.integers(0, 9),
    st.integers(1, 33),
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
)
def test_indices_equal_plain_loops(lengths, first, length, n_samples, seed):
    epochs = epochs_needed(sum(lengths), length, n_samples)
    index = build_sample_index(np.array(lengths, np.int32), first, length, epochs, seed)
    documents, rows, shuffle = loops(lengths, first, length, n_samples, seed)
    assert index.documents.tolist() == documents
    assert [tuple(row) for row in index.samples.tolist()] == rows
    assert index.shuffle.tolist() == shuffle
    assert len(index) >= n_samples


@given(st.integers(1, 10**13), st.integers(1, 10**6), st.integers(1, 10**9))
def test_epochs_are_the_fewest(n_tokens, length, n_samples):
    count = epochs_needed(n_tokens, length, n_samples).copies
    assert count * n_tokens >= n_samples * length + 1
    assert count == 1 or (count - 1) * n_tokens < n_samples * length + 1


@pytest.mark.parametrize(
    ("weights", "golden"),
    [
        ([0.5, 0.25, 0.25], [0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2, 0]),
        ([0.7, 0.2, 0.1], [0, 1, 0, 2, 0, 0, 1, 0, 0, 0, 0, 1, 0, 2, 0, 0, 1, 0, 0, 0]),
    ],
)
def test_golden_blends(weights, golden):
    blend = build_blend(weights, len(golden))
    assert blend.source.tolist() == golden
    seen = [golden[:k].count(choice) for k, choice in enumerate(golden)]
    assert blend.sample.tolist() == seen
    assert (blend.source.dtype, blend.sample.dtype) == (np.int16, np.int64)


def greedy(weights, size):
    given_out, choices = [0] * len(weights), []
    for k in range(size):
        deficits = [weight * max(k, 1) - given_out[i] for i, weight in enumerate(weights)]
        choices.append(deficits.index(max(deficits)))
        given_out[choices[-1]] += 1
    return choices


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(1, 500))
def test_blend_equals_the_rule_and_never_runs_dry(weights, size):
    shares = normalised(weights)
    blend = build_blend(shares, size)
    assert blend.source.tolist() == greedy(shares, size)
    counts = np.bincount(blend.source, minlength=len(shares))
    assert all(count <= wanted for count, wanted in zip(counts, samples_wanted(size, shares), strict=True))


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0], [math.nan], [math.inf, 1.0]])
def test_bad_weights(weights):
    with pytest.raises(UserError, match=r"data\.blend"):
        normalised(weights)


def test_cache_is_reused_and_equal(tmp_path):
    lengths = np.arange(1, 200, dtype=np.int32)
    first = cached_sample_index(lengths, 5, 16, 3000, 7, tmp_path)
    again = cached_sample_index(lengths, 5, 16, 2999, 7, tmp_path)
    built = build_sample_index(lengths, 5, 16, epochs_needed(int(lengths.sum()), 16, 3000), 7)
    for name in ("documents", "samples", "shuffle"):
        assert np.array_equal(getattr(first, name), getattr(built, name))
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
