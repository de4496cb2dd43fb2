"""Gathers the evidence and writes docs/kernels.md.

    python -m megalite_kernels.validate [op …] [--device cuda] [--docs FOLDER]

Without a GPU: every case interpreted (E1, E3, E5), in a checkout the laws (E2), and every launch compiled for every
chip (E4; what is on record is not compiled again). On one (`--device cuda`): every case run there (E1), and twice for
the same bits; then, in a checkout, the laws and all other tests of the kernels, and the benchmarks; its JSON lands
beside the page, which then says so. Exit code 1 if anything is wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from megalite_kernels.gpu.chips import CHIPS
from megalite_kernels.gpu.compile import Compiled
from megalite_kernels.validate import page, snapshot
from megalite_kernels.validate.cases import CASES, SWEEPS
from megalite_kernels.validate.work import build, try_case

CHECKOUT = Path(__file__).parents[3]
DOCS = CHECKOUT / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="only these ops; then the page is not written")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; of a GPU's cases always one")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page and the JSON files are")
    given = parser.parse_args()
    unknown = set(given.ops) - {case.op for case in CASES}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such op; there are {', '.join(sorted({c.op for c in CASES}))}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    if given.device == "cuda":
        given.jobs = 1
    cases = [number for number, case in enumerate(CASES) if not given.ops or case.op in given.ops]
    found = page.Evidence(given.device)
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        for number, seen in enumerate(pool.map(partial(try_case, device=given.device), cases), 1):
            found.add(seen)
            _say(f"{number}/{len(cases)} cases, {len(found.wrong)} wrong")
        if given.device == "cpu":
            _compile(found, given.ops, pool)
    if (CHECKOUT / "tests" / "kernels").is_dir() and not given.ops:
        _laws(found)
        if given.device == "cuda" and (code := _python("benchmarks/kernels/run_all.py")):
            found.wrong.append(f"benchmarks/kernels/run_all.py: exit code {code}")
    print("", *found.wrong or ["all right"], sep="\n")
    if not given.ops:
        given.docs.mkdir(exist_ok=True)
        found.save(given.docs)
        (given.docs / "kernels.md").write_text(page.page(given.docs, CASES, SWEEPS, snapshot.load()))
    return int(bool(found.wrong))


def _say(text: str) -> None:
    print(f"\r{text}   ", end="", file=sys.stderr, flush=True)


def _laws(found: page.Evidence) -> None:
    """What holds whatever the input, by tests/kernels; on a GPU with the kernels' other tests."""
    which = ["-m", "law"] if found.device == "cpu" else ["--device", "cuda", "-k", "law or triton or moe or fp8"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "laws.json"
        if code := _python("-m", "pytest", "-q", "tests/kernels", *which, "--laws", str(file)):
            found.wrong.append(f"pytest tests/kernels {' '.join(which)}: exit code {code}")
        for op, laws in (json.loads(file.read_text()) if file.exists() else {}).items():
            found.laws[op] = sorted(law for law, held in laws.items() if held)
            found.wrong += [f"{op}: {law}: broken" for law, held in laws.items() if not held]


def _python(*words: str) -> int:
    return subprocess.run([sys.executable, *words], cwd=CHECKOUT).returncode


def _compile(found: page.Evidence, ops: list[str], pool: ProcessPoolExecutor) -> None:
    """All launches of all sweeps for all chips; what no launch asks for any more leaves the record."""
    known = snapshot.load()
    kept: dict[str, Compiled] = {}
    sweeps = [number for number, sweep in enumerate(SWEEPS) if not ops or sweep.op in ops]
    work = [(number, chip.name) for number in sweeps for chip in CHIPS.values()]
    started = time.monotonic()
    for done, (entries, wrong) in enumerate(pool.map(build, work), 1):
        kept |= entries
        found.wrong += wrong
        left = (time.monotonic() - started) / done * (len(work) - done)
        _say(f"{done}/{len(work)} compiled, {left:.0f} s left")
        if done % len(CHIPS) == 0:
            snapshot.save(known | kept)
    snapshot.save(known | kept if ops else kept)


if __name__ == "__main__":
    sys.exit(main())
