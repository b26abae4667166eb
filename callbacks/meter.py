"""What every validation callback does: one metric per head and validation set, rows to CSV."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
from torchmetrics import Metric

from kanllama_lightning.functional import ranks
from kanllama_lightning.runs.folder import Table, head_folder, prefixed
from kanllama_lightning.types import ValidationBatch


class ValidationMeter(L.Callback, ABC):
    """Measures each validation batch for every head; a subclass says what.

    The figures of a set are logged as `val/<set>/<name>`, those of the first set as
    `val/<name>` as well, by which loggers have them; of several heads side by side under the name
    of the head. A validation at step s first drops rows of step s and later, so a run that was
    stopped and continued leaves neither hole nor repeat.
    """

    file: ClassVar[str | None] = None
    columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.meters: dict[str, dict[str, Metric]] = {}
        """By head and validation set."""
        self._rows: dict[str, list[dict[str, Any]]] = {}

    @abstractmethod
    def make(self, head: Any, pl_module: Any) -> Metric:
        """A fresh metric for one head and validation set."""

    @abstractmethod
    def measure(
        self, meters: Mapping[str, Any], batches: Mapping[str, ValidationBatch], pl_module: Any
    ) -> dict[str, dict[str, Any]]:
        """Update the metric of every head, and the row of each head's CSV file.

        Without step, tokens, set and batch, which are added.
        """

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begin with empty metrics."""
        names, heads = trainer.datamodule.val_names, pl_module.heads()
        self._rows = {head: [] for head in heads}
        self.meters = {
            name: {which: self.make(head, pl_module).to(pl_module.device) for which in names}
            for name, head in heads.items()
        }

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
        (which,) = {view.set_name for view in outputs.values()}
        meters = {name: meters[which] for name, meters in self.meters.items()}
        where = {
            "step": trainer.global_step,
            "tokens": pl_module.tokens_seen,
            "set": which,
            "batch": batch_idx * trainer.world_size + trainer.global_rank,
        }
        for name, row in self.measure(meters, outputs, pl_module).items():
            self._rows[name].append(where | row)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the figures, write the rows."""
        columns = ("step", "tokens", "set", "batch", *self.columns)
        for name, meters in self.meters.items():
            for i, (which, meter) in enumerate(meters.items()):
                values = meter.compute()
                of_set = {f"val/{which}/{key}": value for key, value in values.items()}
                pl_module.log_dict(prefixed(name, of_set), logger=None if i else False)
                if i == 0:
                    first = {f"val/{key}": value for key, value in values.items()}
                    pl_module.log_dict(prefixed(name, first))
            with ranks.pooled():
                rows = ranks.lists(self._rows[name])
            if self.file and trainer.is_global_zero:
                table = Table(head_folder(trainer.default_root_dir, name) / self.file, columns)
                order = {which: i for i, which in enumerate(meters)}
                rows = sorted(rows, key=lambda row: (order[row["set"]], row["batch"]))
                table.put(trainer.global_step, rows)
        pl_module.log("tokens", float(pl_module.tokens_seen))
