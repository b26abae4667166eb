"""Where the time of a training step goes."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

PARTS = ("data", "lm", "buffer", "head", "optimizer", "logging")
"""Reading and packing text; the LM up to the hook point; shuffling; the heads, forward and
backward, with their statistics; projection, clipping and Adam; Lightning, callbacks and loggers."""


class StepClock:
    """Adds up the seconds between marks, by part.

    On a GPU marks are events in its stream, read only when shares are asked for: nothing waits for
    the device between two looks.

    Args:
        cuda: Whether the work is done by a GPU.
    """

    def __init__(self, cuda: bool = False) -> None:
        self.cuda = cuda
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._before = dict.fromkeys(PARTS, 0.0)
        self._steps = 0
        self.now: Callable[[], Any] = _event if cuda else time.perf_counter
        self.marks: list[tuple[str, Any]] = []
        """Parts and when they ended, not yet added up; a step appends to it itself."""

    def mark(self, part: str) -> None:
        """The time since the last mark was spent on this part."""
        self.marks.append((part, self.now()))

    def restart(self) -> None:
        """Forget the time since the last mark: it belongs to no step (a validation, say)."""
        self._read()
        self.marks.clear()

    def reset(self) -> None:
        """Forget everything: the time before the first step is not that of steps."""
        self.restart()
        self._seconds, self._before = (dict.fromkeys(PARTS, 0.0) for _ in range(2))
        self._steps = 0

    def _read(self) -> None:
        """Turn marks into seconds; the last one stays, as the next part begins there."""
        if len(self.marks) < 2:
            return
        if self.cuda:
            self.marks[-1][1].synchronize()
        for (_, begin), (part, end) in pairwise(self.marks):
            self._seconds[part] += begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            self._steps += part == "optimizer"
        del self.marks[:-1]

    def shares(self) -> dict[str, float]:
        """Share of each part in the time since the last call, 0 to 1; empty where there is none."""
        self._read()
        found = _shares(self._seconds)
        self._before = {part: s + self._seconds[part] for part, s in self._before.items()}
        self._seconds, self._steps = dict.fromkeys(PARTS, 0.0), 0
        return found

    def rate(self) -> float | None:
        """Steps per second since the last call of `shares`; None before one has ended."""
        self._read()
        seconds = sum(self._seconds.values())
        return self._steps / seconds if self._steps and seconds else None

    def overall(self) -> dict[str, float]:
        """Share of each part in the time of all steps so far."""
        return _shares(self.state())

    def state(self) -> dict[str, float]:
        """Seconds of each part so far, for a checkpoint."""
        self._read()
        return {part: s + self._seconds[part] for part, s in self._before.items()}

    def load_(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.reset()
        self._before |= {part: s for part, s in state.items() if part in self._before}


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _shares(seconds: dict[str, float]) -> dict[str, float]:
    whole = sum(seconds.values())
    return {part: s / whole for part, s in seconds.items()} if whole else {}
