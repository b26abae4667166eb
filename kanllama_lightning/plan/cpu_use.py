"""How many cores other processes keep busy while something is timed."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
"""Since the machine started: the time of its cores by what they did; Linux alone has it."""


class CPUUse:
    """Watches from its construction on."""

    def __init__(self) -> None:
        self._since, self._every, self._own = time.monotonic(), _every(), _own()

    def others(self) -> float:
        """Cores that other processes used, on average; by the load at present where that is not
        counted."""
        if self._every is None:
            return max(0.0, os.getloadavg()[0] - 1)
        passed = max(1e-9, time.monotonic() - self._since)
        return max(0.0, ((_every() or 0.0) - self._every - (_own() - self._own)) / passed)


def _every() -> float | None:
    """Seconds that all cores were busy; None where it is not counted."""
    if not STAT.is_file():
        return None
    user, nice, system, _idle, _waiting, *rest = map(
        int, STAT.read_text().split("\n")[0].split()[1:8]
    )
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Seconds that this process and its ended children were busy."""
    return sum(os.times()[:4])
