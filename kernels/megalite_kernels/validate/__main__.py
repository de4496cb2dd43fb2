"""Gathers the evidence and writes docs/kernels.md.

    python -m megalite_kernels.validate [op …] [--device cuda] [--docs FOLDER]

Without a GPU: every case interpreted (E1, E3, E5) and every launch compiled for every chip (E4; what is on record is
not compiled again). On one (`--device cuda`): every case run there (E1), and twice for the same bits; its JSON lands
beside the page, which then says so. Exit code 1 if anything is wrong.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from megalite_kernels.gpu.chips import CHIPS
from megalite_kernels.gpu.compile import Compiled
from megalite_kernels.validate import page, snapshot
from megalite_kernels.validate.case import Case
from megalite_kernels.validate.cases import CASES, SWEEPS
from megalite_kernels.validate.levels import exactness, repeats, safety

DOCS = Path(__file__).parents[3] / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="only these ops; then the page is not written")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page and the JSON files are")
    given = parser.parse_args()
    unknown = set(given.ops) - {case.op for case in CASES}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such op; there are {', '.join(sorted({c.op for c in CASES}))}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    cases = [case for case in CASES if not given.ops or case.op in given.ops]
    found = page.Evidence(given.device)
    for number, case in enumerate(cases, 1):
        _try(found, case)
        _say(f"{number}/{len(cases)} cases, {len(found.wrong)} wrong")
    if given.device == "cpu":
        _compile(found, given.ops)
    print("", *found.wrong or ["all right"], sep="\n")
    if not given.ops:
        given.docs.mkdir(exist_ok=True)
        found.save(given.docs)
        (given.docs / "kernels.md").write_text(page.page(given.docs, CASES, SWEEPS, snapshot.load()))
    return int(bool(found.wrong))


def _say(text: str) -> None:
    print(f"\r{text}   ", end="", file=sys.stderr, flush=True)


def _try(found: page.Evidence, case: Case) -> None:
    """A case in every dtype; a failure is evidence too."""
    try:
        for dtype in case.dtypes:
            one = exactness(case, dtype, found.device)
            found.exact(case, str(dtype).removeprefix("torch."), one.worst)
        if found.device == "cpu":
            seen = safety(case)
            found.safe(case, seen)
        elif not repeats(case, found.device):
            found.wrong.append(f"{case}: two runs differ")
    except Exception as error:
        found.wrong.append(f"{case}: {type(error).__name__}: {error}")


def _compile(found: page.Evidence, ops: list[str]) -> None:
    """All launches of all sweeps for all chips; what no launch asks for any more leaves the record."""
    known = snapshot.load()
    kept: dict[str, Compiled] = {}
    sweeps = [sweep for sweep in SWEEPS if not ops or sweep.op in ops]
    started, done = time.monotonic(), 0
    for sweep in sweeps:
        for chip in CHIPS.values():
            kept |= snapshot.refresh(sweep, chip, known)
            found.wrong += [f"{sweep} on {chip.name}: {fault}" for fault in snapshot.faults(sweep, chip, kept)]
            done += 1
            left = (time.monotonic() - started) / done * (len(sweeps) * len(CHIPS) - done)
            _say(f"{done}/{len(sweeps) * len(CHIPS)} compiled, {left:.0f} s left")
        snapshot.save(known | kept)
    snapshot.save(known | kept if ops else kept)


if __name__ == "__main__":
    sys.exit(main())
