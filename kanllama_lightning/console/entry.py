"""What every command has in common: signals, secrets, and one line for whatever ends it."""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ArgumentError

from kanllama_lightning.console.secrets import Discreet, learn, scrubbed, show_discreetly
from kanllama_lightning.console.stopping import Stopped, listening, say
from kanllama_lightning.console.units import size
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than is allowed here",
    errno.EROFS: "the disk can only be read",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EIO: "the disk reports an error",
    errno.EISDIR: "a folder is where a file should be",
    errno.ENOTDIR: "a part of the path is no folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its links go round in a circle",
}
"""Errors of the operating system that are the place's fault, and what they are called here."""
FULL = (errno.ENOSPC, errno.EDQUOT)
FEW_BYTES = 1 << 20
"""A disk with less free is full."""


class Aftermath:
    """What a command says and does when it does not end well.

    Args:
        explain: One clear message from what the argument parser says.
        stopped: What to say after a signal; nothing if this process is not the one to say it.
        place: The folder that the command writes into; None while there is none.
        onward: How to go on once the disk has room again.
        clear: Takes away what was made and holds nothing; after trouble with a disk (True) also
            what was written half.
    """

    def __init__(
        self,
        explain: Callable[[str], str],
        stopped: Callable[[Stopped], str],
        place: Callable[[], Path | None],
        onward: Callable[[], str],
        clear: Callable[[bool], None],
    ) -> None:
        self.explain, self.stopped, self.place = explain, stopped, place
        self.onward, self.clear = onward, clear

    def of(self, error: BaseException) -> tuple[int, str] | None:
        """Exit code and line for what ended a command; None if it is a fault of the program."""
        if isinstance(error, Stopped):
            return error.exit_code, self.stopped(error)
        if isinstance(error, InputError):
            return 2, f"error: {_own_words(str(error))}"
        if isinstance(error, ArgumentError):
            return 2, f"error: {self.explain(str(error))}"
        line = disk_trouble(error, self.place())
        if line is None:
            return None
        full = any(DISK[number] in line for number in FULL)
        onward = self.onward() if full else "mend that, or choose another place"
        return 2, f"error: {line}; {onward}"


def guarded(run: Callable[[], int], arguments: Sequence[str], aftermath: Aftermath) -> int:
    """Run a command; returns its exit code.

    Args:
        run: The command.
        arguments: Arguments of the command line: where secrets may be.
        aftermath: What to say and do when it does not end well.
    """
    # a log file on a full disk must not print tracebacks beside the one line that says so
    logging.raiseExceptions = False
    learn(arguments)
    sys.excepthook = show_discreetly
    for handler in logging.getLogger().handlers:
        if not any(isinstance(f, Discreet) for f in handler.filters):
            handler.addFilter(Discreet())
    with listening():
        try:
            return run()
        except BaseException as e:
            end = aftermath.of(e)
            if end is None:
                raise
            with contextlib.suppress(OSError):
                aftermath.clear(not isinstance(e, Stopped | InputError | ArgumentError))
            if end[1]:
                say(scrubbed(end[1]))
            return end[0]


def disk_trouble(error: BaseException, place: Path | None) -> str | None:
    """Where something could not be written or read, and why; None if that is not the trouble.

    Libraries hide such an error in one of their own, so those it came from are looked at too.

    Args:
        error: What ended the command.
        place: The folder that it writes into.
    """
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        number = error_number(link)
        if number in DISK:
            path = link.filename if isinstance(link, OSError) else None
            named = Path(os.fsdecode(path)) if isinstance(path, str | bytes) else None
            return _told(number, named, place)
        link = link.__cause__ or link.__context__
    # some say that writing failed, and not why
    if place is not None and "file write failed" in str(error) and _free(place) < FEW_BYTES:
        return _told(errno.ENOSPC, None, place)
    return None


def _told(number: int, path: Path | None, place: Path | None) -> str:
    where = path or place
    inside = place is not None and path is not None and place in path.parents
    named = f"{place}: {path.relative_to(place)}" if inside and place and path else f"{where}"
    if number in FULL and where is not None:
        free = f", {size(_free(where))} are free"
        return f"{named}: cannot be written ({DISK[number]}{free})"
    return f"{named}: cannot be used ({DISK[number]})"


def error_number(error: BaseException) -> int | None:
    """The operating system's number of an error; of those too that only quote it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    quoted = re.search(r"os error (\d+)|\[Errno (\d+)\]", str(error))
    return int(next(g for g in quoted.groups() if g)) if quoted else None


def _free(where: Path) -> int:
    for folder in (where, *where.parents):
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return 0


def _own_words(message: str) -> str:
    """What an error says itself, where a reading process has packed it into a traceback."""
    if message.startswith("Caught ") and "Original Traceback" in message:
        return message.rpartition("InputError: ")[2].strip()
    return message
