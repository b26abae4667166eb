"""A callback for tests of several processes: what each of them read, and what it ended with."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch


class Spy(L.Callback):
    """Writes the token rows (or cached activations) a process read, and its final weights.

    Args:
        folder: Where to; a file per process and session.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.rows: list[list[float]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Listen to what the LM is run on in training."""
        original = pl_module._next_batch

        def listening(batches: Any) -> Any:
            batch = original(batches)
            self.rows += (batch.ids if hasattr(batch, "ids") else batch.rows).tolist()
            return batch

        pl_module._next_batch = listening

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write."""
        self.folder.mkdir(exist_ok=True)
        name = f"{trainer.world_size}-processes-{trainer.global_rank}"
        (self.folder / f"{name}.json").write_text(json.dumps(self.rows))
        torch.save(pl_module.state_dict(), self.folder / f"{name}.pt")
