"""One case: damage a file, call the real function that reads it, say how it ended."""

import io
import os
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from kanllama_lightning.types import InputError
from tests.fuzz.damage import Edit

SECONDS = 60
"""After which a case hangs."""
COUNTS: dict[str, Counter[str]] = {}
"""How the cases of each area ended."""


class Hang(BaseException):
    """A case took too long."""


class Silent(Exception):
    """A case ended well, with a result that is no number, or without one that was there."""


class Area(NamedTuple):
    """Files of one kind, and who reads them."""

    name: str
    files: list[Path]
    damage: Callable[[bytes, list[Edit]], bytes]
    read: Callable[[], Any]
    """Raises InputError where it does not like what it finds; Silent where it should have."""


@contextmanager
def put(path: Path, data: bytes, change: Edit) -> Iterator[None]:
    """Let a file be another one for a while: mostly one of other bytes."""
    before = path.read_bytes()
    os.utime(path)
    path.unlink()
    special = change.much if change.how == 10 else -1
    try:
        if special % 40 == 0:
            path.mkdir()
        elif special % 40 == 1:
            path.symlink_to(path.name)
        elif special % 40 == 2:
            os.mkfifo(path)
        elif special % 40 != 3:
            path.write_bytes(data)
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(before)


def run(area: Area, changes: list[Edit]) -> tuple[str, str]:
    """How a case ended, in a word and at length."""
    path = area.files[changes[0].where % len(area.files)]
    data = area.damage(path.read_bytes(), changes)

    def stop(*_: Any) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    said = io.StringIO()
    try:
        with put(path, data, changes[0]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with redirect_stderr(said), redirect_stdout(io.StringIO()):
                area.read()
        word, more = "accepted", ""
    except InputError as e:
        word, more = "refused", str(e)
        if not more.strip() or "Traceback" in more:
            word = "unclear"
    except Silent as e:
        word, more = "silent", str(e)
    except Hang:
        word, more = "hang", traceback.format_exc()
    except Exception:
        word, more = "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    COUNTS.setdefault(area.name, Counter())[word] += 1
    return word, f"{path.name} was {data[:2000]!r}\n{more}"
