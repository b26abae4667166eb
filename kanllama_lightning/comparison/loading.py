"""Records of runs, as `evaluate.py report` left them."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import pandas as pd

from kanllama_lightning.runs.folder import EVAL, SUMMARY
from kanllama_lightning.storage.named import name_of, shipped
from kanllama_lightning.storage.small_files import (
    Count,
    Positive,
    Within,
    read_bytes,
    read_csv,
    read_json,
    there,
)
from kanllama_lightning.types import InputError

DOCUMENTS = "documents.csv"
LOSSES = ("ce_clean", "ce_recon", "ce_zero", "ce_mean", "kl_recon", "kl_zero", "kl_mean")
SUMS = ("n_tokens", "n_targets", "l0", "e2", "x2", *LOSSES)

Sum = Annotated[float, Within(0)]
COLUMNS = {"set": str, "document": int} | dict.fromkeys(SUMS, float)
COLUMNS |= dict.fromkeys(("n_tokens", "n_targets", "l0", "e2", "x2"), Sum)
ABLATED = {"n_ablated": Sum, "ce_clean_ablated": float}
"""Columns of records since ablations may be of a part of the text; before, they were of all."""


class TokenSet(TypedDict):
    """What a record says of a set of tokens."""

    tokens: NotRequired[Count]
    ids_sha256: NotRequired[str | None]


class Recorded(TypedDict):
    """`eval/summary.json`, as far as runs are compared by it."""

    sets: dict[str, TokenSet]
    head: NotRequired[str]
    class_path: NotRequired[str]
    lm: NotRequired[str]
    revision: NotRequired[str | None]
    hook_point: NotRequired[str]
    input_point: NotRequired[str]
    dtype: NotRequired[str]
    lm_dtype: NotRequired[str | None]
    d_model: NotRequired[Positive]
    d_sae: NotRequired[Positive]
    target_l0: NotRequired[int | None]
    seed: NotRequired[int | None]
    parameters: NotRequired[Count | None]
    scale: NotRequired[float | None]
    train_tokens: NotRequired[Count | None]
    train_passes: NotRequired[float | None]
    train_tokens_per_second: NotRequired[float | None]
    train_commit: NotRequired[str | None]
    train_finished: NotRequired[bool | None]
    train_data: NotRequired[dict[str, Any] | None]
    head_sha256: NotRequired[str | None]


class Marked(TypedDict):
    """`eval/done/losses.json`, as far as it says what its files were."""

    sha256: NotRequired[dict[str, str]]


class Evaluated(NamedTuple):
    """A run, as its record describes it."""

    label: str
    folder: Path
    summary: dict[str, Any]
    """`eval/summary.json`."""
    documents: pd.DataFrame
    """`eval/documents.csv`: sums per set and document."""

    @property
    def sets(self) -> list[str]:
        """Token sets, the main one first."""
        return list(self.summary["sets"])

    def digest(self, name: str) -> str | None:
        """Digest of the tokens of a set."""
        found: str | None = self.summary["sets"].get(name, {}).get("ids_sha256")
        return found

    def figure(self, report: str, name: str, of: str) -> float | None:
        """A figure of a report, for a set where it has several; None where it is not there."""
        value = self.summary.get(f"{report}/{of}/{name}", self.summary.get(f"{report}/{name}"))
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)

    def of(self, name: str) -> pd.DataFrame:
        """Documents of a set."""
        return self.documents[self.documents["set"] == name]

    def l0(self) -> float:
        """Latents per token on the main set."""
        own = self.of(self.sets[0])
        return ratio(own["l0"].sum(), own["n_tokens"].sum())


def labelled(args: Sequence[str]) -> list[tuple[str | None, Path]]:
    """Labels and folders from the command line.

    Args:
        args: `RUN` or `LABEL=RUN`; what exists as a whole is a folder, whatever its name.

    Raises:
        InputError: A label or a folder is empty.
    """
    found: list[tuple[str | None, Path]] = []
    for arg in args:
        label, mark, folder = arg.partition("=")
        if not mark or Path(arg).exists():
            found.append((None, Path(arg)))
        elif not label.strip() or not folder:
            raise InputError(f"RUN={arg!r}: must be a folder or LABEL=FOLDER; neither may be empty")
        else:
            found.append((label.strip(), Path(folder)))
    return found


def load(
    folders: Sequence[Path],
    labels: Sequence[str | None] | None = None,
    records: Sequence[Path] | None = None,
) -> list[Evaluated]:
    """Read the records of runs.

    Args:
        folders: Run folders, each with a finished record.
        labels: What to call them; None for what distinguishes their folders.
        records: Folder of each one's record (default: its `eval/`).

    Raises:
        InputError: Fewer than two, the same one twice, or no record of losses; or labels collide.
    """
    if len(folders) < 2:
        raise InputError(f"RUN={[str(f) for f in folders]}: give at least two runs to compare")
    places = [folder.resolve() for folder in folders]
    _once("RUN", [str(p) for p in places], "name each run once")
    given = labels or [None] * len(folders)
    names = [own or made for own, made in zip(given, _labels(places), strict=True)]
    _once("LABEL", names, "give others with LABEL=RUN")
    homes = records or [folder / EVAL for folder in folders]
    return [_load(*each) for each in zip(names, folders, homes, strict=True)]


def _once(argument: str, values: Sequence[str], remedy: str) -> None:
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"{argument}={value!r}: given more than once; {remedy}")


def _load(label: str, folder: Path, record: Path) -> Evaluated:
    remedy = f"run `python evaluate.py report {folder}` first"
    path = record / SUMMARY
    if not there(path):
        raise InputError(f"RUN={str(folder)!r}: has no {path.relative_to(folder)}; {remedy}")
    summary: dict[str, Any] = read_json(path, Recorded, remedy)
    known = shipped(str(summary.get("class_path", "")))
    if known is not None:  # whatever the file of the class was called then
        summary["class_path"] = name_of(known)
    if not summary.get("sets"):
        raise InputError(f"{path}: names no token sets; {remedy}")
    table = record / DOCUMENTS
    if not there(table):
        where = table.relative_to(folder)
        raise InputError(f"RUN={str(folder)!r}: has no {where} (losses); {remedy}")
    anew = f"delete it and {remedy}"
    rows = read_csv(table, COLUMNS, anew, optional=ABLATED)
    _unchanged(table, record / "done" / "losses.json", anew)
    documents = pd.DataFrame(rows, columns=None if rows else list(COLUMNS))
    for name, before in zip(ABLATED, ("n_targets", "ce_clean"), strict=True):
        if name not in documents:
            documents[name] = documents[before]
    main = next(iter(summary["sets"]))
    if main not in set(documents["set"]):
        raise InputError(f"{table}: has no documents of the set {main!r}; {remedy}")
    return Evaluated(label, folder, summary, documents)


def _unchanged(table: Path, done: Path, remedy: str) -> None:
    """Refuse a table that is not the one its report wrote; older reports do not say."""
    said: Marked = read_json(done, Marked) if there(done) else {}
    want = said.get("sha256", {}).get(table.name)
    if want is not None and hashlib.sha256(read_bytes(table)).hexdigest() != want:
        raise InputError(f"{table}: was changed since it was made (its checksum differs); {remedy}")


def _labels(places: Sequence[Path]) -> list[str]:
    """What distinguishes folders: parts of their paths, or words of their names."""
    parts = _distinct([list(p.parts) for p in places])
    names = ["/".join(p) for p in parts]
    if all(len(p) == 1 for p in parts):
        short = ["-".join(w) for w in _distinct([name.split("-") for name in names])]
        telling = all(any(c.isalpha() for c in label) for label in short)
        names = short if telling and len(set(short)) == len(short) else names
    return names if all(names) and len(set(names)) == len(names) else [str(p) for p in places]


def _distinct(rows: list[list[str]]) -> list[list[str]]:
    """The rows without what all have: at the same place, or at the start and the end."""
    if len({len(row) for row in rows}) == 1:
        differ = [len(set(column)) > 1 for column in zip(*rows, strict=True)]
        return [[w for w, keep in zip(row, differ, strict=True) if keep] for row in rows]
    shortest, start, end = min(len(row) for row in rows), 0, 0
    while start < shortest and len({row[start] for row in rows}) == 1:
        start += 1
    while end < shortest - start and len({row[-1 - end] for row in rows}) == 1:
        end += 1
    return [row[start : len(row) - end] for row in rows]


def as_json(value: Any) -> str:
    """One text for equal values."""
    return json.dumps(value, sort_keys=True)


def ratio(top: float, bottom: float) -> float:
    """NaN where there is nothing to divide by."""
    return float(top / bottom) if bottom else math.nan


def text_of(own: pd.DataFrame) -> str:
    """Digest of which documents there are, and of their targets."""
    said = own[["document", "n_targets"]].to_csv(index=False)
    return hashlib.sha256(said.encode()).hexdigest()


FAMILY = ("class_path", "d_sae", "parameters", "train_tokens", "train_data")
"""What runs share that differ in seed and sparsity alone."""


def family_of(run: Evaluated) -> str:
    """What runs share that differ in their seed and their L0 target alone.

    Of what is not known nothing is shared: such a run is a family of its own.
    """
    found = [run.summary.get(key) for key in FAMILY]
    return as_json([*found, run.label] if None in found else found)


def kind_of(run: Evaluated) -> str:
    """What runs share that differ in their seed alone."""
    return family_of(run) + as_json(run.summary.get("target_l0"))
