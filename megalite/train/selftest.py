"""Two processes on this host that reduce a tensor over gloo, the way a two-process run would: what `doctor` tries.

Started as `python -m megalite.train.selftest RANK STORE_FILE`. They meet through a file, so no port can be taken or
blocked before the real connection between them is.
"""

import datetime
import subprocess
import sys
import tempfile
from pathlib import Path

from megalite.world import end

RANKS = 2
TIMEOUT_SECONDS = 30


def run_selftest(timeout: float = TIMEOUT_SECONDS) -> str:
    """An empty string when both ranks agree on the sum, else what went wrong (last line of the failing rank)."""
    with tempfile.TemporaryDirectory(prefix="megalite-doctor-") as folder:
        command = [sys.executable, "-m", "megalite.train.selftest"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(Path(folder) / "store")],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        problems = []
        try:
            for rank, process in enumerate(ranks):
                _, errors = process.communicate(timeout=timeout)
                if process.returncode:
                    problems.append(f"rank {rank}: {(errors.strip() or 'no message').splitlines()[-1]}")
        except subprocess.TimeoutExpired:
            problems.append(f"no answer within {timeout:g} s")
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.communicate()
    return "; ".join(problems)


def main(rank: int, store_file: str) -> int:
    import torch
    import torch.distributed as dist

    store = dist.FileStore(store_file, RANKS)
    timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
    value = torch.full((1024,), float(rank + 1))
    dist.all_reduce(value)
    dist.destroy_process_group()
    if not bool((value == RANKS * (RANKS + 1) / 2).all()):
        sys.stderr.write("the sum over ranks is wrong\n")
        return 1
    return 0


if __name__ == "__main__":
    end(main(int(sys.argv[1]), sys.argv[2]))
