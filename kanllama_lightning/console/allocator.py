"""Memory that is asked for again and again stays with the process."""

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES = (1 << 29, 1 << 25)
"""Sizes up to which freed memory is kept, the first that this C library takes."""


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors on a CPU give back; returns whether it does.

    By itself glibc asks the system for every tensor above 32 MiB, such as a batch's pre-activations
    or logits, and the system fills each of its pages with zeros before it is written. Nothing
    changes where the C library is another one.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = next((n for n in KEPT_BYTES if mallopt(M_MMAP_THRESHOLD, n)), None)
    return kept is not None and bool(mallopt(M_TRIM_THRESHOLD, 2 * kept - 1))
