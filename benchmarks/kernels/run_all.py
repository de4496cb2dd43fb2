"""Every op of megalite_kernels beside all that is installed, at a model's shapes: CSV, JSON and a picture of each.

    python benchmarks/kernels/run_all.py [--against sdpa,flash_attn] [any other option of megalite bench] [out=FOLDER]

`out` (default: kernels_DEVICE) keeps what was measured; a later run with
the same `out` is held against it (tolerance=0.1) and writes beside it: exit code 1 if something became slower. On two
quiet CPU cores an op takes about a minute; against=sdpa,torch, which leaves out what is compiled, a third of it.
"""

import sys
from pathlib import Path

import torch

from megalite.cli import main
from megalite.cli.bench import OPS, as_words

FILES = {"csv": "csv", "json": "json", "plot": "png"}


def run_all(words: list[str]) -> int:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    named = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    out = Path(named[-1] if named else f"kernels_{device}".replace(" ", "_").lower())
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, op in enumerate(OPS, 1):
        before = out / f"{op}.json"
        name = f"{op}.new" if before.exists() else op
        files = [f"{key}={out / name}.{suffix}" for key, suffix in FILES.items()]
        held = [f"baseline={before}"] if before.exists() else []
        print(f"\n[{number}/{len(OPS)}] {op}", flush=True)
        if main(["bench", op, *(word for word in words if not word.startswith("out=")), *files, *held]):
            failed.append(op)
    print(f"\n{out}: {len(OPS)} ops, trouble with {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_all(as_words(sys.argv[1:])))
