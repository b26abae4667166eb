"""Checkpoints on disk: sealed when whole, found out when torn."""

import logging
import os
import pickle
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict

import torch

from kanllama_lightning.run import CHECKPOINTS
from kanllama_lightning.small_files import Count, FileName, Wrong, check, read_json, write_json
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

CHUNK = 1 << 24


class Sealed(TypedDict):
    """What a seal says of a file."""

    size: Count
    crc32: Count


class Held(TypedDict):
    """What is in a `.ckpt` file, as far as going on needs it."""

    state_dict: dict[str, Any]
    optimizer_states: list[Any]
    loops: dict[str, Any]
    global_step: Count
    epoch: Count


class Written(NamedTuple):
    """A file as it was written."""

    name: str
    size: int
    crc32: int


def keep(part: Path, path: Path) -> Written:
    """Bring a file that was written beside its place into it: on the disk first, then renamed."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
        crc = _crc32(file)
    part.replace(path)
    return Written(path.name, path.stat().st_size, crc)


def _crc32(file: BinaryIO) -> int:
    crc = 0
    while chunk := file.read(CHUNK):
        crc = zlib.crc32(chunk, crc)
    return crc


def seal(checkpoint: Path, files: list[Written]) -> None:
    """Say that a checkpoint is whole, and of which files it consists. Written last, and at once."""
    listed = {file.name: {"size": file.size, "crc32": file.crc32} for file in files}
    write_json(checkpoint.with_suffix(".json"), listed)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, whole or not."""
    return sorted((folder / CHECKPOINTS).glob("step=*.ckpt"))


def remove(checkpoint: Path) -> None:
    """Take away all files of a checkpoint; its seal first, so that it is never half there."""
    checkpoint.with_suffix(".json").unlink(missing_ok=True)
    for file in checkpoint.parent.glob(f"{checkpoint.stem}.*"):
        file.unlink()


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be gone on from; None if it is whole."""
    seal_path = checkpoint.with_suffix(".json")
    if not seal_path.is_file():
        return f"{seal_path.name}, which is written last, is missing"
    try:
        listed = read_json(seal_path, dict[FileName, Sealed], "it is never gone on from")
    except InputError as e:
        return str(e)
    if checkpoint.name not in listed:
        return f"{seal_path.name} does not list it"
    for name, want in listed.items():
        path = checkpoint.with_name(name)
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != want["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {want['size']:,}"
        with path.open("rb") as file:
            crc = _crc32(file)
        if crc != want["crc32"]:
            return f"{name} is not what was written (its checksum differs)"
    return _unusable(checkpoint)


def _unusable(checkpoint: Path) -> str | None:
    """Why a file whose checksum is right is no checkpoint all the same; nothing in it is run."""
    try:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        check(held, Held)
    except Wrong as e:
        return f"{checkpoint.name} is no checkpoint of a run ({e})"
    except pickle.UnpicklingError:
        return f"{checkpoint.name} holds more than tensors and plain values: it is not opened"
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError, OSError) as e:
        said = str(e).splitlines() or [type(e).__name__]
        return f"{checkpoint.name} is no checkpoint ({said[0][:200]})"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; says so where newer ones are not."""
    torn: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        why = damage(checkpoint)
        if why is None:
            for line in torn:
                log.warning("%s; going on from %s, the one before it", line, checkpoint.name)
            return checkpoint
        torn.append(f"{checkpoint} is damaged: {why}")
    for line in torn:
        log.warning("%s", line)
    return None
