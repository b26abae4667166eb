"""What the dictionary says in the LM's own words, as training goes on."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from kanllama_lightning.callbacks.looking import LookingCallback
from kanllama_lightning.measures.directions import FIGURES, read_directions
from kanllama_lightning.measures.metrics import Activations
from kanllama_lightning.runs.folder import Table, head_folder, prefixed
from kanllama_lightning.types import InputError

TABLE = "lens.csv"
ROWS = 4096
"""Activations of the first validation set that latents which mix in the decoder are judged over."""
JUDGED = 1024
"""Latents whose straightness is found; of a KAN decoder of Llama's size all would take minutes."""


class LogitLens(LookingCallback):
    """Skewness and kurtosis of the latents' logits over the vocabulary, and how alike latents are.

    Logs `val/lens_<figure>` and adds a row to each head's `lens.csv` at every look; firing is
    counted over the first validation set. Kurtosis is mean(z^4): 3 for a normal distribution.
    Random unit directions are the baseline. At block 0 the lens is the direct path only. The table
    per latent is that of the report `latents`.

    A look takes 8.6 TFLOP for 16,384 latents on Llama 3.2 1B, minutes on two CPU cores. A
    validation at step s first drops rows of step s and later, as all tables do.

    Args:
        every_n_validations: Validations from one look to the next; the final one always looks.
        block: Latents whose logits over the whole vocabulary exist at once.
    """

    def __init__(self, every_n_validations: int = 5, block: int = 256) -> None:
        super().__init__(every_n_validations)
        if block < 1:
            raise InputError(f"LogitLens.block={block}: must be at least 1")
        self.block = block
        self._meters: dict[str, Activations] = {}
        self._x: list[Tensor] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begin without counts and rows, where this validation looks at all."""
        super().on_validation_start(trainer, pl_module)
        heads = pl_module.heads() if self.looks else {}
        self._meters = {
            name: Activations(head.d_sae).to(pl_module.device) for name, head in heads.items()
        }
        self._x = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch of the first set; take its rows, until there are enough."""
        if not self._meters or dataloader_idx:
            return
        for name, view in outputs.items():
            self._meters[name].update(view.out.codes)
        room = ROWS - sum(len(x) for x in self._x)
        if room > 0:
            self._x.append(next(iter(outputs.values())).rows[:room])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look; log and write."""
        meters, x, self._meters, self._x = self._meters, self._x, {}, []
        if not meters:
            return
        # every process looks at the same: the counts of all of them, the rows of the first
        rows = torch.cat(x).cpu() if x else torch.zeros(0, pl_module.head.d_row)
        rows = trainer.strategy.broadcast(rows).to(pl_module.device)
        for name, meter in meters.items():
            with meter.sync_context():
                if int(meter.n):
                    self._look(trainer, pl_module, name, meter, rows)

    def _look(
        self, trainer: L.Trainer, pl_module: Any, name: str, meter: Activations, rows: Tensor
    ) -> None:
        head = pl_module.heads()[name]
        speaks = trainer.is_global_zero
        found = read_directions(
            head, pl_module.lm, meter, rows, top=0, block=self.block, judged=JUDGED, shown=speaks
        ).figures
        logged = {f"val/lens_{k}": value for k, value in found.items() if math.isfinite(value)}
        pl_module.log_dict(prefixed(name, logged) | {"tokens": float(pl_module.tokens_seen)})
        if not trainer.is_global_zero:
            return
        table = Table(
            head_folder(trainer.default_root_dir, name) / TABLE,
            ["step", "tokens", *(f"lens_{name}" for name in FIGURES)],
        )
        where = {"step": trainer.global_step, "tokens": pl_module.tokens_seen}
        row = where | {f"lens_{name}": value for name, value in found.items()}
        table.put(trainer.global_step, [row])
