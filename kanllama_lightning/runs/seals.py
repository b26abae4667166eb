"""What seals say of checkpoints: told from the files alone, without opening what is in them."""

import re
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypedDict

from kanllama_lightning.errors import InputError
from kanllama_lightning.runs.folder import CHECKPOINTS
from kanllama_lightning.storage.files import CHUNK
from kanllama_lightning.storage.small_files import Count, FileName, read_json

NAME = re.compile(r"step=\d{9,}\.ckpt")


class Sealed(TypedDict):
    """What a seal says of a file."""

    size: Count
    crc32: Count


class Written(NamedTuple):
    """A file as it was written."""

    name: str
    size: int
    crc32: int


def written(path: Path) -> Written:
    """What a seal has to say of a file that was just written."""
    with path.open("rb") as file:
        return Written(path.name, path.stat().st_size, _crc32(file))


def _crc32(file: BinaryIO) -> int:
    crc = 0
    while chunk := file.read(CHUNK):
        crc = zlib.crc32(chunk, crc)
    return crc


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, whole or not."""
    return sorted(
        path for path in (folder / CHECKPOINTS).glob("step=*.ckpt") if NAME.fullmatch(path.name)
    )


def torn(checkpoint: Path, through: bool = True) -> str | None:
    """Why the files of a checkpoint are not what its seal says; None if they are.

    Args:
        checkpoint: Its `.ckpt` file.
        through: Whether its files are read through; if not, that they are there, as long as they
            were, has to do.
    """
    seal_path = checkpoint.with_suffix(".json")
    if not seal_path.is_file():
        return f"{seal_path.name}, which is written last, is missing"
    try:
        said = read_json(seal_path, dict[FileName, Sealed], "it is never gone on from")
    except InputError as e:
        return str(e)
    listed = {name: Written(name, file["size"], file["crc32"]) for name, file in said.items()}
    if checkpoint.name not in listed:
        return f"{seal_path.name} does not list it"
    for name, want in listed.items():
        path = checkpoint.with_name(name)
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != want.size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {want.size:,}"
        if through and written(path).crc32 != want.crc32:
            return f"{name} is not what was written (its checksum differs)"
    return None
