"""What takes longer than seconds shows how far it is, and can be stopped between two batches."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

from kanllama_lightning.console import stopping
from kanllama_lightning.console.units import duration

log = logging.getLogger(__name__)

FIRST_S, NEXT_S = 5.0, 15.0
"""Seconds until the first line, and from one to the next; a terminal gets a bar."""
LINES = 20
"""Most lines of a phase, however long it is."""


class Phase:
    """A part of a command that goes through something batch by batch; use as a context manager.

    A bar at a terminal, and a line now and then where there is none. Every `add` is a place at
    which a signal is obeyed.

    Args:
        name: What is being done, such as "validating".
        total: How much of it there is.
        unit: What is counted, in the plural.
        shown: Whether this process speaks.
    """

    def __init__(self, name: str, total: int, unit: str, shown: bool = True) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self.began = time.perf_counter()
        self._warm: tuple[float, int] | None = None
        """When the first of it was done, and how much that was: it may hold what comes but once."""
        self._terminal = sys.stderr.isatty()
        self._shown = shown
        self._next = self.began + FIRST_S
        self._bar = tqdm(
            total=total,
            unit=f" {unit}",
            unit_scale=True,
            dynamic_ncols=True,
            desc=name,
            leave=False,
            delay=1.0,
            disable=not (shown and self._terminal),
        )

    def __enter__(self) -> "Phase":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, n: int = 1) -> None:
        """So much more is done."""
        stopping.obey()
        self.done += n
        self._bar.update(n)
        now = time.perf_counter()
        if self._warm is None:
            self._warm = now, n
            return
        if not self._shown or self._terminal or now < self._next or self.done >= self.total:
            return
        began, first = self._warm
        left = (now - began) / max(1, self.done - first) * (self.total - self.done)
        # as often as is of use for what is left, at most LINES times
        self._next = now + max(NEXT_S, (now - self.began + left) / LINES)
        log.info(
            "%s: %s of %s %s, %s left",
            self.name,
            f"{self.done:,}",
            f"{self.total:,}",
            self.unit,
            duration(left),
        )

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
