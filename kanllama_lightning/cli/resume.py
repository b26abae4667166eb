"""Finding the checkpoint to go on from, and refusing one of another run."""

import logging
from pathlib import Path
from typing import Any

from kanllama_lightning.cli.options import fixed
from kanllama_lightning.runs.checkpoints import checkpoints, damage, newest_whole
from kanllama_lightning.runs.folder import CONFIG, around, read_config
from kanllama_lightning.runs.lookup import folder_named
from kanllama_lightning.runs.state import Kind, look, states
from kanllama_lightning.storage.lock import in_use
from kanllama_lightning.storage.named import current_paths
from kanllama_lightning.storage.small_files import from_yaml
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

FREE = (
    "ckpt_path",
    "config",
    "allow",
    "run",
    "runs_dir",
    "model.tokens",
    "model.deal_latents",
    "weights_only",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.log_every_n_steps",
    "trainer.profiler",
)
"""What may differ between a run and its continuation, with everything below it."""


def find_checkpoint(asked: Any, runs_dir: str, config: str, run: str | None, exact: bool) -> Path:
    """The checkpoint file that `--ckpt_path` means.

    Args:
        asked: `last` (the newest unfinished run of the same configuration, or the run named), a
            run by its folder or name, or a checkpoint file.
        runs_dir: Where runs are.
        config: The resolved configuration, as YAML.
        run: The run named with `--run`, if any.
        exact: Whether the configuration must be that of the run, as in training.

    Raises:
        InputError: There is none, or it belongs to another configuration or another folder than the
            one named.
    """
    last = str(asked) == "last"
    if last and run is None:
        return _newest(Path(runs_dir), config)
    path = Path(run) if run and last else Path(str(asked))
    if not last and not path.exists() and len(path.parts) == 1 and not path.suffix:
        path = folder_named(str(asked), runs_dir, "ckpt_path")
    inside = around(path)
    if inside is not None and path.suffix != ".ckpt":
        raise InputError(
            f"ckpt_path={str(asked)!r}: is a part of the run folder {inside}, and no checkpoint; "
            f"give --ckpt_path {inside}"
        )
    if path.is_dir():
        path = _newest_of(path, asked)
    elif not path.is_file():
        hint = (
            "nothing was run there; leave --ckpt_path out to start"
            if last
            else "give a checkpoint file, a run folder, or `last`"
        )
        raise InputError(f"ckpt_path={str(asked)!r}: {str(path)!r}: no such file; {hint}")
    elif torn := damage(path):
        raise InputError(
            f"ckpt_path={str(asked)!r}: this checkpoint is damaged: {torn}; give the run folder "
            f"{path.parent.parent} instead, for the newest one that is whole"
        )
    folder = path.parent.parent
    beside = folder / CONFIG
    if not beside.is_file():
        raise InputError(
            f"ckpt_path={str(asked)!r}: no {CONFIG} beside it ({beside}); a checkpoint is "
            "continued inside its run folder"
        )
    if exact:
        if run is not None and Path(run).resolve() != folder.resolve():
            raise InputError(
                f"--run {run}: the checkpoint to go on from ({path}) is of the run in {folder}, "
                "and a run goes on in its own folder; leave --run out to go on there, or "
                f"--ckpt_path to start a run in {run}"
            )
        if differences := compare(read_config(folder), config):
            listed = "\n".join(f"  {line}" for line in differences[:8])
            raise InputError(
                f"ckpt_path={str(asked)!r}: the checkpoint belongs to another configuration:\n"
                f"{listed}\nUse the run's own: --config {beside}, or start anew without --ckpt_path"
            )
    return path


def _newest_of(folder: Path, asked: Any) -> Path:
    """The newest whole checkpoint of a run."""
    found = newest_whole(folder)
    if found is None:
        state = look(folder)
        if state.holder is not None:
            raise InputError(in_use(folder, state.holder))
        anew = state.kind in (Kind.FRESH, Kind.DEBRIS)
        how = (
            "leave --ckpt_path out to start anew there"
            if anew
            else "leave --ckpt_path out and choose another --run to start anew"
        )
        raise InputError(
            f"ckpt_path={str(asked)!r}: {folder} holds no whole checkpoint to go on from; {how}"
        )
    return found


def _newest(runs_dir: Path, config: str) -> Path:
    """The newest checkpoint of the unfinished runs of a configuration."""
    known = states(runs_dir)
    unfinished = [s.folder for s in known if s.kind in (Kind.RESUMABLE, Kind.DAMAGED)]
    unfinished = [folder for folder in unfinished if checkpoints(folder)]
    unfinished.sort(key=lambda folder: checkpoints(folder)[-1].stat().st_mtime)
    near: list[str] = []
    for folder in reversed(unfinished):
        try:
            differences = compare(read_config(folder), config)
        except InputError as e:
            log.warning("%s is left out: %s", folder, e)
            continue
        if not differences:
            whole = newest_whole(folder)
            if whole is not None:
                return whole
            differences = ["nothing, but has no whole checkpoint"]
        near.append(f"  {folder} differs in {differences[0]}")
    listed = "\nUnfinished runs of other configurations:\n" + "\n".join(near) if near else ""
    others = [
        f"\n  {state.folder} {state.kind.value}" + (f" by {state.holder}" if state.holder else "")
        for state in known
        if state.kind in (Kind.IN_USE, Kind.DEBRIS)
    ]
    listed += "\nNot gone on with:" + "".join(others) if others else ""
    raise InputError(
        f"ckpt_path='last': nothing to go on with: {runs_dir}/ holds no unfinished run of this "
        f"configuration; leave --ckpt_path out to start one{listed}"
    )


def compare(saved: str | dict[str, Any], given: str) -> list[str]:
    """What differs between two configurations, beyond what may; one line each."""
    a = _flat(current_paths(from_yaml(saved) if isinstance(saved, str) else saved))
    b = _flat(from_yaml(given))
    return [
        f"{key}: {a.get(key)!r} in the run, {b.get(key)!r} now"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not _free(key)
    ]


def _free(key: str) -> bool:
    if key.startswith("trainer.") and fixed(key.split(".")[1]):
        return True  # older configurations still say it
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out or {prefix: {}}
