"""Weights & Biases, online where someone is logged in, offline otherwise; never a prompt."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger

from kanllama_lightning.console.secrets import discreet_arguments, scrubbed
from kanllama_lightning.runs.sections import by_section
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
INIT_S = 20.0
"""Seconds that the server may take to answer."""
MOST_LETTERS = 64
"""Of a tag, or of a group."""


def check_mode() -> str | None:
    """What WANDB_MODE says; None if it says nothing.

    Raises:
        InputError: It says something that W&B does not know.
    """
    mode = os.environ.get("WANDB_MODE", "").strip() or None
    if mode is not None and mode not in MODES:
        raise InputError(
            f"WANDB_MODE={mode!r}: no such mode; allowed are online, offline and disabled, or "
            "leave it unset: online where you are logged in, offline otherwise"
        )
    return mode


class RunLogger(WandbLogger):
    """A WandbLogger that never asks and never stops a run; figures by section (`sections.py`).

    Online when W&B is logged in (or WANDB_API_KEY is set), offline otherwise, as one line says;
    WANDB_MODE overrules. `tokens` is the x-axis of everything, and the step that W&B orders rows
    by: pieces of a run that was stopped and continued follow on each other, and what is logged
    again after a kill falls on its own place.

    Args:
        project: W&B project.
        save_dir: Where the `wandb` folder goes (set to the run folder).
        name: Name of the run (default: the run folder's).
        id: Id of the W&B run to go on with (set when a run is continued).
        tags: Tags of the run.
        group: Group of the run (default: the hook point and the LM: the runs that `evaluate.py
            compare` may set beside each other).
    """

    def __init__(
        self,
        project: str = "kanllama-lightning",
        save_dir: str = ".",
        name: str | None = None,
        id: str | None = None,  # noqa: A002
        tags: list[str] | None = None,
        group: str | None = None,
    ) -> None:
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # traces and advertises for itself
        mode = check_mode()
        if mode is None:
            mode = "online" if _logged_in() else "offline"
            if mode == "online":
                log.info("W&B: online")
            else:
                log.info(
                    "W&B: not logged in, or out of reach, so offline; `wandb login` and `%s` send "
                    "it later",
                    sync_command(Path(save_dir)),
                )
        super().__init__(
            project=project,
            save_dir=save_dir,
            name=name,
            id=id,
            tags=tags,
            group=group,
            resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_S),
        )
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, Lightning still passes it

    @property
    def experiment(self) -> Any:
        """The W&B run; its metrics are plotted against `tokens`."""
        fresh = self._experiment is None
        with discreet_arguments():
            try:
                run = super().experiment
            except Exception as e:  # of many kinds, from the library and its service
                if self._wandb_init.get("mode") == "offline":
                    raise
                said = (str(e).splitlines() or [type(e).__name__])[0]
                log.warning(
                    "W&B cannot be reached (%s): logging offline; `%s` sends it later",
                    scrubbed(said),
                    sync_command(Path(str(self.save_dir))),
                )
                # what was begun still holds the run's id
                wandb.teardown()
                self._wandb_init |= {"mode": "offline"}
                self._offline = True
                run = super().experiment
        if fresh and hasattr(run, "define_metric"):
            run.define_metric("tokens", hidden=True)
            run.define_metric("*", step_metric="tokens", step_sync=True)
        return run

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log figures in the row of the tokens trained on so far, under their sections.

        Args:
            metrics: By name; with `tokens` among them, that is their row.
            step: Optimizer step, logged beside them.
        """
        beside = {} if step is None else {"trainer/global_step": step}
        tokens = metrics.get("tokens")
        row = {} if tokens is None else {"step": int(tokens)}
        self.experiment.log(by_section(dict(metrics) | beside), **row)

    def group_by(self, hook_point: str, lm: str) -> None:
        """Put the run into the group of this place in this LM, if nobody named one; before it
        begins."""
        name = f"{hook_point} of {Path(lm).name}"[:MOST_LETTERS]
        self._wandb_init["group"] = self._wandb_init.get("group") or name


def sync_command(folder: Path) -> str:
    """What sends all offline pieces of a run's log, oldest first, as one run."""
    return f"wandb sync {folder}/wandb/offline-run-*"


def watch_command(run: Any) -> str | None:
    """What shows a W&B run in the terminal, without an account; None if it has no log here."""
    folder = Path(str(run.dir)).parent
    return f"wandb leet run {folder}" if any(folder.glob("*.wandb")) else None


def _logged_in() -> bool:
    """Whether a key is at hand, without asking for one or showing it."""
    try:
        return bool(wandb.login(prompt=False))
    except (OSError, wandb.errors.Error):
        return False
