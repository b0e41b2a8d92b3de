"""Memory that is let go of stays with the process, so that the next batch need not fetch it page by page.

The C library hands freed memory back to the system when enough of it lies at the end of its heap, and the system gives
it out again zeroed, page by page, as it is touched: 18 MB of faults for each protein of 286 residues on two threads,
a third of an 8M model's time on a CPU. A program that runs batch after batch wants it back each time.
"""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 1 << 30


def keep_memory() -> bool:
    """Asks the C library to keep freed memory, up to 1 GB of it, and to take large blocks from what it keeps.

    For the whole process, from now on: the command line calls it, a library does not. The environment variables
    MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ do the same for any program.

    Returns:
        Whether it could be asked: only glibc, on Linux.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)) & bool(mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES))
