"""Everything needed to go on exactly where a run stopped."""

import logging
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from safetensors.torch import load_file, save_file

from kanllama_lightning.run import CHECKPOINTS, checkpoints
from kanllama_lightning.types import RunStopped

log = logging.getLogger(__name__)


class RunCheckpoint(L.Callback):
    """Saves head, optimizer, counters, data position and buffer: regularly, and when told to stop.

    Ctrl-C and SIGTERM let the step under way end, save and leave; a second one leaves at once.
    Checkpoints are written beside and then renamed, so none is ever half there.

    Args:
        every_n_steps: Steps between two checkpoints.
        keep: How many of the newest are kept.
        buffer: Whether the shuffled activations are saved too; without them a continued run
            refills its buffer with later text: correct, but no longer the same bit for bit.
    """

    def __init__(self, every_n_steps: int = 2000, keep: int = 2, buffer: bool = True) -> None:
        self.every_n_steps, self.keep, self.buffer = every_n_steps, keep, buffer
        self._stop: int | None = None
        self._saved_at = -1
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Listen for signals; bring the buffer back when continuing."""
        self._saved_at = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)
        if trainer.ckpt_path:
            self._restore_buffer(trainer, pl_module, Path(str(trainer.ckpt_path)))

    def _restore_buffer(self, trainer: L.Trainer, pl_module: Any, path: Path) -> None:
        sidecar = self._sidecar(path, trainer.global_rank)
        if sidecar.exists():
            pl_module.buffer.load_(load_file(sidecar))
        else:
            log.warning(
                "%s is missing: the buffer is refilled with later text, so this run will not be "
                "the same as an undisturbed one bit for bit",
                sidecar,
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None:
            raise KeyboardInterrupt
        self._stop = number
        log.warning("stopping after this step, saving first (once more: at once, not saving)")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps, validation included, all state is consistent: save here only."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 and step > self._saved_at
        if not due and self._stop is None:
            return
        if pl_module.started:
            self.save(trainer, pl_module)
        if self._stop is not None:
            raise RunStopped(self._stop, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the end, from which a run can be extended."""
        if trainer.global_step > self._saved_at:
            self.save(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Stop listening."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write a checkpoint of this moment and drop the oldest ones."""
        began = time.perf_counter()
        folder = Path(trainer.default_root_dir)
        path = folder / CHECKPOINTS / f"step={trainer.global_step:09d}.ckpt"
        path.parent.mkdir(exist_ok=True)
        if self.buffer:
            sidecar = self._sidecar(path, trainer.global_rank)
            save_file(pl_module.buffer.state(), f"{sidecar}.tmp")
            Path(f"{sidecar}.tmp").replace(sidecar)
        part = path.with_name(path.name + ".tmp")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            part.replace(path)
            for old in checkpoints(folder)[: -self.keep]:
                for file in old.parent.glob(f"{old.stem}.*"):
                    file.unlink()
        self._saved_at = trainer.global_step
        log.debug("saved %s in %.1f s", path, time.perf_counter() - began)

    @staticmethod
    def _sidecar(path: Path, rank: int) -> Path:
        return path.with_name(f"{path.stem}.rank{rank}.safetensors")
