"""Weights & Biases, online where someone is logged in, offline otherwise; never a prompt."""

import logging
import os
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)


class RunLogger(WandbLogger):
    """A WandbLogger that never asks and never stops a run.

    Online when W&B is logged in (or WANDB_API_KEY is set), offline otherwise, as one line says;
    WANDB_MODE overrules. `tokens` is the x-axis of everything.

    Args:
        project: W&B project.
        save_dir: Where the `wandb` folder goes (set to the run folder).
        name: Name of the run; left out, the run folder's.
        id: Id of the W&B run to go on with (set when a run is continued).
        tags: Tags of the run.
    """

    def __init__(
        self,
        project: str = "kanllama-lightning",
        save_dir: str = ".",
        name: str | None = None,
        id: str | None = None,  # noqa: A002
        tags: list[str] | None = None,
    ) -> None:
        mode = os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if _logged_in() else "offline"
            log.info(
                "W&B: %s",
                "online"
                if mode == "online"
                else "not logged in, or out of reach, so offline; `wandb login` and "
                f"`wandb sync {save_dir}/wandb/offline-run-*` send it later",
            )
        super().__init__(
            project=project,
            save_dir=save_dir,
            name=name,
            id=id,
            tags=tags,
            resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, init_timeout=20),
        )
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, Lightning still passes it

    @property
    def experiment(self) -> Any:
        """The W&B run; its metrics are plotted against `tokens`."""
        fresh = self._experiment is None
        try:
            run = super().experiment
        except (wandb.errors.CommError, wandb.errors.AuthenticationError) as e:
            log.warning("W&B cannot be reached (%s): logging offline", str(e).splitlines()[0])
            self._wandb_init |= {"mode": "offline"}
            self._offline = True
            run = super().experiment
        if fresh and hasattr(run, "define_metric"):
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens", step_sync=True)
        return run


def _logged_in() -> bool:
    """Whether a key is at hand, without asking for one or showing it."""
    try:
        return bool(wandb.login(prompt=False))
    except (OSError, wandb.errors.Error):
        return False
