"""`megalite data build | inspect | tokenizer`: text to an indexed dataset, a look into one, a BPE trained on text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.config import schema
from megalite.config.options import parse_options, required
from megalite.data.build import build_dataset, check_output
from megalite.data.corpus import embedded_corpus
from megalite.data.files import writing
from megalite.data.indexed import IndexedDataset
from megalite.data.sources import Reader
from megalite.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from megalite.errors import UserError
from megalite.progress import Progress, quantity

USAGE = """megalite data build input=FILES output=PREFIX [tokenizer=bpe|bytes|PATH] [key=value ...]
megalite data inspect PREFIX
megalite data tokenizer input=FILES output=tokenizer.json [vocab=N]

build: text, JSONL or Parquet (text and JSONL also .gz, .zst) into PREFIX.bin and PREFIX.idx, Megatron's format.
inspect: what a .bin/.idx pair holds.  tokenizer: train a byte-level BPE."""
FORMATS = ("auto", "text", "jsonl", "parquet")


@dataclass(kw_only=True)
class BuildOptions:
    input: list[str] = required("Files, folders or patterns (**/*.py), separated by commas.")
    output: str = required("Prefix of the files to write.")
    tokenizer: str = schema.key("bpe", "'bpe' (trained on the input), 'bytes', or the path of a tokenizer.json.")
    vocab: int = schema.key(32768, "Vocabulary of a BPE trained on the spot, end-of-document included.", minimum=257)
    format: str = schema.key("auto", "How files are read; auto: by their names.", choices=FORMATS)
    key: str = schema.key("text", "JSON field or Parquet column that holds the text.")
    workers: int = schema.key(0, "Processes that tokenize; 0: one a core.", minimum=0)
    sample_mb: int = schema.key(256, "Text a BPE is trained on, from the start of the input; 0: all of it.", minimum=0)
    overwrite: bool = schema.key(False, "Replace an existing output.")


@dataclass(kw_only=True)
class TokenizerOptions:
    input: list[str] = required(
        "Files, folders or patterns (**/*.py), separated by commas; 'embedded': this Python's library source."
    )
    output: str = required("The file to write, ending in tokenizer.json.")
    vocab: int = schema.key(32768, "Vocabulary, end-of-document included.", minimum=257)
    format: str = schema.key("auto", "How files are read; auto: by their names.", choices=FORMATS)
    key: str = schema.key("text", "JSON field or Parquet column that holds the text.")
    sample_mb: int = schema.key(256, "Text it is trained on, from the start of the input; 0: all of it.", minimum=0)
    overwrite: bool = schema.key(False, "Replace an existing file.")


@dataclass(kw_only=True)
class InspectOptions:
    prefix: str = required("Prefix of the .bin/.idx pair.")
    tokenizer: str | None = schema.key(
        None, "Tokenizer that decodes the preview; null: PREFIX.tokenizer.json, if there."
    )


def run(arguments: list[str]) -> int:
    actions = {"build": _build, "inspect": _inspect, "tokenizer": _tokenizer}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] not in actions:
        raise UserError(f"{arguments[0]}: unknown action; legal: {', '.join(actions)}")
    return actions[arguments[0]](arguments[1:])


def _build(arguments: list[str]) -> int:
    options = parse_options(BuildOptions, arguments, USAGE)
    check_output(options.output, options.overwrite)
    reader = Reader(options.input, options.format, options.key)
    tokenizer = _trained(options) if options.tokenizer == "bpe" else load_tokenizer(options.tokenizer)
    built = build_dataset(reader, options.output, tokenizer, options.workers, options.overwrite)
    speed = quantity(built.text_bytes / max(built.seconds, 1e-9), "B")
    print(f"{options.output}: {built.documents} documents, {built.tokens} tokens of a vocabulary of {tokenizer.vocab},")
    print(f"  {quantity(built.text_bytes, 'B')} of text in {built.seconds:.1f} s ({speed}/s)")
    for what, count in sorted(built.left_out.items()):
        print(f"  {what}: {count}")
    print(f"train on it: megalite train data.path={options.output}")
    return 0


def _tokenizer(arguments: list[str]) -> int:
    options = parse_options(TokenizerOptions, arguments, USAGE)
    output = Path(options.output)
    if not output.name.endswith("tokenizer.json"):
        raise UserError(f"output: {output} must end in tokenizer.json, the name that other tools look for")
    if output.exists() and not options.overwrite:
        raise UserError(f"output: {output} exists; choose another name or set overwrite=true")
    tokenizer = _trained(options)
    with writing(output, "output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(output)
    print(f"{output}: {tokenizer.vocab} tokens")
    return 0


def _trained(options: BuildOptions | TokenizerOptions) -> Tokenizer:
    limit = options.sample_mb * 10**6 or None
    if options.input == ["embedded"]:
        texts, total = iter(embedded_corpus().train), None
    else:
        reader = Reader(options.input, options.format, options.key)
        texts, total = (piece.text for piece in reader), min(reader.total, limit or reader.total)
    with Progress("training the tokenizer", total, "B") as bar:

        def sample() -> Iterator[str]:
            for text in texts:
                size = len(text.encode())
                if limit and bar.done + size > limit and bar.done:
                    return
                bar.advance(size)
                yield text

        return train_bpe(sample(), options.vocab)


def _inspect(arguments: list[str]) -> int:
    options = parse_options(InspectOptions, arguments, USAGE, positional=("prefix",))
    dataset = IndexedDataset(options.prefix, "prefix")
    lengths = dataset.lengths
    counts = f"{len(dataset.documents) - 1} documents, {len(dataset)} sequences, {len(dataset.tokens)} tokens"
    print(f"{options.prefix}: {counts}")
    print(f"  {dataset.dtype} tokens, {quantity(dataset.tokens.nbytes, 'B')}")
    if not len(dataset.tokens):
        return 0
    least, low, middle, high, most = (f"{value:.0f}" for value in np.percentile(lengths, [0, 5, 50, 95, 100]))
    print(f"  tokens a sequence: least {least}, 5% {low}, median {middle}, 95% {high}, most {most}")
    print(f"  largest token id among the first million: {dataset.tokens[:1_000_000].max()}")
    beside = Path(f"{options.prefix}.tokenizer.json")
    if options.tokenizer or beside.is_file():
        tokenizer = load_tokenizer(options.tokenizer or beside)
        first = dataset.tokens[:64].tolist()
        if max(first) >= tokenizer.vocab or min(first) < 0:
            raise UserError(
                f"tokenizer: its vocabulary of {tokenizer.vocab} does not hold the dataset's ids; give another"
            )
        print(f"  begins: {tokenizer.decode(first)!r}")
    return 0
