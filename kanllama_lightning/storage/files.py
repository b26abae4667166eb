"""Writing files so that they are there whole, or not at all."""

import contextlib
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 24
"""Bytes that are written, or read, and summed at once."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; it takes the place of `path` when the block ends.

    It is on the disk before it is renamed, so that a kill, or a machine that stops, leaves the old
    file or the new one. Its mode is the one that the umask gives, whatever the library that wrote
    it chose. A block that fails leaves `path` as it was, and nothing beside it.
    """
    part = path.with_name(path.name + ".tmp")
    try:
        part.unlink(missing_ok=True)
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        with part.open("rb+") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        part.replace(path)
        _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


class SummedFile:
    """A file that is written once, from its beginning on, and whose checksum is made meanwhile.

    What cannot be written is raised by `close`, not by `write`: some libraries that write through
    it do not expect an error there. What comes behind the error is dropped.

    Args:
        path: The file; what is in it is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._error: OSError | None = None
        self.size = 0
        self.crc32 = 0

    def write(self, data: bytes | memoryview) -> int:
        """Put all of it behind what is there; returns its number of bytes."""
        if not memoryview(data).nbytes:
            return 0
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            if self._error is None:
                self._put(view[start : start + CHUNK])
        return len(view)

    def _put(self, part: memoryview) -> None:
        try:
            self._file.write(part)
        except OSError as e:
            self._error = e
            return
        self.crc32 = zlib.crc32(part, self.crc32)
        self.size += len(part)

    def flush(self) -> None:
        """For libraries that ask for it; `close` does it."""

    def close(self) -> None:
        """Bring the rest to the file.

        Raises:
            OSError: Something could not be written, now or before.
        """
        try:
            self._file.close()
        except OSError as e:
            self._error = self._error or e
        if self._error is not None:
            number = self._error.errno or 0
            raise OSError(number, os.strerror(number), str(self._path)) from self._error


def write_text(path: Path, text: str) -> Path:
    """Replace a text file whole; line ends stay as they are in `text`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="")
    return path


def _sync(folder: Path) -> None:
    """Let a rename in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
