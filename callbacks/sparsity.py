"""How many latents fire per token, and how often each one does."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import wandb
from lightning.pytorch.loggers import WandbLogger

from kanllama_lightning.callbacks.meter import ValidationMeter
from kanllama_lightning.measures.metrics import SparsityMetric
from kanllama_lightning.runs.folder import prefixed
from kanllama_lightning.types import ValidationBatch

BINS = np.linspace(-7, 0, 71)
"""Edges of log10 firing frequency."""


class Sparsity(ValidationMeter):
    """L0 (mean, median, p5, p95; per batch in `l0.csv`), dead and dense shares, frequencies.

    Dead: fired on none of the validation tokens (their number is logged as
    `val/sparsity_tokens`). Dense: fired on more than a tenth of them.
    """

    file = "l0.csv"
    columns = ("n_tokens", "l0")

    def make(self, head: Any, pl_module: Any) -> SparsityMetric:
        """A fresh metric."""
        return SparsityMetric(head.d_sae)

    def measure(
        self, meters: Mapping[str, Any], batches: Mapping[str, ValidationBatch], pl_module: Any
    ) -> dict[str, dict[str, Any]]:
        """Count one batch."""
        rows: dict[str, dict[str, Any]] = {}
        for name, batch in batches.items():
            meters[name].update(batch.out.codes)
            rows[name] = {"n_tokens": len(batch.x), "l0": batch.l0()}
        return rows

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Also log the histogram of firing frequencies of the first set."""
        super().on_validation_epoch_end(trainer, pl_module)
        if not isinstance(trainer.logger, WandbLogger):
            return
        for name, meters in self.meters.items():
            meter: Any = next(iter(meters.values()))
            with meter.sync_context():
                frequency = meter.frequency().cpu().numpy()
            log10 = np.log10(frequency[frequency > 0])
            histogram = wandb.Histogram(np_histogram=np.histogram(log10, BINS))
            drawn = prefixed(name, {"val/log10_frequency": histogram})
            trainer.logger.log_metrics(drawn | {"tokens": pl_module.tokens_seen})
