"""Sizes and lengths of time for people."""


def size(n_bytes: float) -> str:
    """Bytes, in the unit in which the number says something."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n_bytes >= 0.1 * 2**power:
            digits = 2 if unit == "GiB" else 1
            return f"{n_bytes / 2**power:,.{digits}f} {unit}"
    return f"{n_bytes:,.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds, as minutes or hours where there are many."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
