"""What the C library does with memory that is freed."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt, in malloc.h


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for its next step; it then holds its peak to the end.

    A training step asks for some 350 MB of scores and gradients and frees them. By default such a
    piece is mapped anew each time, and the kernel fills it with zeros first: 2% to 9% of a step on
    two cores. Does nothing without glibc, nor unless torch asks for large pages
    (THP_MEM_ALLOC_ENABLE=1, as the command has it): glibc before 2.38 does not find pieces again
    that are aligned in another way, and the process would grow.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
