"""Everything needed to go on exactly where a run stopped."""

import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kanllama_lightning.console import stopping
from kanllama_lightning.console.entry import error_number
from kanllama_lightning.functional import ranks
from kanllama_lightning.runs.checkpoints import buffer_file, outdated, remove, seal
from kanllama_lightning.runs.folder import CHECKPOINTS
from kanllama_lightning.runs.seals import Written, written
from kanllama_lightning.storage.files import replacing
from kanllama_lightning.storage.lock import confirm_mine
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

FIRST = "stopping after this step, saving first (once more: at once, not saving)"


class RunCheckpoint(L.Callback):
    """Saves heads, optimizer, counters, data position and buffer: regularly, and when told to stop.

    A signal (`stopping`) lets the step under way end, saves and leaves; in a validation it leaves
    at once, saving what was there before it, and the continued run validates first. A second signal
    leaves without saving. Files are written beside and then renamed, and a list of them with their
    checksums comes last: a checkpoint without it, or with another file than listed, is never gone
    on from.

    Args:
        every_n_steps: Steps between two checkpoints.
        keep: How many of the newest are kept.
        buffer: Whether the shuffled activations are saved too; without them a continued run
            refills its buffer with later text: correct, but no longer the same bit for bit.
        every_n_minutes: Minutes between two checkpoints, if that comes first; 0 for steps alone.
    """

    def __init__(
        self,
        every_n_steps: int = 2000,
        keep: int = 2,
        buffer: bool = True,
        every_n_minutes: float = 10.0,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("keep", keep, 1),
            ("every_n_minutes", every_n_minutes, 0),
        ):
            if not value >= least:
                raise InputError(f"RunCheckpoint.{name}={value}: must be at least {least}")
        self.every_n_steps, self.keep, self.buffer = every_n_steps, keep, buffer
        self.every_n_minutes = every_n_minutes
        self._saved_at = -1
        self._saved_when = time.monotonic()
        self._validating = False
        self._validate_first = False

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation was under way: it is made when the run goes on."""
        return {"validating": self._validating}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._validate_first = state_dict["validating"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take the signals back from the trainer; make a validation that one ended."""
        stopping.listen_again()
        self._saved_at, self._saved_when = trainer.global_step, time.monotonic()
        if self._validate_first:
            self._validate_first = False
            _validate(trainer)
        if pl_module.started:
            stopping.hold(FIRST)

    def on_head_started(self, trainer: L.Trainer, pl_module: Any) -> None:
        """From here on there is something to save."""
        stopping.hold(FIRST)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Nothing is lost if a validation ends early; several processes end it together."""
        self._validating = trainer.state.fn == TrainerFn.FITTING
        if trainer.world_size == 1:
            stopping.release()
            stopping.obey()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Go on with steps."""
        if self._validating:
            self._validating = False
            stopping.hold(FIRST)

    def _asked(self, trainer: L.Trainer) -> tuple[int | None, bool]:
        """The signal, if any process got one, and whether a checkpoint is due by the clock: all
        processes have to stop, and save, at the same step."""
        minutes = (time.monotonic() - self._saved_when) / 60
        due = bool(self.every_n_minutes) and minutes >= self.every_n_minutes
        if trainer.world_size == 1:
            return stopping.asked(), due
        if trainer.global_step % max(1, trainer.log_every_n_steps):
            return None, False  # asking the others waits for them
        with ranks.pooled():
            heard = ranks.lists([(stopping.asked(), due)])
        return next((s for s, _ in heard if s is not None), None), any(due for _, due in heard)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps, validation included, all state is consistent: save here only."""
        step = trainer.global_step
        stop, late = self._asked(trainer)
        due = (late or step % self.every_n_steps == 0) and step > self._saved_at
        if not due and stop is None:
            return
        if pl_module.started and step > self._saved_at:
            self.save(trainer, pl_module)
        if stop is not None:
            raise stopping.Stopped(stop, step if pl_module.started else None)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the end, from which a run can be extended."""
        if trainer.global_step > self._saved_at:
            self.save(trainer, pl_module)
        stopping.release()
        stopping.obey()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save what a signal, or a file that cannot be written, in a validation would lose."""
        step, stopped = trainer.global_step, isinstance(exception, stopping.Stopped)
        unsaved = self._validating and pl_module.started and step > self._saved_at
        if unsaved and trainer.world_size == 1 and (stopped or isinstance(exception, OSError)):
            stopping.hold("saving first (once more: at once, not saving)")
            try:
                self.save(trainer, pl_module)
            except OSError as e:
                log.warning("step %d could not be saved (%s)", step, e.strerror)
        if isinstance(exception, stopping.Stopped) and self._saved_at == step > 0:
            exception.step = step
        stopping.release()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Signals end the command again."""
        stopping.release()

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write a checkpoint of this moment and drop the oldest ones.

        Raises:
            OSError: There is no room, say; nothing of it is left, and the others are as they were.
            RunDiverged: Its numbers are not finite; the checkpoints there are stay.
        """
        pl_module.check_finite(everything=True)
        folder = Path(trainer.default_root_dir)
        confirm_mine(folder)
        path = folder / CHECKPOINTS / f"step={trainer.global_step:09d}.ckpt"
        try:
            self._write(trainer, pl_module, folder, path)
        except OSError:
            if trainer.is_global_zero:
                remove(path)
            raise

    def _write(self, trainer: L.Trainer, pl_module: Any, folder: Path, path: Path) -> None:
        began = time.perf_counter()
        path.parent.mkdir(exist_ok=True)
        if trainer.is_global_zero:  # one of this step that is not whole, if any
            path.with_suffix(".json").unlink(missing_ok=True)
        files: list[Written] = []
        if self.buffer:
            sidecar = buffer_file(path, trainer.global_rank)
            with replacing(sidecar) as part:
                _save_tensors(pl_module.buffer.state(), part)
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
        self._saved_at, self._saved_when = trainer.global_step, time.monotonic()
        log.debug("saved %s in %.1f s", path, time.perf_counter() - began)


def _validate(trainer: L.Trainer) -> None:
    """Make the validation that a signal ended, as the training loop would have done."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    loop.reset_restart_stage()  # it begins anew, whatever batch it was at
    trainer.validating = True
    loop.run()
    trainer.training = True


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors; what cannot be written is an OSError with its number, as elsewhere."""
    try:
        save_file(tensors, path)
    except SafetensorError as e:
        number = error_number(e)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from e
