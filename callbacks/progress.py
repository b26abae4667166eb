"""How a run is doing, for a person at a terminal and for a log file."""

import logging
import sys
import time
from typing import Any

import lightning as L
from tqdm import tqdm

from kanllama_lightning.console.phase import Phase
from kanllama_lightning.console.units import duration
from kanllama_lightning.runs.folder import prefixed
from kanllama_lightning.training.clock import PARTS

log = logging.getLogger(__name__)

SHOWN = {"loss": "train/loss", "L0": "train/l0", "EV": "train/ev", "dead": "train/dead_frac"}


class Progress(L.Callback):
    """A bar with loss, L0, EV, dead share, tokens/s and time left; lines without a terminal.

    Behind them, where the time of a step goes (`StepClock`); of heads side by side EV and L0. A
    validation that takes longer than seconds shows how far it is. Figures are those of the last
    logged step (`trainer.log_every_n_steps`); a line leaves out what the one before has said.

    Args:
        lines: How many lines a whole run prints into a file or pipe.
    """

    def __init__(self, lines: int = 20) -> None:
        self.lines = lines
        self._bar: Any = None
        self._validation: Phase | None = None
        self._began = (0.0, 0)
        self._said = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Open the bar."""
        if trainer.is_global_zero and sys.stderr.isatty():
            self._bar = tqdm(
                total=trainer.max_steps * pl_module.schedule.batch,
                initial=pl_module.tokens_seen,
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
                desc="training",
            )

    def on_head_started(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock after the buffer has been filled."""
        self._began = (time.perf_counter(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on."""
        step = trainer.global_step
        if not self._began[0]:
            self._began = (time.perf_counter(), step)
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            self._bar.update(pl_module.schedule.batch)
            if step % trainer.log_every_n_steps == 0:
                self._bar.set_postfix_str(self._figures(trainer, pl_module))
        elif step % max(1, trainer.max_steps // self.lines) == 0 or step == trainer.max_steps:
            seconds = time.perf_counter() - self._began[0]
            rate = (step - self._began[1]) / max(seconds, 1e-9)
            left = (trainer.max_steps - step) / max(rate, 1e-9)
            figures = self._figures(trainer, pl_module)
            new = "" if figures == self._said else f"{figures}  "
            self._said = figures
            log.info(
                "step %d/%d  %s%.0f tok/s  %s left",
                step,
                trainer.max_steps,
                new,
                rate * pl_module.schedule.batch,
                duration(left),
            )

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch before: most of its work is other callbacks', behind this one."""
        if self._validation is not None:
            self._validation.add()
            return
        total = sum(len(loader) for loader in trainer.val_dataloaders)
        self._validation = Phase("validating", total, "batches", trainer.is_global_zero)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """All batches are through."""
        self._close_validation()

    def _close_validation(self) -> None:
        if self._validation is not None:
            self._validation.close()
            self._validation = None

    @staticmethod
    def _figures(trainer: L.Trainer, pl_module: Any) -> str:
        metrics, heads = trainer.callback_metrics, pl_module.heads()
        shown = SHOWN if len(heads) == 1 else {short: SHOWN[short] for short in ("L0", "EV")}
        parts = []
        for head in heads:
            values = prefixed(head, {name: short for short, name in shown.items()})
            figures = [
                f"{short} {float(metrics[name]):.3g}"
                for name, short in values.items()
                if name in metrics
            ]
            parts.append(" ".join([head, *figures]).strip())
        shares = {part: float(metrics.get(f"time/{part}", 0.0)) for part in PARTS}
        spent = [f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.01]
        return "  ".join([*parts, f"({' '.join(spent)})" if spent else ""]).strip()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar before anything else is printed."""
        self._close_validation()
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
