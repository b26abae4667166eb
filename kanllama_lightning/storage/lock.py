"""A run folder belongs to one process at a time."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Annotated, NamedTuple, TypedDict

from kanllama_lightning.errors import InputError
from kanllama_lightning.storage.small_files import Within, Wrong, check, from_json

LOCK = "run.lock"


class Holder(NamedTuple):
    """Who has a run folder, as its lock says; nothing is known of one who has just come."""

    pid: int | None
    host: str | None
    since: str | None

    def __str__(self) -> str:
        if self.pid is None:
            return "another process"
        return f"process {self.pid} on {self.host} since {self.since}"

    @property
    def here(self) -> bool:
        """Whether this machine can tell if the process is still there."""
        return self.host in (None, socket.gethostname())


class Said(TypedDict):
    """What a lock holds."""

    pid: Annotated[int, Within(1, 1 << 31)]
    host: str
    since: str


class RunLock:
    """The file `run.lock` of a folder, locked for as long as this process lives.

    The system lets go of it however the process ends; the file then stays, and says that something
    was cut short. Only where a lock is of another machine can nobody tell: that one has to be
    deleted by hand.
    """

    def __init__(self, folder: Path, file: int, was_left: bool) -> None:
        self.folder, self._file = folder, file
        self._inode = folder.stat().st_ino
        self.was_left = was_left
        """Whether a process that ended without letting go had the folder before."""

    @classmethod
    def take(cls, folder: Path) -> "RunLock":
        """Take a folder that is there.

        Raises:
            InputError: Another process has it.
        """
        path = folder / LOCK
        while True:
            was_left = path.exists()
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            locked = _try(file, fcntl.LOCK_EX)
            holder = _read(file)
            busy = locked is False or not holder.here or (locked is None and _alive(holder))
            if busy:
                os.close(file)
                raise InputError(in_use(folder, holder))
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file).st_ino == path.stat().st_ino:
                    break
            os.close(file)  # whoever had it took it away in this moment
        said = Holder(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))
        os.truncate(file, 0)
        os.pwrite(file, (json.dumps(said._asdict()) + "\n").encode(), 0)
        _held[path.resolve()] = taken = cls(folder, file, was_left)
        return taken

    @property
    def lost(self) -> bool:
        """Whether the folder, or the lock in it, is no longer the one that was taken."""
        try:
            if self.folder.stat().st_ino != self._inode:
                return True
            if not (self.folder / LOCK).exists():
                self._put_back()
            return os.fstat(self._file).st_ino != (self.folder / LOCK).stat().st_ino
        except OSError:
            return True

    def _put_back(self) -> None:
        """Make the lock again, which was deleted while the folder is this process's; OSError."""
        file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _try(file, fcntl.LOCK_EX) is False:
            os.close(file)
            return
        os.pwrite(file, os.pread(self._file, 4096, 0), 0)
        os.close(self._file)
        self._file = file

    def release(self) -> None:
        """Let go of the folder and leave nothing behind."""
        path = self.folder / LOCK
        if not self.lost:
            path.unlink()
        _held.pop(path.resolve(), None)
        os.close(self._file)


_held: dict[Path, RunLock] = {}


def holder_of(folder: Path) -> Holder | None:
    """Which process has a run folder; None if none has, or if it ended without letting go."""
    path = folder / LOCK
    mine = path.resolve() in _held  # opening and closing it again would let go of it
    if mine or not path.is_file():
        return Holder(os.getpid(), socket.gethostname(), None) if mine else None
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        locked, holder = _try(file, fcntl.LOCK_SH), _read(file)
    finally:
        os.close(file)
    if locked is False or not holder.here or (locked is None and _alive(holder)):
        return holder
    return None


def in_use(folder: Path, holder: Holder) -> str:
    """What to say of a folder that another process has."""
    by_hand = f", or delete {folder / LOCK} if that process has ended" if not holder.here else ""
    return (
        f"run folder {str(folder)!r}: in use by {holder}; wait until it has ended{by_hand}, or "
        "choose another folder with --run"
    )


def confirm_mine(folder: Path) -> None:
    """Stop before anything is written into a folder that is no longer the run's.

    Raises:
        InputError: The folder was taken by this process, and is gone.
    """
    lock = _held.get((folder / LOCK).resolve())
    if lock is not None and lock.lost:
        raise InputError(gone(folder))


def gone(folder: Path) -> str:
    """What to say of a folder that went away under its run."""
    return (
        f"run folder {str(folder)!r}: was deleted, moved or replaced while this run was using it, "
        "and nothing more was written. Start the run again; or, if the folder was moved, go on "
        "with it where it is now: --ckpt_path NEW_FOLDER"
    )


def _try(file: int, how: int) -> bool | None:
    """Whether a file could be locked; None where the file system has no locks."""
    try:
        fcntl.lockf(file, how | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _read(file: int) -> Holder:
    try:
        said = check(from_json(os.pread(file, 4096, 0).decode()), Said)
    except (Wrong, UnicodeDecodeError):
        return Holder(None, None, None)
    return Holder(said["pid"], said["host"], said["since"])


def _alive(holder: Holder) -> bool:
    if holder.pid is None or holder.pid == os.getpid():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
