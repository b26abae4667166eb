"""The resolved configuration, beside the run and in the logger."""

from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from kanllama_lightning.run import CONFIG, head_folder
from kanllama_lightning.secrets import scrubbed
from kanllama_lightning.side_by_side import SideBySide, alone_config


class LogConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run folder and sends it to W&B, without secrets.

    Of heads side by side each folder gets the configuration that would train the head alone.

    Args:
        args: Of Lightning's callback.
        resolved: The configuration as it was resolved, before the run folder and what follows from
            it was filled in: as YAML that runs again as `--config`.
        kwargs: Of Lightning's callback.
    """

    def __init__(self, *args: Any, resolved: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resolved = scrubbed(resolved)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs on rank zero only."""
        root, config = Path(trainer.default_root_dir), yaml.safe_load(self.resolved)
        (root / CONFIG).write_text(self.resolved)
        together = getattr(pl_module, "together", None)
        if isinstance(together, SideBySide):
            for name in together.members:
                own = yaml.safe_dump(alone_config(config, together, name), sort_keys=False)
                (head_folder(root, name) / CONFIG).write_text(own)
        if isinstance(trainer.logger, WandbLogger):
            trainer.logger.experiment.config.update({"cli": config}, allow_val_change=True)
