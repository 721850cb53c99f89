"""Keeping freed memory for the next feature map, a setting of the process that the command line makes.

glibc returns a large block to the system when it is freed. The next block of the same size is mapped anew,
and the system fills every page of it with zeros when it is first touched: 900,000 times in the decoder and
the vocoder for 10 seconds of sound. A library must not change that for the program that imports it, so only
commands do.
"""

from __future__ import annotations

import ctypes
import os
import platform

# The parameters of mallopt in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER_TRIM = 2**31 - 1  # bytes, the largest value that mallopt takes


def keep_freed_memory() -> bool:
    """Keep freed memory in this process. Where the C library is not glibc, this does nothing.

    A large block comes from the heap, not from a mapping of its own, and the end of the heap is not returned.
    Threads share one heap, because those of their own hold no block of 64 MiB; call this before any thread is
    started. A threshold for mappings (M_MMAP_THRESHOLD) would not do: glibc limits it to 32 MiB, and feature
    maps are larger.

    Returns:
        Whether this was set. It is not where the environment has MALLOC_... or malloc's GLIBC_TUNABLES, which
        are the user's own settings.
    """
    own = any(name.startswith("MALLOC_") for name in os.environ)
    if own or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER_TRIM}
    return all(mallopt(parameter, value) for parameter, value in settings.items())
