"""`evaluate.py list`: the runs of a folder, read without loading torch."""

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from kanllama_lightning.console.stopping import say
from kanllama_lightning.errors import InputError
from kanllama_lightning.lm.token_text import visible
from kanllama_lightning.runs.folder import CONFIG, HEAD, SUMMARY, members, read_config, read_summary
from kanllama_lightning.runs.lookup import SAVED
from kanllama_lightning.runs.seals import checkpoints
from kanllama_lightning.runs.state import Kind, look
from kanllama_lightning.storage.small_files import read_json, there

WIDTH = 80
STATES = {
    Kind.FRESH: "empty",
    Kind.DEBRIS: "debris: ended before its first checkpoint",
    Kind.RESUMABLE: "stopped, can go on",
    Kind.FINISHED: "finished",
    Kind.DAMAGED: "damaged: no whole checkpoint",
    Kind.FOREIGN: "no run",
    Kind.IN_USE: "in use",
}
HEADS = f"  {'head':<22} {'hook point':<25}{'L0':>6}{'FVU':>8}{'delta CE':>9}{'tokens':>7}"


class HeadNamed(TypedDict, total=False):
    """`head.json`, as far as it is listed."""

    head: str
    class_path: str
    provenance: dict[str, Any]


class ListedHead(NamedTuple):
    """A head of a run, as cells of text; "" where something is not known."""

    name: str
    hook_point: str
    l0: str
    fvu: str
    delta_ce: str
    """Nats per token."""
    tokens: str
    """That it was trained on."""


class ListedRun(NamedTuple):
    """A row of the list."""

    name: str
    state: str
    when: float
    """When it last changed, seconds since 1970."""
    heads: list[ListedHead]
    wrong: str
    """What cannot be read of it."""


def main(args: Sequence[str]) -> int:
    """Print the runs of `--runs_dir`; returns the exit code."""
    try:
        print(listed(_runs_dir(args)), flush=True)  # noqa: T201
    except InputError as e:
        say(f"error: {e}")
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _runs_dir(args: Sequence[str]) -> Path:
    found, given = "runs", list(args)
    while given:
        option, equals, value = given.pop(0).partition("=")
        if option != "--runs_dir":
            raise InputError(
                f"list {option}: takes no RUN; it lists all that lie in --runs_dir FOLDER "
                "(default: runs)"
            )
        if not equals:
            value = given.pop(0) if given else ""
        found = value
    if not found or not Path(found).is_dir():
        raise InputError(
            f"--runs_dir={found!r}: no such folder; give the one that runs lie in, or train a "
            "first run (`make demo`)"
        )
    return Path(found)


def listed(runs_dir: Path) -> str:
    """The runs of a folder as text of 80 columns, the newest first.

    Raises:
        InputError: The folder cannot be read.
    """
    try:
        folders = [path for path in runs_dir.iterdir() if path.is_dir()]
    except OSError as e:
        raise InputError(f"--runs_dir={str(runs_dir)!r}: cannot be read ({e.strerror})") from e
    if not folders:
        return f"{visible(str(runs_dir))} holds no run; `make demo` trains a first one"
    rows = sorted(map(read_run, folders), key=lambda row: (-row.when, row.name))
    head = f"{'run':<44} {'state':<18} {'last changed':>16}\n{HEADS}"
    return "\n".join([head, *map(_shown, rows)])


def read_run(folder: Path) -> ListedRun:
    """What there is to say of a folder; what cannot be read is named, and nothing is raised."""
    state, heads, wrong = "damaged", [], ""
    try:
        seen = look(folder)
        state = STATES[seen.kind]
        if seen.holder is not None:
            state = f"in use by {seen.holder}"
        if seen.kind == Kind.FOREIGN and there(folder / SAVED[0]):
            state = "a saved head"
        heads = _heads(folder, seen.step)
    except (InputError, OSError) as e:
        state, wrong = "damaged", str(e)
    return ListedRun(folder.name, state, _changed(folder), heads, wrong)


def _heads(folder: Path, step: int) -> list[ListedHead]:
    """The heads of a run: those it saved, or those that its configuration names."""
    summary, config = read_summary(folder), read_config(folder)
    shared = {"hook_point": config.get("lm", {}).get("hook_point")}
    batch = config.get("model", {}).get("sae_batch_tokens")
    if step and isinstance(batch, int):
        shared["tokens"] = step * batch
    own = [(one.name, one) for one in members(folder)] or [("", folder)]
    saved = [(name, one) for name, one in own if _card(one)]
    if saved:
        return [
            _head(name, _card(one), shared | (read_summary(one) or summary)) for name, one in saved
        ]
    head = config.get("model", {}).get("head")
    if not isinstance(head, dict):
        return []
    args = head.get("init_args")
    several = args.get("heads") if isinstance(args, dict) else None
    planned = several if isinstance(several, dict) else {"": head}
    return [_head(name, card, shared) for name, card in planned.items() if isinstance(card, dict)]


def _card(folder: Path) -> dict[str, Any]:
    """`head.json` of a run or of a saved head; empty where there is none."""
    path = next((p for p in (folder / HEAD / SAVED[0], folder / SAVED[0]) if there(p)), None)
    return read_json(path, HeadNamed, "copy the head anew") if path is not None else {}


def _head(name: str, card: Mapping[str, Any], known: Mapping[str, Any]) -> ListedHead:
    said = known.get("head") or card.get("head") or card.get("class_path") or ""
    kind = str(said).rpartition(".")[2] if " " not in str(said) else str(said)
    known = {**card.get("provenance", {}), **{k: v for k, v in known.items() if v is not None}}
    return ListedHead(
        f"{name}: {kind}" if name else kind,
        str(known.get("hook_point", "")),
        _number(known.get("val/l0"), "{:.1f}"),
        _number(known.get("val/fvu"), "{:.4f}"),
        _number(known.get("val/delta_ce"), "{:.5f}"),
        _count(known.get("tokens")),
    )


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, float | int) else ""


def _count(n: Any) -> str:
    """A number of tokens, short."""
    if not isinstance(n, int):
        return ""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}" if n < 1000 * size else f"{n // size:,}{unit}"
    return str(n)


def _changed(folder: Path) -> float:
    cards = [path for path in (folder / HEAD / SAVED[0], folder / SAVED[0]) if path.exists()]
    files = [*cards, folder / SUMMARY, folder / CONFIG, *checkpoints(folder)[-1:]]
    times: list[float] = []
    for path in (*files, folder):
        if path != folder or not times:
            with contextlib.suppress(OSError):
                times.append(path.stat().st_mtime)
    return max(times, default=0.0)


def _shown(run: ListedRun) -> str:
    """The lines of a run."""
    name, when = visible(run.name), time.strftime("%Y-%m-%d %H:%M", time.localtime(run.when))
    state = visible(run.state)
    lines = [f"{name:<44} {state:<18} {when:>16}"]
    if len(lines[0]) > WIDTH:
        lines = [name, f"  {state:<61} {when:>16}"]
    for head in run.heads:
        cells = [visible(cell) for cell in head]
        row = f"  {cells[0]:<22} {cells[1]:<25}"
        lines.append(f"{row}{cells[2]:>6}{cells[3]:>8}{cells[4]:>9}{cells[5]:>7}".rstrip())
    if run.wrong:
        lines += textwrap.wrap(visible(run.wrong), WIDTH - 2, initial_indent="  ",
                               subsequent_indent="  ")  # fmt: skip
    return "\n".join(lines)
