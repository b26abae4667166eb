"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP): obeyed in every phase of a command.

A first signal ends the command where it is, by an exception; while something is held (`hold`) it
only takes note, and whoever holds brings that to its end, saves, and leaves. A second one leaves at
once. Imports nothing of size, so that a command listens before it has loaded its libraries.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(SystemExit):
    """A signal asks the command to end; leaves with 128 + its number.

    Args:
        number: Number of the signal.
        step: Optimizer step of the checkpoint that holds all that was done; None if there is none.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(128 + number)
        self.number, self.step = number, step

    @property
    def exit_code(self) -> int:
        """128 + the signal's number."""
        return 128 + self.number


class CacheStopped(Stopped):
    """Writing a cache was interrupted; whole shards are kept.

    Args:
        number: Number of the signal.
        folder: Folder of the cache.
        rows: Activations in it.
    """

    def __init__(self, number: int, folder: Any, rows: int) -> None:
        super().__init__(number)
        self.folder, self.rows = folder, rows


class _Ear:
    """What this process listens with."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        self.owner = 0
        self.asked: int | None = None
        self.held: str | None = None


_ear = _Ear()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Obey signals inside; handlers are given back afterwards. Inside another one: nothing new."""
    if _ear.before or threading.current_thread() is not threading.main_thread():
        yield
        return
    _ear.owner, _ear.asked, _ear.held = os.getpid(), None, None
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if number == signal.SIGHUP and handler == signal.SIG_IGN:
            continue  # started with nohup: meant to outlive its terminal
        _ear.before[number] = handler
    listen_again()
    try:
        yield
    finally:
        for listened, handler in _ear.before.items():
            signal.signal(listened, handler)
        _ear.before, _ear.asked, _ear.held = {}, None, None


def listen_again() -> None:
    """Take the signals back from a library that has put its own handlers in the place of ours."""
    for number in _ear.before:
        signal.signal(number, _on_signal)


def asked() -> int | None:
    """The signal that came, if one did."""
    return _ear.asked


def hold(saying: str) -> None:
    """From now on a signal is only taken note of.

    Args:
        saying: What to tell the person who sent it: what happens first.
    """
    _ear.held = saying


def release() -> None:
    """Signals end the command again; one that came meanwhile is for whoever held to answer."""
    _ear.held = None


def obey() -> None:
    """End here if a signal came and its exception was lost in a library."""
    if _ear.asked is not None and _ear.held is None:
        raise Stopped(_ear.asked)


def _on_signal(number: int, _: FrameType | None) -> None:
    if os.getpid() != _ear.owner:
        _in_a_child(number)
        return
    if _ear.asked is not None:
        _leave(number)
    _ear.asked = number
    if _ear.held is None:
        raise Stopped(number)
    say(_ear.held)


def _in_a_child(number: int) -> None:
    """A forked reader of data: its parent tells it when to end."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _leave(number: int) -> NoReturn:
    say("left at once, without saving")
    os._exit(128 + number)


def say(line: str) -> None:
    """A line for the person at the terminal, who may have gone."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def answered(run: Callable[[], int]) -> int:
    """Run a command that obeys signals from its first line on, while it loads its libraries too."""
    with listening():
        try:
            return run()
        except Stopped as e:
            say("stopped before there was anything to save; the same command does it all")
            return e.exit_code
