"""Hostile .bin/.idx pairs: 10^4 mutated headers in this very process, each read back whole or refused in one line."""

import struct

import numpy as np
import pytest

from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import UserError

CASES = 10_000
EXTREMES = [0, 1, -1, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63), 3, 7]


@pytest.fixture
def pair(tmp_path):
    random = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "corpus", 1000) as writer:
        for _ in range(12):
            writer.add(random.integers(0, 1000, random.integers(0, 9)))
    return tmp_path / "corpus"


def mutated(index: bytes, random: np.random.Generator) -> bytes:
    content = bytearray(index)
    kind = random.integers(5)
    if kind == 0:  # flipped bytes
        for _ in range(random.integers(1, 4)):
            content[random.integers(len(content))] = random.integers(256)
    elif kind == 1:  # an extreme count, length, offset or bound
        width, code = (8, "<q") if random.integers(2) else (4, "<i")
        at, value = int(random.integers(9, len(content) - width)), EXTREMES[random.integers(len(EXTREMES))]
        content[at : at + width] = struct.pack("<q", value)[:width] if code == "<i" else struct.pack(code, value)
    elif kind == 2:  # cut off
        del content[random.integers(len(content)) :]
    elif kind == 3:  # something appended
        content += random.bytes(random.integers(1, 40))
    else:  # two 8-byte stretches exchanged
        a, b = sorted(random.integers(0, len(content) - 8, 2))
        content[a : a + 8], content[b : b + 8] = content[b : b + 8], content[a : a + 8]
    return bytes(content)


def assert_says(dataset: IndexedDataset, index: bytes, data: bytes) -> None:
    """`dataset` says in every field what these bytes say, parsed here one number at a time, and that adds up."""
    magic, version, code, n_sequences, n_bounds = struct.unpack_from("<9sQBQQ", index)
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    size = struct.calcsize(letter)
    lengths = struct.unpack_from(f"<{n_sequences}i", index, 34)
    offsets = struct.unpack_from(f"<{n_sequences}q", index, 34 + 4 * n_sequences)
    bounds = struct.unpack_from(f"<{n_bounds}q", index, 34 + 12 * n_sequences)
    modes = len(index) - 34 - 12 * n_sequences - 8 * n_bounds
    tokens = struct.unpack(f"<{len(data) // size}{letter}", data)

    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    assert modes in (0, n_sequences)
    assert (min(lengths, default=0) >= 0) and sum(lengths) * size == len(data)
    assert list(offsets) == [size * sum(lengths[:i]) for i in range(n_sequences)]
    assert (bounds[0], bounds[-1]) == (0, n_sequences) and list(bounds) == sorted(bounds)

    assert (dataset.dtype.kind == "u") == letter.isupper() and dataset.dtype.itemsize == size
    assert len(dataset) == n_sequences
    assert dataset.lengths.tolist() == list(lengths)
    assert dataset.documents.tolist() == list(bounds)
    assert dataset.tokens.tolist() == list(tokens)
    starts = [offset // size for offset in offsets]
    assert [dataset.start(i) for i in range(n_sequences + 1)] == [*starts, len(tokens)]
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert dataset.sequence(i).tolist() == list(tokens[start : start + length])


def test_mutated_indices(pair):
    index, random, refused = pair.with_suffix(".idx").read_bytes(), np.random.default_rng(1), 0
    data = pair.with_suffix(".bin").read_bytes()
    assert_says(IndexedDataset(pair), index, data)
    handle = open(pair.with_suffix(".idx"), "r+b", buffering=0)  # noqa: SIM115 opening anew 10^4 times is slow
    for _ in range(CASES):
        content = mutated(index, random)
        handle.seek(0)
        handle.write(content)
        handle.truncate()
        try:
            dataset = IndexedDataset(pair)
        except UserError as error:
            refused += 1
            assert len(error.lines) == 1 and "\n" not in str(error) and str(pair) in str(error)
            continue
        assert_says(dataset, content, data)
    handle.close()
    assert refused > CASES * 0.8


def corrupt(pair, what):
    index, data = bytearray(pair.with_suffix(".idx").read_bytes()), pair.with_suffix(".bin").read_bytes()
    lengths_at, offsets_at, bounds_at = 34, 34 + 4 * 12, 34 + 12 * 12
    if what == "truncated data":
        data = data[:-1]
    elif what == "longer data":
        data += b"\0\0"
    elif what == "length -1":
        index[lengths_at : lengths_at + 4] = struct.pack("<i", -1)
    elif what == "odd offset":
        index[offsets_at + 8 : offsets_at + 16] = struct.pack("<q", 1)
    elif what == "bounds backwards":
        index[bounds_at + 8 : bounds_at + 16] = struct.pack("<q", 9)
    elif what == "last bound":
        index[-8:] = struct.pack("<q", 11)
    elif what == "counts 2^62":
        index[18:26] = struct.pack("<Q", 2**62)
    elif what == "float tokens":
        index[17] = 7
    elif what == "version 2":
        index[9:17] = struct.pack("<Q", 2)
    elif what == "magic":
        index[:4] = b"ELF!"
    elif what == "empty index":
        index = bytearray()
    pair.with_suffix(".idx").write_bytes(bytes(index))
    pair.with_suffix(".bin").write_bytes(data)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("truncated data", "its index promises"),
        ("longer data", "its index promises"),
        ("length -1", "negative length"),
        ("odd offset", "does not begin where"),
        ("bounds backwards", "backwards"),
        ("last bound", "bounds do not go"),
        ("counts 2^62", "need"),
        ("float tokens", "no integer type"),
        ("version 2", "version 2"),
        ("magic", "not a Megatron index"),
        ("empty index", "less than a header"),
    ],
)
def test_each_kind_of_damage_is_named(pair, what, says):
    corrupt(pair, what)
    with pytest.raises(UserError, match=says):
        IndexedDataset(pair)
