"""Against Megatron-Core itself, where it is installed: files byte for byte, indices and blends bit for bit."""

import numpy as np
import pytest
import torch

from megalite.data.blend import build_blend, normalised
from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.samples import build_sample_index, epochs_needed

theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="pip install --no-deps megatron-core")


@pytest.fixture
def documents():
    random = np.random.default_rng(0)
    return [random.integers(0, 60000, random.integers(1, 300)).tolist() for _ in range(500)]


@pytest.mark.parametrize(("vocab", "kind"), [(60000, np.uint16), (100000, np.int32)])
def test_files_are_the_same_bytes(tmp_path, documents, vocab, kind):
    with IndexedWriter(tmp_path / "ours", vocab) as writer:
        for document in documents:
            writer.add(np.array(document))
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=kind)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    read = theirs.IndexedDataset(str(tmp_path / "ours"))
    assert [read[i].tolist() for i in range(len(read))] == documents


class Ids:
    """The least that their dataset asks of a tokenizer."""

    eod, pad, vocab_size, unique_identifiers = 1, 0, 60000, {"class": "Ids"}


def test_sample_order_is_the_same_bits(tmp_path, documents):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    with IndexedWriter(tmp_path / "corpus", 60000) as writer:
        for document in documents:
            writer.add(np.array(document))
    lengths, random = IndexedDataset(tmp_path / "corpus").lengths, np.random.default_rng(1)
    for case in range(20):
        length, n_samples, seed = random.integers(8, 200), random.integers(1, 3000), random.integers(0, 10000)
        first = int(random.integers(0, 100))
        last = int(random.integers(first + 1, 501))
        config = GPTDatasetConfig(
            random_seed=int(seed),
            sequence_length=int(length),
            split="1,0,0",
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=Ids(),
            path_to_cache=str(tmp_path / f"cache{case}"),
        )
        dataset = theirs.IndexedDataset(str(tmp_path / "corpus"))
        part = np.arange(first, last, dtype=np.int32)
        their = GPTDataset(dataset, str(tmp_path / "corpus"), part, int(n_samples), Split.train, config)
        own = lengths[first:last]
        epochs = epochs_needed(int(own.sum()), int(length), int(n_samples))
        ours = build_sample_index(own, first, int(length), epochs, int(seed))
        for mine, other in (
            (ours.documents, their.document_index),
            (ours.samples, their.sample_index),
            (ours.shuffle, their.shuffle_index),
        ):
            assert mine.dtype == other.dtype and np.array_equal(mine, other)


def test_blends_are_the_same_bits():
    from megatron.core.datasets import helpers

    random = np.random.default_rng(2)
    for _ in range(20):
        shares, size = normalised(random.random(random.integers(1, 9)).tolist()), int(random.integers(1, 5000))
        source, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers.build_blending_indices(source, sample, shares, len(shares), size, False)
        blend = build_blend(shares, size)
        assert np.array_equal(blend.source, source) and np.array_equal(blend.sample, sample)
