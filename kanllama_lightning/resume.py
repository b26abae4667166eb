"""Finding the checkpoint to go on from, and refusing one of another run."""

import logging
from pathlib import Path
from typing import Any

from kanllama_lightning.run import CONFIG, read_config, read_summary
from kanllama_lightning.saved import checkpoints, damage, newest_whole
from kanllama_lightning.small_files import from_yaml, there
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

FREE = (
    "ckpt_path",
    "config",
    "run",
    "runs_dir",
    "model.tokens",
    "weights_only",
    "trainer.default_root_dir",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
    "trainer.profiler",
)
"""What may differ between a run and its continuation, with everything below it."""


def find_checkpoint(asked: Any, runs_dir: str, config: str, run: str | None, exact: bool) -> Path:
    """The checkpoint file that `--ckpt_path` means.

    Args:
        asked: `last` (the newest unfinished run of the same configuration, or the run named), a
            run folder, or a checkpoint file.
        runs_dir: Where runs are.
        config: The resolved configuration, as YAML.
        run: The run named with `--run`, if any.
        exact: Whether the configuration must be that of the run.

    Raises:
        InputError: There is none, or it belongs to another configuration.
    """
    if str(asked) == "last" and run is None:
        return _newest(Path(runs_dir), config)
    path = Path(run) if run and str(asked) == "last" else Path(str(asked))
    if path.is_dir():
        found = newest_whole(path)
        if found is None:
            raise InputError(
                f"ckpt_path={str(asked)!r}: {path} holds no whole checkpoint to go on from; leave "
                "--ckpt_path out to start anew"
            )
        path = found
    elif not path.is_file():
        raise InputError(
            f"ckpt_path={str(asked)!r}: no such file; give a checkpoint file, a run folder, or "
            "`last`"
        )
    elif torn := damage(path):
        raise InputError(
            f"ckpt_path={str(asked)!r}: this checkpoint is damaged: {torn}; give the run folder "
            f"{path.parent.parent} instead, for the newest one that is whole"
        )
    beside = path.parent.parent / CONFIG
    if not beside.is_file():
        raise InputError(
            f"ckpt_path={str(asked)!r}: no {CONFIG} beside it ({beside}); a checkpoint is "
            "continued inside its run folder"
        )
    if exact:
        differences = compare(read_config(path.parent.parent), config)
        if differences:
            listed = "\n".join(f"  {line}" for line in differences[:8])
            raise InputError(
                f"ckpt_path={str(asked)!r}: the checkpoint belongs to another configuration:\n"
                f"{listed}\nUse the run's own: --config {beside}, or start anew without --ckpt_path"
            )
    return path


def _newest(runs_dir: Path, config: str) -> Path:
    unfinished: list[tuple[float, Path, dict[str, Any]]] = []
    for folder in sorted(runs_dir.iterdir()) if runs_dir.is_dir() else []:
        try:
            if there(folder / CONFIG) and checkpoints(folder) and not _finished(folder):
                saved_at = checkpoints(folder)[-1].stat().st_mtime
                unfinished.append((saved_at, folder, read_config(folder)))
        except (InputError, OSError) as e:
            log.warning("%s is left out: %s", folder, e)
    unfinished.sort(key=lambda one: one[0])
    near: list[str] = []
    for _, folder, saved in reversed(unfinished):
        differences = compare(saved, config)
        if not differences:
            whole = newest_whole(folder)
            if whole is not None:
                return whole
            differences = ["nothing, but has no whole checkpoint"]
        near.append(f"  {folder} differs in {differences[0]}")
    listed = "\nUnfinished runs of other configurations:\n" + "\n".join(near) if near else ""
    raise InputError(
        f"ckpt_path='last': nothing to go on with: {runs_dir}/ holds no unfinished run of this "
        f"configuration; leave --ckpt_path out to start one{listed}"
    )


def _finished(folder: Path) -> bool:
    return bool(read_summary(folder).get("finished"))


def compare(saved: str | dict[str, Any], given: str) -> list[str]:
    """What differs between two configurations, beyond what may; one line each."""
    a = _flat(from_yaml(saved) if isinstance(saved, str) else saved)
    b = _flat(from_yaml(given))
    return [
        f"{key}: {a.get(key)!r} in the run, {b.get(key)!r} now"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not _free(key)
    ]


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out or {prefix: {}}
