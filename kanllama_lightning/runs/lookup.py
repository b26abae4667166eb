"""From what a person calls a run, or a part of it, to its folder."""

import difflib
import logging
from pathlib import Path

from kanllama_lightning.errors import InputError
from kanllama_lightning.runs.folder import CHECKPOINTS, CONFIG, HEAD, SUMMARY, around, members
from kanllama_lightning.storage.small_files import there

log = logging.getLogger(__name__)

LAST = "last"
SAVED = ("head.json", "head.safetensors")
"""The files of a saved head."""


def folder_named(name: str, runs_dir: str, argument: str = "RUN") -> Path:
    """The folder meant: of a run, of one head of it, or of a saved head.

    Args:
        name: A folder; a file in one, which leads to its run, or to the saved head that it is of;
            `last`, the run finished last; or the name of a run in `runs_dir` or the beginning of
            just one, with what is below it: `NAME`, `NAME/kan`, `last/kan`; or a head on the hub,
            `hub://OWNER/NAME`, which is fetched into `runs_dir`.
        runs_dir: Where runs lie.
        argument: What was given, for messages.

    Raises:
        InputError: There is none, or several begin like that.
    """
    if name.startswith("hub:"):
        from kanllama_lightning.runs.from_hub import fetched

        return fetched(name, runs_dir, argument)
    path = Path(name)
    if path.is_dir() and path.name != CHECKPOINTS:
        return path
    if path.exists():
        return _leads_to(path, argument)
    inside = path.relative_to(runs_dir) if Path(runs_dir) in path.parents else path
    first, *below = inside.parts
    found = _run_called(first, name, runs_dir, argument).joinpath(*below)
    if not found.exists():
        raise InputError(
            f"{argument}={name!r}: no such folder; {found.parent} holds no {below[-1]}"
        )
    return found if found.is_dir() and found.name != CHECKPOINTS else _leads_to(found, argument)


def _run_called(name: str, given: str, runs_dir: str, argument: str) -> Path:
    if name == LAST:
        return _newest_finished(runs_dir)
    root = Path(runs_dir)
    names = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    begin = [name] if name in names else [one for one in names if one.startswith(name)]
    if len(begin) == 1:
        return root / begin[0]
    where = "" if runs_dir == "runs" else f" --runs_dir {runs_dir}"
    listed = f"`python evaluate.py list{where}` names them all"
    if begin:
        raise InputError(
            f"{argument}={given!r}: {len(begin)} runs in --runs_dir {runs_dir} begin like that: "
            f"{_some(begin)}; {listed}"
        )
    near = [one for one in names if name in one]
    near = near or difflib.get_close_matches(name, [*names, LAST], n=3, cutoff=0.5)
    hint = f" Did you mean {_some(near)}?" if near else ""
    raise InputError(
        f"{argument}={given!r}: no such folder, and no run of that name in --runs_dir {runs_dir}."
        f"{hint} Give the folder or the name of a run ({listed})"
    )


def _some(names: list[str]) -> str:
    """The newest of the names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[-3:]) + more


def _leads_to(path: Path, argument: str) -> Path:
    """The run that a file or its checkpoints are of, or the saved head that a file is of."""
    folder = path.parent
    if path.name in SAVED and path.is_file():
        of_a_run = folder.name == HEAD and any(
            there(folder.parent / name) for name in (CONFIG, SUMMARY)
        )
        return folder.parent if of_a_run else folder
    run = folder if path.name == CHECKPOINTS else around(path)
    if run is None and folder.name == CHECKPOINTS:
        run = folder.parent
    if run is None:
        raise InputError(
            f"{argument}={str(path)!r}: no such folder: a file that is in no run; give the folder "
            "of a run or of a saved head"
        )
    log.info("%s is a part of the run %s, which is taken as it ended", path, run)
    return run


def _newest_finished(runs_dir: str) -> Path:
    folders: dict[Path, float] = {}
    for path in sorted(Path(runs_dir).glob("*/")):
        try:
            if cards := _cards(path):
                folders[path] = max(card.stat().st_mtime for card in cards)
        except (InputError, OSError) as e:
            log.warning("%s is left out: %s", path, e)
    if not folders:
        raise InputError(
            f"RUN={LAST}: there is no finished run in --runs_dir {runs_dir}; train one "
            "(`make demo`) or name its folder"
        )
    return max(folders, key=lambda path: folders[path])


def _cards(folder: Path) -> list[Path]:
    """The saved heads of a run; empty if one is missing."""
    cards = [one / HEAD / SAVED[0] for one in members(folder) or [folder]]
    return cards if all(there(card) for card in cards) else []


def folders_named(name: str, runs_dir: str) -> list[Path]:
    """The folder meant, or, of a run of several heads, that of each of them."""
    folder = folder_named(name, runs_dir)
    return members(folder) or [folder]
