"""Keeps freed memory in the process, where every training step needs it again, and fills it without gaps.

glibc gives each large block back to the kernel when it is freed; the next step then pays a page fault and a cleared
page for every 4 KiB of its activations. Raising three thresholds keeps the pages, as jemalloc without decay does. And
PyTorch asks for its blocks in a way that lets none of them fit where one of its size has been (native/allocator.cpp).
"""

import ctypes
import functools
import platform
import sys

from megalite_kernels.build import allocator

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEEP_BYTES = 2**31 - 1
TOP_PAD_BYTES = 64 << 20


@functools.cache
def tune_allocator() -> str:
    """Tell glibc's malloc to serve large blocks from its heap and never to shrink it, and PyTorch to take them from it
    as they are; returns what was done.

    Takes effect for the whole process from here on; numbers are unchanged by it.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return "allocator: unchanged (tuned for glibc only)"
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEEP_BYTES), (M_TOP_PAD, TOP_PAD_BYTES))
    if not all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings):
        return "allocator: unchanged (mallopt refused; another allocator is preloaded)"
    kept = "allocator: glibc malloc keeps freed blocks (no mmap, no trim), saving page faults"
    whole = allocator()
    if whole.functions is None:
        return f"{kept}; not reused whole, because {whole.reason}"
    whole.functions.reuse_whole_blocks()
    return f"{kept}, and reuses them whole, saving memory"
