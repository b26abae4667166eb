"""Memory that is asked for again and again stays with the process."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
SET_BY_HAND = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables of the environment by which somebody has decided already."""
KEPT_BYTES = 1 << 29
"""Size up to which freed memory is kept; glibc before 2.35 takes none above 32 MiB."""


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors on a CPU give back; returns whether it does.

    By itself glibc asks the system for every tensor above 32 MiB, such as a batch's pre-activations
    or logits, and the system fills each of its pages with zeros before it is written. Nothing
    changes where the C library is another one, or an old one.
    """
    if sys.platform != "linux" or any(name in os.environ for name in SET_BY_HAND):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES - 1)
    )
