"""What every validation callback does: one metric per validation set, rows to CSV, means logged."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from torchmetrics import Metric

from kanllama_lightning.run import Table
from kanllama_lightning.types import ValidationBatch


class ValidationMeter(L.Callback, ABC):
    """Measures each validation batch; a subclass says what.

    The figures of a set are logged as `val/<set>/<name>`, those of the first set as
    `val/<name>` as well. A validation at step s first drops rows of step s and later, so a run
    that was stopped and continued leaves neither hole nor repeat.
    """

    file: ClassVar[str | None] = None
    columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.meters: dict[str, Metric] = {}
        self._rows: list[dict[str, Any]] = []

    @abstractmethod
    def make(self, pl_module: Any) -> Metric:
        """A fresh metric for one validation set."""

    @abstractmethod
    def measure(self, meter: Any, batch: ValidationBatch, pl_module: Any) -> dict[str, Any]:
        """Update the metric; the batch's row of the CSV file, without step, tokens, set, batch."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begin with empty metrics."""
        self._rows = []
        names = trainer.datamodule.val_names
        self.meters = {name: self.make(pl_module).to(pl_module.device) for name in names}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure one batch."""
        row = self.measure(self.meters[outputs.set_name], outputs, pl_module)
        where = {
            "step": trainer.global_step,
            "tokens": pl_module.tokens_seen,
            "set": outputs.set_name,
            "batch": batch_idx,
        }
        self._rows.append(where | row)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the figures, write the rows."""
        for i, (name, meter) in enumerate(self.meters.items()):
            values = meter.compute()
            logged = {f"val/{name}/{key}": value for key, value in values.items()}
            if i == 0:
                logged |= {f"val/{key}": value for key, value in values.items()}
            pl_module.log_dict(logged | {"tokens": float(pl_module.tokens_seen)})
        if self.file and trainer.is_global_zero and not trainer.fast_dev_run:
            columns = ("step", "tokens", "set", "batch", *self.columns)
            table = Table(Path(trainer.default_root_dir) / self.file, columns)
            table.cut(trainer.global_step - 1)
            table.append(self._rows)
