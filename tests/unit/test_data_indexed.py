"""The .bin/.idx format: bytes against the golden, round trips, and pairs that are complete or absent."""

import os
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter, token_dtype
from megalite.errors import UserError


def write(prefix, documents, vocab=100):
    with IndexedWriter(prefix, vocab) as writer:
        for document in documents:
            writer.add(np.array(document, np.int64))


def test_golden_bytes(tmp_path):
    write(tmp_path / "golden", [[1, 2, 3, 7], [5, 6, 7], [9, 7]])
    index, data = (tmp_path / "golden.idx").read_bytes(), (tmp_path / "golden.bin").read_bytes()
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 4, 3, 2) + struct.pack("<3q", 0, 8, 14) + struct.pack("<4q", 0, 1, 2, 3)
    assert index == expected and len(index) == 102
    assert data == struct.pack("<9H", 1, 2, 3, 7, 5, 6, 7, 9, 7) and len(data) == 18
    assert sorted(path.name for path in tmp_path.iterdir()) == ["golden.bin", "golden.idx"]


@given(st.lists(st.lists(st.integers(0, 99), max_size=20), max_size=20), st.sampled_from([100, 65499, 65500, 200000]))
def test_round_trip(tmp_path_factory, documents, vocab):
    prefix = tmp_path_factory.mktemp("pair") / "corpus.v2"
    write(prefix, documents, vocab)
    dataset = IndexedDataset(prefix)
    assert [dataset.sequence(i).tolist() for i in range(len(dataset))] == documents
    assert dataset.documents.tolist() == list(range(len(documents) + 1))
    assert dataset.dtype == token_dtype(vocab)


def test_token_type_rule():
    assert token_dtype(65499) == np.dtype("<u2")
    assert token_dtype(65500) == np.dtype("<i4")


@pytest.mark.parametrize(("code", "kind"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_reads_every_integer_type_and_multimodal_modes(tmp_path, code, kind):
    tokens = np.array([1, 2, 3, 7, 5], kind)
    (tmp_path / "other.bin").write_bytes(tokens.tobytes())
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 2, 2) + struct.pack("<2i", 3, 2)
    index += struct.pack("<2q", 0, 3 * tokens.itemsize) + struct.pack("<2q", 0, 2)
    for modes in (b"", b"\0\1"):
        (tmp_path / "other.idx").write_bytes(index + modes)
        dataset = IndexedDataset(tmp_path / "other")
        assert dataset.sequence(0).tolist() == [1, 2, 3] and dataset.sequence(1).tolist() == [7, 5]


def test_parts_of_a_document_are_one_sequence(tmp_path):
    with IndexedWriter(tmp_path / "parts", 10) as writer:
        writer.add(np.array([1, 2]), end=False)
        writer.add(np.array([3]), end=True)
    assert IndexedDataset(tmp_path / "parts").sequence(0).tolist() == [1, 2, 3]


def test_an_error_leaves_nothing_new(tmp_path):
    write(tmp_path / "kept", [[1, 2]])
    for prefix in ("kept", "new"):
        with pytest.raises(KeyError), IndexedWriter(tmp_path / prefix, 10) as writer:
            writer.add(np.array([3]))
            raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.bin", "kept.idx"]
    assert IndexedDataset(tmp_path / "kept").sequence(0).tolist() == [1, 2]


def test_a_second_writer_is_refused(tmp_path):
    with IndexedWriter(tmp_path / "one", 10) as writer:
        with pytest.raises(UserError, match="another process"):
            IndexedWriter(tmp_path / "one", 10)
        writer.add(np.array([1]))
    assert len(IndexedDataset(tmp_path / "one")) == 1


def test_ids_outside_the_vocabulary_are_not_written(tmp_path):
    with pytest.raises(AssertionError), IndexedWriter(tmp_path / "bad", 10) as writer:
        writer.add(np.array([10]))
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, numpy as np
from megalite.data.indexed_writer import IndexedWriter
with IndexedWriter(sys.argv[1], 60000) as writer:
    print("writing", flush=True)
    while True:
        writer.add(np.arange(50000))
"""


def test_a_killed_writer_leaves_no_pair_and_the_next_one_works(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "corpus")], stdout=subprocess.PIPE, env={**os.environ}
    )
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.1)
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="does not exist"):
        IndexedDataset(tmp_path / "corpus")
    write(tmp_path / "corpus", [[1], [2, 3]])
    assert IndexedDataset(tmp_path / "corpus").sequence(1).tolist() == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"]
