"""`--multirun`: one job after another, each in its own processes and run folder."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from megalite.cli.job import Job
from megalite.errors import UserError


def multirun(job: Job) -> int:
    """Checks every job before the first starts. Goes on after a failed one; returns the worst exit code."""
    if "RANK" in os.environ:
        raise UserError("--multirun: not under torchrun, every rank would sweep; give --nproc-per-node N instead")
    runs = job_words(job)
    start = [sys.executable, "-m", "megalite", "train", "--nproc-per-node", str(job.processes), *job.place()]
    worst = 0
    for number, words in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {' '.join(words)}", file=sys.stderr, flush=True)
        worst = max(worst, subprocess.run([*start, *words], check=False).returncode)
    return worst


def job_words(job: Job) -> list[list[str]]:
    """The override words of each job. Raises UserError when one of them is not a good configuration."""
    from megalite.config.words import expand

    runs = []
    for words in expand(job.overrides, job.config_dir):
        config = replace(job, overrides=words).config(job.processes)
        base = config.run.dir or f"runs/{config.run.name}"
        varied = [word for word in words if word not in job.overrides]
        runs.append([*(w for w in words if not w.startswith("run.dir=")), f"run.dir={base}/{folder_name(varied)}"])
    return runs


def folder_name(words: Sequence[str]) -> str:
    """A folder name that the same words always give, so that a repeated sweep resumes its jobs."""
    plain = ",".join(words)
    name = re.sub(r"[^A-Za-z0-9_.=,+-]", "_", plain)[:90]
    return (name or "job") if name == plain else f"{name}-{hashlib.blake2b(plain.encode(), digest_size=4).hexdigest()}"
