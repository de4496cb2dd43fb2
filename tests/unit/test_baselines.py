"""The n-gram baseline against a slow dictionary implementation written from the formulas, and as a distribution."""

import gzip
import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from megalite.report.baselines import gzip_bits_per_byte, kneser_ney_bits_per_byte, write_baselines
from megalite.report.ngram import DEFAULT_DISCOUNT, MINIMUM_DISCOUNT, KneserNey

TEXT = (b"def read(path):\n    return open(path).read()\n" * 3 + bytes(range(256)) + b"abcabcabdabeabc") * 2


class SlowKneserNey:
    """Chen & Goodman's interpolated modified Kneser-Ney with dictionaries, one probability at a time."""

    def __init__(self, text: bytes, order: int) -> None:
        self.counts: dict[int, Counter[bytes]] = {
            order: Counter(text[i : i + order] for i in range(len(text) - order + 1))
        }
        for n in range(order - 1, 0, -1):
            left: dict[bytes, set[int]] = defaultdict(set)
            for gram in self.counts[n + 1]:
                left[gram[1:]].add(gram[0])
            self.counts[n] = Counter({gram: len(before) for gram, before in left.items()})
        self.discounts = {n: self._discounts(counts) for n, counts in self.counts.items()}

    @staticmethod
    def _discounts(counts: Counter[bytes]) -> list[float]:
        of = Counter(counts.values())
        result = [0.0]
        for k in (1, 2, 3):
            if of[1] and of[2] and of[k] and of[k + 1]:
                d = k - (k + 1) * of[1] / (of[1] + 2 * of[2]) * of[k + 1] / of[k]
            else:
                d = DEFAULT_DISCOUNT
            result.append(min(max(d, MINIMUM_DISCOUNT), k))
        return result

    def probability(self, context: bytes, byte: int, n: int) -> float:
        if n == 0:
            return 1 / 256
        history = context[len(context) - n + 1 :]
        lower = self.probability(context, byte, n - 1)
        following = {gram: c for gram, c in self.counts[n].items() if gram[:-1] == history}
        if not following:
            return lower
        total, discounts = sum(following.values()), self.discounts[n]
        count = following.get(history + bytes([byte]), 0)
        left = sum(discounts[min(c, 3)] for c in following.values()) / total
        return max(count - discounts[min(count, 3)], 0) / total + left * lower

    def bits(self, text: bytes, order: int) -> float:
        each = [self.probability(text[:i], text[i], min(order, i + 1)) for i in range(len(text))]
        return -sum(math.log2(p) for p in each) / len(text)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_slow_implementation(order: int) -> None:
    valid = b"def write(path):\n    abcabd\x00\xff"
    fast, slow = KneserNey(TEXT, order), SlowKneserNey(TEXT, order)
    assert fast.bits_per_byte(valid) == pytest.approx(slow.bits(valid, order), rel=1e-12)
    for context in (b"", b"d", b"de", b"retu", b"\xff\xff\xff\xff", b"xxabcab"):
        expected = [slow.probability(context, byte, min(order, len(context) + 1)) for byte in range(256)]
        np.testing.assert_allclose(fast.probabilities(context), expected, rtol=1e-12)


def test_sums_to_one_after_any_context() -> None:
    draw = random.Random(0)
    for text in (TEXT, b"aaaaaaaaaa", bytes(draw.randbytes(3000)), b"abcde"):
        model = KneserNey(text, 5)
        for _ in range(40):
            context = draw.randbytes(draw.randrange(7)) if draw.random() < 0.5 else text[: draw.randrange(len(text))]
            mass = model.probabilities(context)
            assert mass.min() > 0
            assert mass.sum() == pytest.approx(1, abs=1e-12)


def test_matches_its_own_distributions() -> None:
    model, valid = KneserNey(TEXT, 4), b"return path\n"
    bits = [-math.log2(model.probabilities(valid[:i])[valid[i]]) for i in range(len(valid))]
    assert model.bits_per_byte(valid) == pytest.approx(sum(bits) / len(bits), rel=1e-12)


def test_longer_contexts_help_on_real_text() -> None:
    text = Path(json.__file__).with_name("decoder.py").read_bytes()
    train, valid = text[:-2000], text[-2000:]
    bits = [kneser_ney_bits_per_byte(train, valid, order) for order in (1, 3, 5)]
    assert bits[0] > bits[1] > bits[2] > 1


def test_bad_orders_and_empty_text() -> None:
    for order in (0, 9):
        with pytest.raises(ValueError, match="order"):
            KneserNey(TEXT, order)
    with pytest.raises(ValueError, match="order"):
        KneserNey(b"ab", 5)
    with pytest.raises(ValueError, match="bytes"):
        KneserNey(TEXT, 2).bits_per_byte(b"")
    with pytest.raises(ValueError, match="bytes"):
        gzip_bits_per_byte(b"")


def test_gzip_and_the_file(tmp_path: Path) -> None:
    assert gzip_bits_per_byte(TEXT) == len(gzip.compress(TEXT, 9)) * 8 / len(TEXT)
    measured = write_baselines(tmp_path, TEXT, TEXT[:200], validation="text", validation_tokens=150)
    assert json.loads((tmp_path / "baselines.json").read_text()) == measured
    assert (measured["validation"], measured["validation_tokens"], measured["validation_bytes"]) == ("text", 150, 200)
    assert measured["train_bytes"] == measured["train_bytes_whole"] == len(TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["baselines.json"]


def test_a_long_text_is_cut_and_the_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.report.baselines.TRAIN_LIMIT", 300)
    measured = write_baselines(tmp_path, TEXT, TEXT[:200], validation="text", validation_tokens=150)
    assert (measured["train_bytes"], measured["train_bytes_whole"]) == (300, len(TEXT))
    assert measured["kneser_ney"] == kneser_ney_bits_per_byte(TEXT[:300], TEXT[:200])
