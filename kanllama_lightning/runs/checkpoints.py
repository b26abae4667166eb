"""Checkpoints on disk: sealed when whole, found out when torn."""

import logging
import pickle
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import load_file

from kanllama_lightning.data.buffer import ShuffleBuffer, dealt
from kanllama_lightning.runs.folder import CHECKPOINTS
from kanllama_lightning.runs.seals import Written, checkpoints, torn
from kanllama_lightning.storage.small_files import Count, Wrong, check, write_json

log = logging.getLogger(__name__)


class Held(TypedDict):
    """What is in a `.ckpt` file, as far as going on needs it."""

    state_dict: dict[str, Any]
    optimizer_states: list[Any]
    loops: dict[str, Any]
    global_step: Count
    epoch: Count


def seal(checkpoint: Path, files: list[Written]) -> None:
    """Say that a checkpoint is whole, and of which files it consists. Written last, and at once."""
    listed = {file.name: {"size": file.size, "crc32": file.crc32} for file in files}
    write_json(checkpoint.with_suffix(".json"), listed)


def remove(checkpoint: Path) -> None:
    """Take away all files of a checkpoint; its seal first, so that it is never half there."""
    checkpoint.with_suffix(".json").unlink(missing_ok=True)
    for file in checkpoint.parent.glob(f"{checkpoint.stem}.*"):
        file.unlink()


def remove_unsealed(folder: Path) -> None:
    """Take away what a kill left of checkpoints that were being written: of no use to anybody."""
    for file in (folder / CHECKPOINTS).glob("step=*"):
        if not file.with_name(f"{file.name.partition('.')[0]}.json").is_file():
            file.unlink()


def outdated(folder: Path, newest: Path, keep: int) -> list[Path]:
    """Checkpoints to take away once a new one is whole.

    All but the `keep` newest; and those of later steps, which a run that went on from before them
    has left behind: they would pass for its newest.
    """
    steps = checkpoints(folder)
    later = [path for path in steps if path.stem > newest.stem]
    return later + [path for path in steps if path.stem <= newest.stem][:-keep]


def buffer_file(checkpoint: Path, rank: int) -> Path:
    """Where a checkpoint keeps what one process held in its buffer."""
    return checkpoint.with_name(f"{checkpoint.stem}.rank{rank}.safetensors")


def load_buffer_(buffer: ShuffleBuffer, checkpoint: Path, rank: int, world: int) -> bool:
    """Bring a buffer back as a checkpoint keeps it, whatever number of processes wrote it.

    Returns:
        Whether the checkpoint keeps any.
    """
    n = len(list(checkpoint.parent.glob(f"{checkpoint.stem}.rank*.safetensors")))
    if n == world:
        buffer.load_(load_file(buffer_file(checkpoint, rank)))
    elif n:
        states = [load_file(buffer_file(checkpoint, r)) for r in range(n)]
        buffer.load_(dealt(states, rank, world))
    return n > 0


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be gone on from; None if it is whole.

    Args:
        checkpoint: Its `.ckpt` file, which is read through, as are those beside it.
    """
    return torn(checkpoint) or _unusable(checkpoint)


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
