"""The resolved configuration, beside the run and in the logger."""

import socket
import time
from pathlib import Path
from typing import Any, TypedDict

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from kanllama_lightning.console.secrets import known, scrubbed
from kanllama_lightning.runs.folder import CONFIG, SESSIONS, head_folder
from kanllama_lightning.runs.wandb_logger import MOST_LETTERS
from kanllama_lightning.storage.files import write_text
from kanllama_lightning.storage.small_files import read_json, there, write_json
from kanllama_lightning.training.side_by_side import SideBySide, alone_config


class Sessions(TypedDict):
    """`sessions.json`."""

    sessions: list[dict[str, Any]]


class LogConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run folder and sends it to W&B, without secrets.

    Adds a session to `sessions.json`.

    Of heads side by side each folder gets the configuration that would train the head alone.

    Args:
        args: Of Lightning's callback.
        resolved: The configuration as it was resolved, before the run folder and what follows from
            it was filled in: as YAML that runs again as `--config`.
        execution: What concerns this one session of the run: its folder, what it goes on from.
        kwargs: Of Lightning's callback.
    """

    def __init__(self, *args: Any, resolved: str, execution: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resolved, self.execution = scrubbed(resolved), known.scrubbed_tree(execution)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs on rank zero only."""
        root, config = Path(trainer.default_root_dir), yaml.safe_load(self.resolved)
        write_text(root / CONFIG, self.resolved)
        self._note_session(root)
        together = getattr(pl_module, "together", None)
        if isinstance(together, SideBySide):
            for name in together.members:
                own = yaml.safe_dump(alone_config(config, together, name), sort_keys=False)
                write_text(head_folder(root, name) / CONFIG, own)
        if isinstance(trainer.logger, WandbLogger):
            run = trainer.logger.experiment
            run.config.update({"cli": config}, allow_val_change=True)
            heads = {head.title for head in pl_module.heads().values()}
            found = {*heads, pl_module.lm.hook.name, Path(pl_module.lm.name).name}
            run.tags = tuple(sorted({*(run.tags or ()), *(tag[:MOST_LETTERS] for tag in found)}))

    def _note_session(self, root: Path) -> None:
        """Add this session to those of the run."""
        path = root / SESSIONS
        remedy = "move it away, a new one is begun"
        known = read_json(path, Sessions, remedy)["sessions"] if there(path) else []
        now = {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "host": socket.gethostname()}
        write_json(path, {"sessions": [*known, now | self.execution]})
