"""Readers and `data build`: every format and compression gives the same documents; what is wrong is named."""

import gzip
import io
import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megalite.data import sources, streams
from megalite.data.build import build_dataset
from megalite.data.indexed import IndexedDataset
from megalite.data.sources import Reader
from megalite.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from megalite.errors import UserError

DOCUMENTS = ["first\nline two\n", "zweites Dokument: äöü 漢字 😀\n", " x ", "def f():\n    return 1\n" * 40]


def documents(reader):
    found, text = [], ""
    for piece in reader:
        text += piece.text
        if piece.end:
            found.append(text)
            text = ""
    assert text == "" and reader.position == reader.total
    return found


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content[:30]) + gzip.compress(content[30:])  # two members
    if suffix == ".zst":
        return b"".join(zstandard.compress(part) for part in (content[:30], content[30:]))  # two frames
    return content


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_and_jsonl(tmp_path, suffix):
    for i, text in enumerate(DOCUMENTS):
        (tmp_path / f"{i}.txt{suffix}").write_bytes(compressed(text.encode(), suffix))
    assert documents(Reader([tmp_path])) == DOCUMENTS
    lines = "".join(json.dumps({"id": i, "content": text}) + "\n" for i, text in enumerate(DOCUMENTS))
    path = tmp_path / f"all.jsonl{suffix}"
    path.write_bytes(compressed(lines.encode(), suffix))
    assert documents(Reader([path], key="content")) == DOCUMENTS


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_parquet(tmp_path, suffix):
    table = pyarrow.table({"body": DOCUMENTS, "n": list(range(len(DOCUMENTS)))})
    pyarrow.parquet.write_table(table, plain := io.BytesIO(), row_group_size=2, compression="zstd")
    path = tmp_path / f"all.parquet{suffix}"
    path.write_bytes(compressed(plain.getvalue(), suffix))
    assert documents(Reader([path], key="body")) == DOCUMENTS
    with pytest.raises(UserError, match="no column 'text'; it has body, n"):
        documents(Reader([path]))
    with pytest.raises(UserError, match=r"row 1: 'n' is int"):
        documents(Reader([path], key="n"))


def test_long_texts_come_in_pieces_and_nothing_is_lost(tmp_path, monkeypatch):
    generator = random.Random(0)
    for block in (64, 65, 100):
        monkeypatch.setattr(sources, "_BLOCK", block)
        for alphabet in ("ab 漢é\n", "漢😀", "a\n\n  ", "9_\n"):
            text = "".join(generator.choices(alphabet, k=700))
            (tmp_path / "long.txt").write_text(text, newline="")
            reader = Reader([tmp_path / "long.txt"])
            assert documents(reader) == [text]
            (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}))
            assert documents(Reader([tmp_path / "long.jsonl"])) == [text]
    assert reader.counts["long documents tokenized in parts"] == 1


def test_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": null}\n{"text": "x"}\n')
    (tmp_path / "b.txt").write_text("")
    (tmp_path / ".hidden").write_text("secret")
    reader = Reader([tmp_path])
    assert documents(reader) == ["x"]
    assert dict(+reader.counts) == {
        "hidden files left out": 1,
        "blank lines left out": 1,
        "empty documents left out": 3,
    }


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl:2: list"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: no field 'text'; it has body"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' is int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: half a surrogate"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.txt", b"good\n\xff\xfe", r"a\.txt: not UTF-8 at byte 5"),
        ("a.txt.gz", gzip.compress(b"some text" * 100, mtime=0)[:-12], r"a\.txt\.gz: damaged or cut-off"),
        ("a.txt.gz", b"no gzip at all", r"a\.txt\.gz: damaged"),
        ("a.txt.zst", zstandard.compress(random.Random(0).randbytes(5000))[:-100], r"a\.txt\.zst: damaged or cut-off"),
        ("a.txt.zst", b"no zstd at all", r"a\.txt\.zst: damaged"),
        ("a.parquet", b"no parquet", r"a\.parquet: not a readable Parquet"),
        ("a.parquet.gz", gzip.compress(b"no parquet", mtime=0), r"a\.parquet\.gz: not a readable Parquet"),
        ("a.parquet.zst", b"no zstd at all", r"a\.parquet\.zst: damaged"),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        documents(Reader([tmp_path / name]))
    with pytest.raises(UserError, match=says):
        build_dataset(Reader([tmp_path / name]), tmp_path / "out", ByteTokenizer())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_and_empty_input(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Reader([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no files"):
        Reader([tmp_path])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="not one document"):
        build_dataset(Reader([tmp_path]), tmp_path / "out", ByteTokenizer())


def test_a_zstd_bomb_does_not_fill_the_memory(tmp_path):
    (tmp_path / "bomb.zst").write_bytes(zstandard.compress(bytes(1 << 27)))
    with streams.open_stream(tmp_path / "bomb.zst") as (stream, _):
        largest = 0
        for _ in range(100):
            stream.read(1000)
            largest = max(largest, len(stream.raw._ready))
    assert largest < 1 << 26


@pytest.mark.parametrize("workers", [1, 2])
def test_build(tmp_path, workers, monkeypatch):
    from megalite.data import build

    monkeypatch.setattr(build, "_BATCH", 300)  # so that workers share the little text there is
    monkeypatch.setattr(build, "_ALONE", 0)
    texts = DOCUMENTS * 7
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_bpe(DOCUMENTS, 300)
    built = build_dataset(Reader([tmp_path / "in.jsonl"]), tmp_path / "out", tokenizer, workers)
    dataset = IndexedDataset(tmp_path / "out")
    assert built.documents == len(dataset) == len(texts) and built.tokens == len(dataset.tokens)
    for i, text in enumerate(texts):
        ids = dataset.sequence(i)
        assert ids[-1] == tokenizer.eod and tokenizer.decode_bytes(ids) == text.encode()
    assert load_tokenizer(tmp_path / "out.tokenizer.json").vocabulary == tokenizer.vocabulary
    with pytest.raises(UserError, match="exists"):
        build_dataset(Reader([tmp_path / "in.jsonl"]), tmp_path / "out", tokenizer)
    build_dataset(Reader([tmp_path / "in.jsonl"]), tmp_path / "out", ByteTokenizer(), overwrite=True)
    assert IndexedDataset(tmp_path / "out").sequence(0).tolist() == [*DOCUMENTS[0].encode(), 256]


def test_read_only_output(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output: cannot write"):
        build_dataset(Reader([tmp_path / "a.txt"]), tmp_path / "file" / "out", ByteTokenizer())


def test_full_disk(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        build_dataset(Reader([tmp_path / "a.txt"]), tmp_path / "out", ByteTokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_cut_never_splits_a_character():
    for text in ("漢字" * 30, "é" * 50, "😀" * 20, "a\n漢" * 20, "\n" * 9):
        content = text.encode()
        for end in range(1, len(content)):
            cut = sources._cut(content[:end])
            content[:cut].decode()
            assert 0 <= cut <= end
    assert np.all([sources._cut(b"word\nword2\n  9\n") == 4])
