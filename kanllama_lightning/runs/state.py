"""Is there a run in this folder? One answer, for everything that asks."""

import enum
import logging
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from kanllama_lightning.errors import InputError
from kanllama_lightning.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    EVAL,
    HEAD,
    HEADS,
    LOGGER_ID,
    SESSIONS,
    SUMMARY,
    members,
    read_config,
    read_summary,
)
from kanllama_lightning.runs.seals import checkpoints, torn
from kanllama_lightning.storage.lock import LOCK, Holder, holder_of

log = logging.getLogger(__name__)

RESULTS = (HEAD, HEADS, SUMMARY, EVAL)
"""What nobody takes away but the one who made it."""
LEFT_OVER = (
    CONFIG,
    SESSIONS,
    LOGGER_ID,
    CHECKPOINTS,
    "baselines",
    "wandb",
    "l0.csv",
    "losses.csv",
    "lens.csv",
    "curves.csv",
    "curves.html",
)
"""What a run may have written before its first checkpoint was whole."""
SAVED = re.compile(r"step=\d{9}\..*")


class Kind(enum.Enum):
    """What a folder is to somebody who wants to run something in it."""

    FRESH = "holds no run"
    DEBRIS = "holds what a run left that ended before its first checkpoint"
    RESUMABLE = "holds a run that can be gone on with"
    FINISHED = "holds a finished run"
    DAMAGED = "holds a run without a whole checkpoint"
    FOREIGN = "holds files of something else"
    IN_USE = "is in use"


class RunState(NamedTuple):
    """What is in a folder."""

    folder: Path
    kind: Kind
    step: int = 0
    """Optimizer steps of the newest checkpoint, or of the summary where there is none."""
    tokens: int = 0
    """Tokens that the summary speaks of; 0 without one, or without the heads it speaks of."""
    summary_steps: int = 0
    """Optimizer steps that it speaks of."""
    left: tuple[str, ...] = ()
    """What DEBRIS consists of, and what is there that is FOREIGN, by name."""
    holder: Holder | None = None
    """Who has it, IN_USE."""


def look(folder: Path, mine: bool = False, was_left: bool = False) -> RunState:
    """What is in a folder; nothing is changed, and checkpoints are not read through.

    Args:
        folder: Need not exist.
        mine: Whether the lock is that of this run, and says nothing.
        was_left: Whether the lock that this process took had been left behind.

    Raises:
        InputError: Its summary cannot be read.
    """
    if not folder.is_dir():
        return RunState(folder, Kind.FRESH)
    holder = None if mine else holder_of(folder)
    if holder is not None:
        return RunState(folder, Kind.IN_USE, holder=holder)
    summary = read_summary(folder)
    whole = [path for path in checkpoints(folder) if torn(path, through=False) is None]
    step = step_of(whole[-1]) if whole else _number(summary.get("steps"))
    heads = [one / HEAD / "head.json" for one in members(folder) or [folder]]
    saved = all(head.is_file() for head in heads)
    state = RunState(folder, Kind.FRESH, step)
    if saved:
        tokens, steps = _number(summary.get("tokens")), _number(summary.get("steps"))
        state = state._replace(tokens=tokens, summary_steps=steps)
    if summary.get("finished") is True and saved and _covers(summary, step, _budget(folder)):
        return state._replace(kind=Kind.FINISHED)
    if whole:
        return state._replace(kind=Kind.RESUMABLE)
    sealed = any((folder / CHECKPOINTS).glob("step=*.json"))
    if (
        sealed
        or len(checkpoints(folder)) > 1
        or any((one / name).exists() for name in RESULTS for one in _parts(folder))
    ):
        return state._replace(kind=Kind.DAMAGED)
    left = _left(folder)
    ours = was_left or not mine and (folder / LOCK).exists() or _is_ours(folder)
    if left and ours:
        return state._replace(kind=Kind.DEBRIS, left=left)
    other = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if other and not ours:
        return state._replace(kind=Kind.FOREIGN, left=tuple(other))
    return state


def _is_ours(folder: Path) -> bool:
    """Whether files are there that only a run of this program writes."""
    saved = folder / CHECKPOINTS
    if saved.is_dir() and any(SAVED.fullmatch(path.name) for path in saved.iterdir()):
        return True
    return (folder / SESSIONS).is_file() or (folder / LOGGER_ID).is_file()


def clear(state: RunState) -> None:
    """Take away debris, by name, and nothing else."""
    for name in state.left:
        path = state.folder / name
        if path.name == CHECKPOINTS:
            for file in path.iterdir():
                if SAVED.fullmatch(file.name):
                    file.unlink()
            if not any(path.iterdir()):
                path.rmdir()
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for part in {(state.folder / name).parent for name in state.left} - {state.folder}:
        if not any(part.iterdir()):
            part.rmdir()


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint was saved after."""
    return int(checkpoint.stem.removeprefix("step="))


def states(runs_dir: Path) -> list[RunState]:
    """Every folder of `runs_dir`; one that cannot be read is named and left out."""
    found = []
    for folder in sorted(runs_dir.iterdir()) if runs_dir.is_dir() else []:
        if not folder.is_dir():
            continue
        try:
            found.append(look(folder))
        except (InputError, OSError) as e:
            log.warning("%s is left out: %s", folder, e)
    return found


def _parts(folder: Path) -> list[Path]:
    """The folder, and those of heads side by side."""
    return [folder, *(path.parent for path in sorted(folder.glob(f"*/{CONFIG}")))]


def _left(folder: Path) -> tuple[str, ...]:
    names = []
    for part in _parts(folder):
        for path in sorted(part.iterdir()):
            if path.name in LEFT_OVER or path.name.removesuffix(".tmp") in LEFT_OVER:
                names.append(str(path.relative_to(folder)))
    return tuple(names)


def _covers(summary: dict[str, Any], step: int, budget: int) -> bool:
    """Whether a summary is of the end: a run that is being extended has been further since."""
    return _number(summary.get("steps")) >= step and _number(summary.get("tokens")) >= budget


def _budget(folder: Path) -> int:
    """`model.tokens` of the run; 0 if it does not say."""
    return _number(read_config(folder).get("model", {}).get("tokens"))


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
