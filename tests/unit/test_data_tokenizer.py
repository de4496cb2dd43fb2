"""Tokenizers: nothing lost, the same every time, the fast path equal to the library's, foreign ones judged rightly."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.tokenizer import END_OF_DOCUMENT, ByteTokenizer, JsonTokenizer, load_tokenizer, train_bpe
from megalite.data.words import patterns, segments
from megalite.errors import UserError

TEXTS = [
    "def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n" * 5,
    "Größe, naïve café; 漢字 and 😀 emoji's don't\r\n" * 5,
]
BPE = train_bpe(TEXTS, 300)
CODE = st.text(st.sampled_from(" \n\t'abcXYZ019_.,()é漢😀\u2581\u200b\x85\x1c"), max_size=200)


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=200), CODE))
def test_nothing_is_lost(text):
    for tokenizer in (BPE, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        assert sum(tokenizer.token_bytes[ids]) == len(text.encode())
        assert all(0 <= i < tokenizer.vocab and i != tokenizer.eod for i in ids)


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=200), CODE))
def test_fast_path_equals_the_library(text):
    assert BPE.encode(text) == BPE._encode_whole([text])[0]


def test_words_are_cut_as_the_library_cuts_them():
    from tokenizers import pre_tokenizers

    words, unsettled = patterns()
    library = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    points = (i for i in range(0x20000) if not 0xD800 <= i < 0xE000)
    settled = [chr(i) for i in points if unsettled.search(chr(i)) is None]
    assert len(settled) > 50_000
    text = "".join(f"a{c}1 {c}{c} !{c}\n{c} {c}  " for c in settled)
    ends = [end for _, (_, end) in library.pre_tokenize_str(text)]
    assert np.cumsum([len(word) for word in words.findall(text)]).tolist() == ends


def test_segments_are_encoded_as_the_whole():
    text = TEXTS[0] * 20
    parts = segments(text, 50)
    assert len(parts) > 5 and "".join(parts) == text
    assert [i for part in parts for i in BPE.encode(part)] == BPE.encode(text)


def test_training_is_deterministic():
    assert train_bpe(TEXTS, 300).to_json() == BPE.to_json()
    assert train_bpe(TEXTS, 299).fingerprint != BPE.fingerprint
    assert BPE.vocab == 300 and BPE.eod == 0 and BPE.token_bytes[0] == 0 and BPE.byte_exact


def test_a_text_cannot_forge_an_end_of_document():
    for tokenizer in (BPE, ByteTokenizer(), JsonTokenizer(ByteTokenizer().to_json())):
        ids = tokenizer.encode(f"a{END_OF_DOCUMENT}b")
        assert tokenizer.eod not in ids and tokenizer.decode(ids) == f"a{END_OF_DOCUMENT}b"


def test_saved_and_loaded(tmp_path):
    for name, tokenizer in (("bpe", BPE), ("bytes", ByteTokenizer())):
        path = tmp_path / f"{name}.tokenizer.json"
        tokenizer.save(path)
        loaded = load_tokenizer(path)
        assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
        assert (loaded.vocab, loaded.eod, loaded.vocabulary) == (tokenizer.vocab, tokenizer.eod, tokenizer.vocabulary)
    assert load_tokenizer(tmp_path / "bpe.tokenizer.json").fingerprint == BPE.fingerprint
    assert load_tokenizer("bytes").vocab == 257


def sentencepiece_like():
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}}
    for piece in ("▁", "a", "b", "▁a", "ab", "▁ab"):
        vocab[piece] = len(vocab)
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": ["▁ a", "a b", "▁a b"],
        "unk_token": "<unk>",
        "byte_fallback": True,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": t,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for t, i in (("<unk>", 0), ("<s>", 1), ("</s>", 2))
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": model,
    }


def test_sentencepiece_like_tokenizer_is_known_to_change_text(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(sentencepiece_like()))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eod == 2 and not tokenizer.byte_exact
    ids = tokenizer.encode("ab a é")
    assert tokenizer.decode_bytes(ids) == " ab a é".encode()
    assert tokenizer.token_bytes[ids[0]] == 3
    assert tokenizer.token_bytes[[0, 1, 2]].sum() == 0


def test_normalising_tokenizer_is_known_to_change_text():
    definition = json.loads(BPE.to_json())
    definition["normalizer"] = {"type": "NFC"}
    assert not JsonTokenizer(json.dumps(definition)).byte_exact


def test_end_of_document_is_named_beside_the_file(tmp_path):
    definition = json.loads(BPE.to_json().replace(END_OF_DOCUMENT, "<|stop|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|stop|>"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eod == 0
    tokenizer.save(tmp_path / "copy.tokenizer.json")
    assert load_tokenizer(tmp_path / "copy.tokenizer.json").end == "<|stop|>"


@pytest.mark.parametrize(
    "content", ["", "{}", "[1, 2]", "not json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}']
)
def test_what_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(tmp_path / "missing.json")
