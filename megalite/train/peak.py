"""The fastest matrix product this process reaches: what MFU is measured against, instead of a data sheet's figure."""

import time

import torch

BUDGET_SECONDS = 0.3
TRIES = 3
"""Runs of each size, the fastest of which counts: the first one allocates, and other processes may disturb one."""
FASTER = 1.05
"""A size twice as large that does not gain so much is the last."""
LARGEST = {"cpu": 2048, "cuda": 8192}


def measured_matmul_peak(device: torch.device, dtype: torch.dtype, threads: int = 0) -> float:
    """FLOP/s that a step in `dtype` can hope for. `threads`: CPU threads of this process (0: as set).

    On a CPU without bf16 multiplication the engine multiplies bf16 in fp32, so the better of the two counts there. The
    ranks of a host measure at the same moment, so each gets the peak it has beside the others.
    """
    halves = device.type == "cpu" and dtype.itemsize < 4
    return max(matmul_rate(device, kind, threads) for kind in ([dtype, torch.float32] if halves else [dtype]))


def matmul_rate(device: torch.device, dtype: torch.dtype, threads: int = 0) -> float:
    """FLOP/s of the best square product in `dtype` found in about 0.3 s.

    Sizes double while that is faster and the next is expected to fit the time that is left, so slow types stay within
    it too, and what training will need is not taken before.
    """
    threads_before = torch.get_num_threads()
    if threads and device.type == "cpu":
        torch.set_num_threads(threads)
    try:
        return _best_rate(device, dtype)
    finally:
        if torch.get_num_threads() != threads_before:
            torch.set_num_threads(threads_before)


def _best_rate(device: torch.device, dtype: torch.dtype) -> float:
    deadline = time.perf_counter() + BUDGET_SECONDS
    best, size = 0.0, 256
    while True:
        left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds = min(_seconds(left, right, out) for _ in range(TRIES))
        before, best = best, max(best, 2 * size**3 / seconds)
        now = time.perf_counter()
        if best < FASTER * before:
            return best
        if size < LARGEST.get(device.type, 4096) and now + 8 * TRIES * seconds < deadline:
            size *= 2
        elif now + TRIES * seconds >= deadline:
            return best


def _seconds(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    _wait(left.device)
    started = time.perf_counter()
    torch.mm(left, right, out=out)
    _wait(left.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
