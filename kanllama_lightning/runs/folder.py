"""A run's folder: where it is, what is in it, and how to find the one to go on with."""

import csv
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from kanllama_lightning.errors import InputError
from kanllama_lightning.storage.files import replacing
from kanllama_lightning.storage.lock import confirm_mine
from kanllama_lightning.storage.small_files import (
    Count,
    FileName,
    read_csv,
    read_json,
    read_text,
    read_yaml,
    there,
)

CONFIG, SESSIONS, SUMMARY, CHECKPOINTS, HEAD, HEADS, LOGGER_ID, EVAL = (
    "config.yaml",
    "sessions.json",
    "summary.json",
    "checkpoints",
    "head",
    "heads",
    "wandb_id",
    "eval",
)


def make_folder(
    folder: Path, what: str = "run folder", other: str = "--run FOLDER or --runs_dir FOLDER"
) -> Path:
    """Make a folder.

    Args:
        folder: It may be there already.
        what: It is, for messages.
        other: How another one is chosen.

    Raises:
        InputError: Something on the way to it is no folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"{what} {str(folder)!r}: cannot be made ({e.strerror}: {e.filename}); choose "
            f"another with {other}"
        ) from e
    if not os.access(folder, os.W_OK):
        raise InputError(
            f"{what} {str(folder)!r}: cannot be written to; choose another with {other}"
        )
    return folder


def around(path: Path) -> Path | None:
    """The run folder that a path lies inside of; None if it is in none."""
    for folder in path.absolute().parents:
        if (folder / SESSIONS).is_file() and (folder / CONFIG).is_file():
            return folder
    return None


def remove_unused(folder: Path) -> None:
    """Take away a run folder in which nothing was computed yet: configurations and a W&B log."""
    if not folder.is_dir():
        return
    logs = [folder / "wandb", folder / LOGGER_ID, folder / SESSIONS]
    found = [p for p in folder.rglob("*") if not any(p == log or log in p.parents for log in logs)]
    if all(path.is_dir() or path.name == CONFIG for path in found):
        shutil.rmtree(folder, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Take away what was written half: files beside the place that they were for."""
    for part in folder.rglob("*.tmp"):
        if part.is_file():
            part.unlink(missing_ok=True)


def prefixed(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Figures under the name of the head they are of; a head that is trained alone has none."""
    return {f"{name}/{key}" if name else key: value for key, value in values.items()}


def head_folder(root: str | Path, name: str) -> Path:
    """Where what belongs to one head of a run is kept: the run folder itself, or one inside it."""
    confirm_mine(Path(root))
    folder = Path(root) / name
    if name:
        folder.mkdir(exist_ok=True)
    return folder


def members(folder: Path) -> list[Path]:
    """Folders of the heads that a run trained side by side; empty for a run of one head."""
    return [folder / name for name in read_summary(folder).get("heads", [])]


class RunSummary(TypedDict, total=False):
    """`summary.json`, as far as somebody reads it."""

    finished: bool
    heads: list[FileName]
    tokens: Count
    steps: Count
    seconds: float
    tokens_per_second: float | None


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a run; empty where there is none.

    Raises:
        InputError: It is damaged.
    """
    path = folder / SUMMARY
    remedy = f"move it away, `python train.py fit ... --ckpt_path {folder}` writes it anew"
    return read_json(path, RunSummary, remedy) if there(path) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """`config.yaml` of a run; empty where there is none.

    Raises:
        InputError: It is damaged.
    """
    path = folder / CONFIG
    return read_yaml(path, RunConfig, "mend it, or copy it anew") if there(path) else {}


def read_logger_id(folder: Path) -> str:
    """The W&B id of a run.

    Raises:
        InputError: There is none, or it is no id.
    """
    path = folder / LOGGER_ID
    remedy = "delete it, the run gets a new one"
    found = read_text(path, remedy, most=1024).strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", found):
        raise InputError(f"{path}: {found[:40]!r} is no id of a W&B run; {remedy}")
    return found


class LMConfig(TypedDict, total=False):
    """What names the LM in a configuration."""

    name: str
    hook_point: str
    input_point: str | None
    revision: str | None
    untrained: bool
    bos: int | str | None


class RunConfig(TypedDict, total=False):
    """`config.yaml`, as far as somebody reads it before the parser does."""

    lm: LMConfig
    data: dict[str, Any]
    model: dict[str, Any]
    trainer: dict[str, Any]


class Table:
    """A CSV file that grows by rows, each with the optimizer step it belongs to.

    Args:
        path: The file; its folder exists.
        columns: Names, the first of them `step`.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)

    def put(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put the rows of a step in the place of those of this step and of later ones.

        So a run that goes on from before them leaves neither hole nor repeat; a last line cut short
        goes too. The file is replaced whole; floats are written so that they read back exactly.

        Raises:
            InputError: The file is there and is no such table.
        """
        with replacing(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self._before(step))
            writer.writerows(rows)

    def _before(self, step: int) -> list[dict[str, Any]]:
        """Rows of earlier steps."""
        if not there(self.path):
            return []
        cells = dict.fromkeys(self.columns, str) | {"step": int}
        rows = read_csv(self.path, cells, "move it away, a new one is begun", whole=False)
        if rows and list(rows[0]) != self.columns:
            raise InputError(
                f"{self.path}: is no table with the columns {', '.join(self.columns)}; move it "
                "away, a new one is begun"
            )
        return [row for row in rows if row["step"] < step]
