"""Batches: what training and validation sets hand out, whoever asks and in whatever order."""

import shutil
import threading

import numpy as np
import pytest
import torch

from megalite.config.schema import Config
from megalite.data.bundle import prepare_data
from megalite.data.corpus import embedded_corpus
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.tokenizer import ByteTokenizer
from megalite.data.training import GptSamples
from megalite.errors import UserError

EOD = 256


@pytest.fixture
def pair(tmp_path):
    """Prefix of 60 documents of 0 to 29 tokens and an end-of-document, ids below 257, and the documents."""
    random = np.random.default_rng(0)
    documents = [[*random.integers(0, 256, random.integers(0, 30)).tolist(), EOD] for _ in range(60)]
    with IndexedWriter(tmp_path / "corpus", 257) as writer:
        for document in documents:
            writer.add(np.array(document))
    return str(tmp_path / "corpus"), documents


def config(path="embedded", **data) -> Config:
    made = Config()
    made.data.path, made.data.tokenizer, made.data.sequence_length = path, "bytes", 16
    for name, value in data.items():
        setattr(made.data, name, value)
    return made


def test_samples_follow_the_indices(pair):
    prefix, documents = pair
    bundle = prepare_data(config(prefix, split="1"), 200)
    index, train = bundle.train._index, bundle.train
    stream = [token for sequence in index.documents for token in documents[sequence]]
    for n in range(200):
        batch = train.batch([n])
        at = int(index.shuffle[n]) * 16
        assert batch.tokens[0].tolist() == stream[at : at + 16]
        assert batch.targets[0].tolist() == stream[at + 1 : at + 17]
        assert batch.documents is None
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.tokens.is_contiguous()
    with pytest.raises(ValueError, match="sample 200 of 200"):
        train.batch([200])
    with pytest.raises(ValueError, match="sample -1"):
        train.batch([-1])


def test_document_numbers_change_after_each_end_of_document(pair):
    bundle = prepare_data(config(pair[0], packing="documents"), 200)
    for samples in (range(8), range(190, 200)):
        batch = bundle.train.batch(samples)
        starts = batch.documents.diff(dim=1) > 0
        assert batch.documents.dtype == torch.int32 and (batch.documents[:, 0] == 0).all()
        assert torch.equal(starts, batch.tokens[:, :-1] == EOD)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_order_is_the_same_on_any_number_of_ranks_and_after_any_restart(pair, ranks):
    reference = prepare_data(config(pair[0]), 64).train.batch(range(64))
    rows = {}
    for step in range(8):
        for rank in range(ranks):
            train = prepare_data(config(pair[0]), 64).train  # opened anew, as after a restart
            own = [step * 8 + i for i in range(8) if i % ranks == rank]
            rows |= dict(zip(own, train.batch(own).tokens, strict=True))
    assert torch.equal(torch.stack([rows[n] for n in range(64)]), reference.tokens)


def test_seed_decides_the_order(pair):
    other = config(pair[0])
    other.train.seed = 5
    first, second = prepare_data(config(pair[0]), 64).train, prepare_data(other, 64).train
    assert not torch.equal(first.batch(range(64)).tokens, second.batch(range(64)).tokens)


@pytest.mark.parametrize("length", [1, 7, 16, 5000])
@pytest.mark.parametrize("packing", ["cross", "documents"])
def test_every_validation_token_is_a_target_exactly_once(pair, length, packing):
    prefix, documents = pair
    bundle = prepare_data(config(prefix, split="0.5,0.5", sequence_length=length, packing=packing), 3)
    (validation,) = bundle.validation
    held_out = [token for document in documents[30:] for token in document]
    batches = [validation.batch([n]) for n in range(validation.n_samples)]
    targets = torch.cat([batch.targets[0] for batch in batches])
    inputs = torch.cat([batch.tokens[0] for batch in batches])
    assert targets[targets >= 0].tolist() == held_out
    assert (targets[len(held_out) :] == -100).all() and len(targets) - len(held_out) < length
    assert inputs[: len(held_out)].tolist() == [EOD, *held_out[:-1]]
    assert validation.n_bytes == sum(token != EOD for token in held_out)
    assert bundle.raw_bytes("validation") == bytes(token for token in held_out if token != EOD)
    if packing == "documents":
        numbers = torch.cat([batch.documents[0] for batch in batches])
        starts = (numbers[1:] != numbers[:-1])[: len(held_out) - 1]
        rows = torch.arange(1, len(held_out)) % length == 0
        assert torch.equal(starts[~rows], (inputs[: len(held_out) - 1] == EOD)[~rows])
    with pytest.raises(ValueError, match="no sample"):
        validation.batch([validation.n_samples])


def test_blend(pair, tmp_path):
    for name, token in (("a", 1), ("b", 2)):
        with IndexedWriter(tmp_path / name, 257) as writer:
            writer.add(np.full(1000, token))
    blend = {str(tmp_path / "a"): 3.0, str(tmp_path / "b"): 1.0}
    made = config(blend=blend, validation={"held out": pair[0], "ones": str(tmp_path / "a")})
    bundle = prepare_data(made, 40)
    batch = bundle.train.batch(range(40))
    assert (batch.tokens == batch.tokens[:, :1]).all()
    assert (batch.tokens[:, 0] == 1).sum() == 30
    assert [validation.name for validation in bundle.validation] == ["held out", "ones"]
    assert bundle.raw_bytes("train") == b"\1" * 1000 + b"\2" * 1000
    assert bundle.raw_bytes("validation") == bytes(t for document in pair[1] for t in document if t != EOD)
    assert len(bundle.raw_bytes("validation")) == bundle.validation[0].n_bytes
    assert torch.equal(bundle.train.batch([17]).tokens[0], batch.tokens[17])
    with pytest.raises(ValueError, match="from a blend"):
        bundle.train.batch([40])


def test_embedded_corpus_is_deterministic_and_split_by_file():
    corpus, again = embedded_corpus(), embedded_corpus()
    assert corpus == again
    sizes = [sum(len(text.encode()) for text in part) for part in (corpus.train, corpus.validation)]
    assert sum(sizes) > 3_000_000 and 0.045 < sizes[1] / sum(sizes) < 0.056 and len(corpus.validation) > 10
    assert not set(corpus.train) & set(corpus.validation), "a copy of a file would leak into validation"
    assert any("Python Software Foundation" in note for note in corpus.notes)


def test_corpus_says_what_it_leaves_out(tmp_path):
    for name, content in (("b.py", b"b = 1\n"), ("a/c.py", b"c = 2\n"), ("bad.py", b"\xff"), ("empty.py", b"")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for left in ("test", "site-packages", "__pycache__"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "x.py").write_text("x")
    corpus = embedded_corpus(0.0, folder=tmp_path)
    assert corpus.train == ["c = 2\n", "b = 1\n"] and corpus.validation == []
    assert "left out 1 empty files and 1 that are not UTF-8 (bad.py)" in corpus.notes[-1]
    with pytest.raises(UserError, match="no Python sources"):
        embedded_corpus(folder=tmp_path / "nowhere")


def test_embedded_bundle_is_cached_and_gives_back_the_text(tmp_path):
    made = config(tokenizer="bpe", vocab=512, max_bytes=100_000, cache=str(tmp_path))
    bundle = prepare_data(made, 100)
    assert bundle.tokenizer.vocab == 512 == len(bundle.token_bytes) and bundle.token_bytes[bundle.tokenizer.eod] == 0
    corpus = embedded_corpus(0.05, 100_000)
    assert bundle.raw_bytes("train") == "".join(corpus.train).encode() and len(bundle.raw_bytes("train")) == 100_000
    assert bundle.raw_bytes("validation") == "".join(corpus.validation).encode()
    assert bundle.validation[0].n_bytes == len(bundle.raw_bytes("validation"))
    before = sorted(tmp_path.rglob("*"))
    again = prepare_data(made, 100)
    assert torch.equal(again.train.batch(range(9)).tokens, bundle.train.batch(range(9)).tokens)
    assert sorted(tmp_path.rglob("*")) == before
    assert not [path for path in before if ".tmp-" in path.name]


def test_two_at_once_build_one_cache(tmp_path):
    made, bundles = config(max_bytes=50_000, cache=str(tmp_path)), []
    threads = [threading.Thread(target=lambda: bundles.append(prepare_data(made, 50))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bundles) == 3 and len(list(tmp_path.glob("embedded-*"))) == 1
    assert torch.equal(bundles[0].train.batch([3]).tokens, bundles[2].train.batch([3]).tokens)


def test_stale_temporaries_are_removed(tmp_path):
    (tmp_path / ".tmp-left").mkdir(parents=True)
    prepare_data(config(max_bytes=10_000, cache=str(tmp_path)), 5)
    assert not (tmp_path / ".tmp-left").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "/nowhere/corpus"}, r"data\.path: /nowhere/corpus\.idx does not exist"),
        ({"path": "/nowhere/corpus", "tokenizer": "bpe"}, r"data\.path: /nowhere/corpus\.idx does not exist"),
        ({"blend": {"/nowhere/a": 1.0}, "tokenizer": "bpe"}, r"data\.blend: /nowhere/a\.idx does not exist"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, r"data\.tokenizer: cannot read"),
        ({"tokenizer": "bpe"}, r"data\.tokenizer: 'bpe' needs"),
        ({"split": "x,y"}, r"data\.split"),
        ({"split": "0,1"}, r"data\.split"),
        ({"validation": {"v": "/nowhere/v"}}, r"data\.validation\.v: /nowhere/v\.idx does not exist"),
        ({"split": "0.0001,1"}, r"no tokens to train on"),
        ({"cache": "/proc/nothing"}, r"data\.cache: cannot write"),
    ],
)
def test_bad_configuration(pair, change, says):
    with pytest.raises(UserError, match=says):
        prepare_data(config(**{"path": pair[0], **change}), 10)


def test_ids_of_a_foreign_tokenizer_are_refused(tmp_path):
    with IndexedWriter(tmp_path / "foreign", 1000) as writer:
        for _ in range(9):
            writer.add(np.full(50, 999))
    bundle = prepare_data(config(str(tmp_path / "foreign"), split="0.5,0.5"), 10)
    for ask in (
        lambda: bundle.train.batch([0]),
        lambda: bundle.validation[0].batch([0]),
        lambda: bundle.validation[0].n_bytes,
    ):
        with pytest.raises(UserError, match="token id 999 is outside the tokenizer's vocabulary of 257"):
            ask()


def test_a_dataset_built_with_another_vocabulary_is_refused(pair, tmp_path):
    from megalite.data.build import build_dataset
    from megalite.data.sources import Reader
    from megalite.data.tokenizer import train_bpe

    (tmp_path / "in.txt").write_text("some text " * 100)
    build_dataset(Reader([tmp_path / "in.txt"]), tmp_path / "out", train_bpe(["some text"], 260))
    with pytest.raises(UserError, match="built with another vocabulary"):
        prepare_data(config(str(tmp_path / "out")), 1)
    made = config(str(tmp_path / "out"), tokenizer="bpe", split="1")
    assert prepare_data(made, 1).tokenizer.decode_bytes(prepare_data(made, 1).train.batch([0]).tokens[0].tolist())


def test_a_removed_cache_is_built_again(pair, tmp_path):
    cache = tmp_path / "cache"
    first = prepare_data(config(pair[0], cache=str(cache)), 20).train.batch(range(20)).tokens
    shutil.rmtree(cache)
    assert torch.equal(prepare_data(config(pair[0], cache=str(cache)), 20).train.batch(range(20)).tokens, first)


def test_more_samples_do_not_change_the_order_inside_an_epoch(pair):
    few, more = prepare_data(config(pair[0]), 10).train, prepare_data(config(pair[0]), 40).train
    assert isinstance(few, GptSamples)
    assert torch.equal(few.batch(range(10)).tokens, more.batch(range(10)).tokens)
    assert ByteTokenizer().eod == EOD
