"""Pausing Python's garbage collector while many objects are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Do not look for reference cycles in this block; a decorator, too.

    Importing PyTorch and building stages make many objects that stay, and hardly any cycle. As their number
    grows, the collector looks at all objects of the process again and again: four times, for 0.5 of 7
    seconds, until the base checkpoint is loaded (two threads of an AMD EPYC, AVX2). Memory is freed in any
    case when the last reference to it goes.

    The collector belongs to the process, so it is paused in all threads. It is on again at the end if it was
    on at the beginning, also after an error.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
