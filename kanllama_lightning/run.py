"""A run's folder: where it is, what is in it, and how to find the one to go on with."""

import csv
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from kanllama_lightning.small_files import (
    Count,
    FileName,
    read_csv,
    read_json,
    read_text,
    read_yaml,
    there,
)
from kanllama_lightning.types import InputError

CONFIG, SUMMARY, CHECKPOINTS, HEAD, LOGGER_ID, EVAL = (
    "config.yaml",
    "summary.json",
    "checkpoints",
    "head",
    "wandb_id",
    "eval",
)


def make_folder(folder: Path) -> Path:
    """Make a run folder.

    Raises:
        InputError: Something on the way to it is no folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"run folder {str(folder)!r}: cannot be made ({e.strerror}: {e.filename}); choose "
            "another with --run FOLDER or --runs_dir FOLDER"
        ) from e
    if not os.access(folder, os.W_OK):
        raise InputError(f"run folder {str(folder)!r}: cannot be written to")
    return folder


def remove_unused(folder: Path) -> None:
    """Take away a run folder in which nothing was computed yet."""
    if folder.is_dir() and {p.name for p in folder.iterdir()} <= {CONFIG, LOGGER_ID}:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def prefixed(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Figures under the name of the head they are of; a head that is trained alone has none."""
    return {f"{name}/{key}" if name else key: value for key, value in values.items()}


def head_folder(root: str | Path, name: str) -> Path:
    """Where what belongs to one head of a run is kept: the run folder itself, or one inside it."""
    folder = Path(root) / name
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
    revision: str | None
    untrained: bool


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

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; floats are written so that they read back exactly."""
        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerows(rows)

    def cut(self, after_step: int) -> None:
        """Drop rows of later steps, and a last line cut short: a run goes on from before them."""
        if not self.path.exists():
            return
        cells = dict.fromkeys(self.columns, str) | {"step": int}
        remedy = "move it away, a new one is begun"
        rows = read_csv(self.path, cells, remedy, whole=False)
        kept = [row for row in rows if row["step"] <= after_step]
        part = self.path.with_name(self.path.name + ".tmp")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)
        part.replace(self.path)
