"""The tables and figures of a record, in the W&B run of the training run too."""

import re
from html import unescape
from pathlib import Path
from typing import Any, TypedDict

import pandas as pd
import plotly.graph_objects as go
import wandb

from kanllama_lightning.reports.report import EvalRun
from kanllama_lightning.runs.folder import CONFIG, LOGGER_ID, SUMMARY, around, read_logger_id
from kanllama_lightning.runs.sections import titled_section
from kanllama_lightning.runs.wandb_logger import RunLogger
from kanllama_lightning.storage.small_files import Wrong, check, read_json, there
from kanllama_lightning.types import InputError


class LoggerArgs(TypedDict, total=False):
    """What a configuration says of the logger."""

    project: str
    name: str | None
    group: str | None


MOST_ROWS = 10_000
"""Rows of a table: W&B shows no more."""


def send(run: EvalRun, config: dict[str, Any]) -> None:
    """Send what was written just now, and all figures; nothing if the run was not logged.

    Args:
        run: With its tables and figures.
        config: `config.yaml` of the training run.
    """
    # the run of heads side by side was logged as one
    folder = run.folder.absolute()
    root = folder if (folder / LOGGER_ID).is_file() else around(folder)
    logger = config.get("trainer", {}).get("logger")
    if root is None or not (root / LOGGER_ID).is_file() or not isinstance(logger, dict):
        return
    try:
        args = check(logger.get("init_args", {}), LoggerArgs, "trainer.logger.init_args")
    except Wrong as e:
        raise InputError(f"{run.folder / CONFIG}: {e}; or leave W&B out: --wandb false") from e
    # behind what was trained on, before what a longer run would add, and no piece on another
    row = (run.card.get("provenance", {}).get("tokens") or 0) + _pieces(root)
    logger = RunLogger(
        project=args.get("project", "kanllama-lightning"),
        save_dir=str(root),
        name=args.get("name") or root.name,
        id=read_logger_id(root),
        group=args.get("group"),
    )
    logger.group_by(run.lm.hook.name, run.lm.name)
    tracker = logger.experiment
    # what is beside the record goes beside it there too, under the name of its folder
    beside = run.out.relative_to(run.folder).parts[1:]
    under = "/".join([titled_section("record"), *folder.relative_to(root).parts, *beside])
    try:
        for name, table in run.tables.items():
            texts = {c: str for c in table.columns if table[c].dtype == object}
            shown = table.head(MOST_ROWS).astype(texts)
            tracker.log({f"{under}/{name}": table_of(shown)}, step=row)
        named = {f"{under}/{titled(name, f)}": f for name, f in run.figures.items()}
        tracker.log(named, step=row)
        # a report that failed may have left tables before there was any summary
        known = read_json(run.out / SUMMARY) if there(run.out / SUMMARY) else {}
        tracker.summary.update({f"{under}/{k}": v for k, v in known.items() if "/" in k})
    finally:
        tracker.finish()


def table_of(shown: pd.DataFrame) -> wandb.Table:
    """W&B's table of a frame: the same as its own, which looks at every cell to find its kind.

    That takes it ten seconds for the latents of a head; columns here are of one kind each.
    """
    table = wandb.Table(dataframe=shown.head(1))
    table.data.extend(shown.iloc[1:].to_numpy(dtype=object).tolist())
    return table


def titled(name: str, figure: go.Figure) -> str:
    """What a figure goes by: its page and its title, in letters that W&B takes."""
    words = re.sub(r"\W+", "_", unescape(figure.layout.title.text or "")).strip("_").lower()
    return f"{name.rpartition('_')[0]}_{words}" if words else name


def _pieces(folder: Path) -> int:
    """Times that something was logged for a run."""
    return sum(path.is_dir() for path in (folder / "wandb").glob("*run-*-*"))
