"""What simple, well-known models make of the same bytes: the yardsticks beside a run's validation bits per byte."""

import gzip
import json
from pathlib import Path

from megalite.disk import replace_text
from megalite.progress import Progress
from megalite.report.ngram import KneserNey

TRAIN_LIMIT = 64_000_000
"""Bytes of training text the n-gram model counts at most: about 2 GB of memory and ten seconds."""


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits a byte after `gzip -9`; the header counts, as it does on a disk."""
    if not text:
        raise ValueError("no bytes to compress")
    return len(gzip.compress(text, 9, mtime=0)) * 8 / len(text)


def kneser_ney_bits_per_byte(train: bytes, valid: bytes, order: int = 5) -> float:
    """Bits a byte of an interpolated modified Kneser-Ney byte n-gram, counted on `train` and evaluated on `valid`."""
    with Progress(f"{order}-gram baseline", total=order + 1, unit="orders") as bar:
        model = KneserNey(train, order, bar)
        bits = model.bits_per_byte(valid)
        bar.advance()
    return bits


def write_baselines(
    run_dir: Path, train: bytes, valid: bytes, *, validation: str, validation_tokens: int, order: int = 5
) -> dict[str, float | int | str]:
    """Measure both and leave them in baselines.json (atomically), with what they saw.

    `validation`, `validation_tokens`: name and whole size of the set whose text `valid` is; the report puts beside them
    only evaluations of just that.
    """
    counted = train[:TRAIN_LIMIT]
    measured: dict[str, float | int | str] = {
        "gzip": gzip_bits_per_byte(valid),
        "kneser_ney": kneser_ney_bits_per_byte(counted, valid, order),
        "order": order,
        "train_bytes": len(counted),
        "train_bytes_whole": len(train),
        "validation": validation,
        "validation_tokens": validation_tokens,
        "validation_bytes": len(valid),
    }
    replace_text(run_dir / "baselines.json", json.dumps(measured, indent=2) + "\n")
    return measured
