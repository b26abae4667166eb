"""Everything needed to go on exactly where a run stopped."""

import logging
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from safetensors.torch import save_file

from kanllama_lightning.files import replacing
from kanllama_lightning.functional import ranks
from kanllama_lightning.lock import confirm_mine
from kanllama_lightning.run import CHECKPOINTS
from kanllama_lightning.saved import Written, buffer_file, outdated, remove, seal, written
from kanllama_lightning.types import InputError, RunStopped

log = logging.getLogger(__name__)


class RunCheckpoint(L.Callback):
    """Saves heads, optimizer, counters, data position and buffer: regularly, and when told to stop.

    Ctrl-C and SIGTERM let the step under way end, save and leave; a second one leaves at once.
    Files are written beside and then renamed, and a list of them with their checksums comes last:
    a checkpoint without it, or with another file than listed, is never gone on from.

    Args:
        every_n_steps: Steps between two checkpoints.
        keep: How many of the newest are kept.
        buffer: Whether the shuffled activations are saved too; without them a continued run
            refills its buffer with later text: correct, but no longer the same bit for bit.
    """

    def __init__(self, every_n_steps: int = 2000, keep: int = 2, buffer: bool = True) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise InputError(f"RunCheckpoint.{name}={value}: must be at least 1")
        self.every_n_steps, self.keep, self.buffer = every_n_steps, keep, buffer
        self._stop: int | None = None
        self._saved_at = -1
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Listen for signals."""
        self._saved_at = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None:
            raise KeyboardInterrupt
        self._stop = number
        log.warning("stopping after this step, saving first (once more: at once, not saving)")

    def _asked_to_stop(self, trainer: L.Trainer) -> int | None:
        """The signal, if any process got one: all of them have to stop at the same step."""
        if trainer.world_size == 1:
            return self._stop
        if trainer.global_step % max(1, trainer.log_every_n_steps):
            return None  # asking the others waits for them
        with ranks.pooled():
            return next((s for s in ranks.lists([self._stop]) if s is not None), None)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps, validation included, all state is consistent: save here only."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 and step > self._saved_at
        stop = self._asked_to_stop(trainer)
        if not due and stop is None:
            return
        if pl_module.started and step > self._saved_at:
            self.save(trainer, pl_module)
        if stop is not None:
            raise RunStopped(stop, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the end, from which a run can be extended."""
        if trainer.global_step > self._saved_at:
            self.save(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop listening: what comes after a stopped run is not this run's to keep."""
        self._stop_listening()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Stop listening."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write a checkpoint of this moment and drop the oldest ones.

        Raises:
            RunDiverged: Its numbers are not finite; the checkpoints there are stay.
        """
        pl_module.check_finite(everything=True)
        began = time.perf_counter()
        folder = Path(trainer.default_root_dir)
        confirm_mine(folder)
        path = folder / CHECKPOINTS / f"step={trainer.global_step:09d}.ckpt"
        path.parent.mkdir(exist_ok=True)
        if trainer.is_global_zero:  # one of this step that is not whole, if any
            path.with_suffix(".json").unlink(missing_ok=True)
        files: list[Written] = []
        if self.buffer:
            sidecar = buffer_file(path, trainer.global_rank)
            with replacing(sidecar) as part:
                save_file(pl_module.buffer.state(), part)
            files.append(written(sidecar))
        with replacing(path) if trainer.is_global_zero else nullcontext(path) as part:
            trainer.save_checkpoint(part)  # all processes together; the first one writes
        if trainer.is_global_zero:
            files.append(written(path))
        with ranks.pooled():
            files = ranks.lists(files)
        if trainer.is_global_zero:
            seal(path, files)
            for other in outdated(folder, path, self.keep):
                remove(other)
        self._saved_at = trainer.global_step
        log.debug("saved %s in %.1f s", path, time.perf_counter() - began)
