"""The resolved configuration, beside the run and in the logger."""

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from kanllama_lightning.run import CONFIG


class LogConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run folder and sends it to W&B. Configs hold no secrets."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Runs on rank zero only."""
        from pathlib import Path

        text = self.parser.dump(self.config, skip_unset=False)
        (Path(trainer.default_root_dir) / CONFIG).write_text(text)
        if isinstance(trainer.logger, WandbLogger):
            trainer.logger.experiment.config.update(
                {"cli": yaml.safe_load(text)}, allow_val_change=True
            )
