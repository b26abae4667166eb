"""Work that comes now and then, kept within a share of the time that passes."""

import time
from typing import Any

CHECKPOINTS = 0.02
"""Share of a run's wall clock that checkpoints take at most, where nobody says how often."""
VALIDATIONS = 0.05
"""That of the validations within training, where nobody says how often."""


class TimeShare:
    """What some work takes of the wall clock, over all sessions of a run.

    Args:
        most: The share that it may take, 0 to 1.
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self.spent = 0.0
        """Seconds of it."""
        self.dearest = 0.0
        """Seconds of the dearest time; before the first what is expected, if anything."""
        self._last = 0.0
        self._before = 0.0
        self._began: float | None = None

    def begin(self) -> None:
        """A session begins."""
        self._before, self._began = self.passed(), time.monotonic()

    def passed(self) -> float:
        """Seconds of all sessions so far."""
        return self._before + (0.0 if self._began is None else time.monotonic() - self._began)

    def add(self, seconds: float) -> None:
        """It was done, and took so long."""
        self._last = 0.0
        self.add_later(seconds)

    def add_later(self, seconds: float) -> None:
        """The last time took so much more."""
        self.spent += seconds
        self._last += seconds
        self.dearest = max(self.dearest, self._last)

    def affords(self, seconds: float) -> bool:
        """Whether it stays within its share if it is done now and takes so long."""
        return self.spent + seconds <= self.most * (self.passed() + seconds)

    def taken(self) -> float:
        """The share that it has taken."""
        passed = self.passed()
        return self.spent / passed if passed else 0.0

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"spent": self.spent, "dearest": self.dearest, "passed": self.passed()}

    def load_(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; one without a state begins anew."""
        self.spent, self.dearest = state.get("spent", 0.0), state.get("dearest", 0.0)
        self._before = state.get("passed", 0.0)
