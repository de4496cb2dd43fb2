"""Tokenizing and loading beside Hugging Face `datasets`: same text, same tokenizer, same machine, in alternation.

    pip install 'megalite[bench]'
    python benchmarks/data_throughput.py [rounds=3] [workers=2] [batches=2000]

Text to blocks of 512 tokens: `data build` (samples are cut while reading, nothing is rewritten) against load_dataset,
map(tokenize) and map(group into blocks). Loading: random batches of 4 x 512 as torch tensors. Peak matters less here
than the ratio of two neighbours in time; its spread over the rounds is printed. Heavy imports stand inside functions
because worker processes import this file again.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megalite.config import schema
from megalite.config.options import HelpRequested, parse_options
from megalite.config.schema import Config
from megalite.data.build import build_dataset
from megalite.data.corpus import embedded_corpus
from megalite.data.sources import Reader
from megalite.data.tokenizer import load_tokenizer, train_bpe

LENGTH, BATCH = 512, 4


@dataclass(kw_only=True)
class Options:
    rounds: int = schema.key(3, "Alternations.", minimum=1)
    workers: int = schema.key(2, "Processes that tokenize.", minimum=1)
    batches: int = schema.key(2000, "Batches read in a round.", minimum=1)
    vocab: int = schema.key(4096, "Vocabulary of the BPE.", minimum=257)
    repeat: int = schema.key(1, "Copies of the corpus in the input.", minimum=1)


def main() -> None:
    import pyarrow
    import pyarrow.parquet

    options = parse_options(Options, sys.argv[1:], __doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = embedded_corpus().train * options.repeat
        size = sum(len(text.encode()) for text in documents)
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / "corpus.parquet")
        train_bpe(documents, options.vocab).save(folder / "tokenizer.json")
        print(f"{len(documents)} documents, {size / 1e6:.1f} MB, vocabulary {options.vocab}, {options.workers} workers")

        ours, theirs = [], []
        for turn in range(options.rounds):
            ours.append(seconds(lambda: build_ours(folder, options.workers)))
            theirs.append(seconds(lambda turn=turn: build_theirs(folder, options.workers, turn)))
        show("text to blocks, MB/s", size / 1e6, ours, theirs)

        tokens = options.batches * BATCH * LENGTH
        read_ours, read_theirs = reader_ours(folder, options.batches), reader_theirs(folder, options.batches)
        ours, theirs = [], []
        for _ in range(options.rounds):
            ours.append(seconds(read_ours))
            theirs.append(seconds(read_theirs))
        show("loading, million tokens/s", tokens / 1e6, ours, theirs)


def build_ours(folder: Path, workers: int) -> None:
    reader = Reader([folder / "corpus.parquet"])
    build_dataset(reader, folder / "ours", load_tokenizer(folder / "tokenizer.json"), workers, overwrite=True)


def build_theirs(folder: Path, workers: int, turn: int) -> None:
    """What the examples of transformers do; a fresh cache a turn, or the second would only look it up."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")

    def tokenize(rows: dict) -> dict:
        encodings = tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"input_ids": [[*encoding.ids, end] for encoding in encodings]}

    def group(rows: dict) -> dict:
        stream = list(chain.from_iterable(rows["input_ids"]))
        whole = len(stream) // LENGTH * LENGTH
        return {"input_ids": [stream[at : at + LENGTH] for at in range(0, whole, LENGTH)]}

    data = datasets.load_dataset(
        "parquet", data_files=str(folder / "corpus.parquet"), split="train", cache_dir=str(folder / f"cache-{turn}")
    )
    data = data.map(tokenize, batched=True, num_proc=workers, remove_columns=["text"])
    data = data.map(group, batched=True, num_proc=workers)
    data.save_to_disk(str(folder / "theirs"))


def reader_ours(folder: Path, batches: int) -> Callable[[], None]:
    from megalite.data.bundle import prepare_data

    config = Config()
    config.data.path, config.data.split, config.data.sequence_length = str(folder / "ours"), "1", LENGTH
    train = prepare_data(config, batches * BATCH).train

    def read() -> None:
        for at in range(batches):
            train.batch(range(at * BATCH, (at + 1) * BATCH))

    return read


def reader_theirs(folder: Path, batches: int) -> Callable[[], None]:
    import datasets

    data = datasets.load_from_disk(str(folder / "theirs")).shuffle(seed=1234).with_format("torch")

    def read() -> None:
        for at in range(batches):
            data[[i % len(data) for i in range(at * BATCH, (at + 1) * BATCH)]]["input_ids"]

    return read


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def show(what: str, amount: float, ours: list[float], theirs: list[float]) -> None:
    ratios = [slow / fast for fast, slow in zip(ours, theirs, strict=True)]
    fast, slow = amount / statistics.median(ours), amount / statistics.median(theirs)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds"
    print(f"{what}: megalite {fast:.2f}, datasets {slow:.2f}; ratio {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    try:
        main()
    except HelpRequested as text:
        print(text)
