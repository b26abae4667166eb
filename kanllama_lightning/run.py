"""A run's folder: where it is, what is in it, and how to find the one to go on with."""

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kanllama_lightning.files import replacing, write_text
from kanllama_lightning.lock import confirm_mine
from kanllama_lightning.types import InputError

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
    path = folder / SUMMARY
    names = read_json(path).get("heads") if path.is_file() else None
    return [folder / name for name in names] if isinstance(names, list) else []


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file whole."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InputError: It does not.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as e:
        raise InputError(f"{path}: is no valid JSON ({e}); delete it, it is made anew") from e
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object; delete it, it is made anew")
    return values


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

    def _before(self, step: int) -> list[dict[str, str]]:
        """Rows of earlier steps."""
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_bytes().rpartition(b"\r\n")
        try:
            rows = list(csv.DictReader(io.StringIO(whole.decode(), newline="")))
            kept = [row for row in rows if int(row["step"]) < step]
            if any(set(row) != set(self.columns) or None in row.values() for row in kept):
                raise ValueError("rows that are not as its columns say")
        except (ValueError, KeyError, TypeError, csv.Error) as e:
            raise InputError(
                f"{self.path}: is no table with the columns {', '.join(self.columns)} ({e}); move "
                "it away, a new one is begun"
            ) from e
        return kept
