"""Writing files so that they are there whole, or not at all."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


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
