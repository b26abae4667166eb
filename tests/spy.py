"""A callback for tests of several processes: what each of them read, and what it ended with."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch


class Spy(L.Callback):
    """Writes the rows a process ran the LM on, and its final weights, into a folder.

    Args:
        folder: Where to; a file per process and session.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.rows: list[list[int]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Listen to what the LM is run on in training."""
        original = pl_module._next_batch

        def listening(batches: Any) -> Any:
            tokens = original(batches)
            self.rows += tokens.ids.tolist()
            return tokens

        pl_module._next_batch = listening

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write."""
        self.folder.mkdir(exist_ok=True)
        name = f"{trainer.world_size}-processes-{trainer.global_rank}"
        (self.folder / f"{name}.json").write_text(json.dumps(self.rows))
        torch.save(pl_module.state_dict(), self.folder / f"{name}.pt")
