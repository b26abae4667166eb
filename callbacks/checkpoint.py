"""Everything needed to go on exactly where a run stopped."""

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from kanllama_lightning.console import stopping
from kanllama_lightning.console.units import duration
from kanllama_lightning.functional import ranks
from kanllama_lightning.runs.checkpoints import (
    buffer_file,
    outdated,
    remove,
    remove_unsealed,
    seal,
)
from kanllama_lightning.runs.folder import CHECKPOINTS
from kanllama_lightning.runs.saving import (
    Capture,
    Writer,
    arrived,
    copied,
    write_state,
    write_tensors,
)
from kanllama_lightning.runs.seals import Written
from kanllama_lightning.runs.time_share import CHECKPOINTS as SHARE
from kanllama_lightning.runs.time_share import TimeShare
from kanllama_lightning.storage.lock import confirm_mine
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

FIRST = "stopping after this step, saving first (once more: at once, not saving)"
MINUTES = 5.0
"""Minutes between two checkpoints, where nobody says how often."""
STEPS = 20_000
"""Steps between two, if they come first."""


class RunCheckpoint(L.Callback):
    """Saves heads, optimizer, counters, data position and buffer: regularly, and when told to stop.

    At a step a copy is taken, in the host's memory, and training goes on; a thread writes the files
    beside their places and renames them, and a list of them with their checksums comes last: a
    checkpoint without it, or with another file than listed, is never gone on from. One is written
    at a time; the end of training and a signal wait for it, and what goes wrong in the thread ends
    the run. Where nobody says how often, one comes every 5 minutes or 20,000 steps, or later where
    all of them would take more than 2 % of the time.

    A signal (`stopping`) lets the step under way end, saves and leaves; in a validation it leaves
    at once, saving what was there before it, and the continued run validates first. A second signal
    leaves without saving.

    Args:
        every_n_steps: Steps between two checkpoints, whatever they cost.
        keep: How many of the newest are kept.
        buffer: Whether the shuffled activations are saved too; without them a continued run
            refills its buffer with later text: correct, but no longer the same bit for bit.
        every_n_minutes: Minutes between two, whatever they cost; beside `every_n_steps`: if that
            comes first. 0 for steps alone.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        keep: int = 2,
        buffer: bool = True,
        every_n_minutes: float | None = None,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("keep", keep, 1),
            ("every_n_minutes", every_n_minutes, 0),
        ):
            if value is not None and not value >= least:
                raise InputError(f"RunCheckpoint.{name}={value}: must be at least {least}")
        self.every_n_steps, self.keep, self.buffer = every_n_steps, keep, buffer
        self.every_n_minutes = every_n_minutes
        self.paced = every_n_steps is None and every_n_minutes is None
        """Whether nobody says how often."""
        self.share = TimeShare(SHARE)
        self._writer = Writer()
        self._pending: tuple[Path, list[Written]] | None = None
        """What the writer is at, and what this process has written of it."""
        self._saved_at = -1
        self._saved_when = time.monotonic()
        self._validating = False
        self._validate_first = False

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation was under way: it is made when the run goes on; times."""
        return {
            "validating": self._validating,
            "share": self.share.state(),
            "writing": self._writer.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._validate_first = state_dict["validating"]
        self.share.load_(state_dict.get("share", {}))
        self._writer.seconds = state_dict.get("writing", 0.0)

    def _cadence(self) -> str:
        """How often, in words."""
        if self.paced:
            return f"{MINUTES:g} minutes or {STEPS:,} steps, at most {SHARE:.0%} of the time"
        steps = f"{self.every_n_steps:,} steps" if self.every_n_steps else ""
        minutes = self._minutes()
        timed = f"{minutes:g} minutes" if minutes else ""
        said = " or ".join(part for part in (timed, steps) if part)
        return f"{said or 'end of a training'}, whatever they take (RunCheckpoint's settings)"

    def _minutes(self) -> float:
        """Minutes between two; 0 where the clock does not matter."""
        return MINUTES if self.every_n_minutes is None else self.every_n_minutes

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take the signals back from the trainer; make a validation that one ended."""
        stopping.listen_again()
        self._saved_at, self._saved_when = trainer.global_step, time.monotonic()
        self.share.begin()
        log.info("checkpoints: every %s", self._cadence())
        if trainer.is_global_zero:
            remove_unsealed(Path(trainer.default_root_dir))
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

    def _late(self, step: int) -> bool:
        """Whether a checkpoint is due by this process's clock."""
        minutes = (time.monotonic() - self._saved_when) / 60
        # what the thread takes of a processor, the steps on a CPU lack
        self.share.add_later(self._writer.cpu_seconds())
        if self.paced:
            long = minutes >= MINUTES or step - self._saved_at >= STEPS
            # the end is saved too and waited for, and may take longer than the one before
            ours, waits = self.share.dearest, self._writer.seconds
            return long and self.share.affords(2 * (ours + waits)) and not self._writer.busy
        return bool(self._minutes()) and minutes >= self._minutes()

    def _asked(self, trainer: L.Trainer) -> tuple[int | None, bool]:
        """The signal, if any process got one, and whether a checkpoint is due by the clock: all
        processes have to stop, and save, at the same step."""
        late = self._late(trainer.global_step)
        if trainer.world_size == 1:
            self._writer.check()
            return stopping.asked(), late
        if trainer.global_step % max(1, trainer.log_every_n_steps):
            return None, False  # asking the others waits for them
        with ranks.pooled():
            heard = ranks.lists([(stopping.asked(), late, self._writer.busy)])
        if not any(busy for _, _, busy in heard):
            self.finish(trainer)
        return next((s for s, _, _ in heard if s is not None), None), any(d for _, d, _ in heard)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps, validation included, all state is consistent: save here only."""
        step = trainer.global_step
        stop, late = self._asked(trainer)
        counted = self.every_n_steps is not None and step % self.every_n_steps == 0
        due = (late or counted) and step > self._saved_at
        if not due and stop is None:
            return
        if pl_module.started and step > self._saved_at:
            self.save(trainer, pl_module)
        if stop is not None:
            self.finish(trainer)
            raise stopping.Stopped(stop, step if pl_module.started else None)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the end, from which a run can be extended."""
        if trainer.global_step > self._saved_at:
            self.save(trainer, pl_module)
        began = time.perf_counter()
        self.finish(trainer)
        self.share.add_later(time.perf_counter() - began + self._writer.cpu_seconds())
        stopping.release()
        stopping.obey()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save what a signal, or a file that cannot be written, in a validation would lose."""
        step, stopped = trainer.global_step, isinstance(exception, stopping.Stopped)
        alone = trainer.world_size == 1
        whole = self._finish_quietly(trainer) if alone else False
        unsaved = self._validating and pl_module.started and step > self._saved_at
        if unsaved and alone and (stopped or isinstance(exception, OSError)):
            stopping.hold("saving first (once more: at once, not saving)")
            try:
                self.save(trainer, pl_module)
            except OSError as e:
                log.warning("step %d could not be saved (%s)", step, e.strerror)
            else:
                whole = self._finish_quietly(trainer)
        if isinstance(exception, stopping.Stopped) and self._saved_at == step > 0 and whole:
            exception.step = step
        stopping.release()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Signals end the command again; nothing is written any more."""
        self._finish_quietly(trainer)
        stopping.release()

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take a copy of this moment and begin to write it, once the one before is whole.

        Raises:
            OSError: The one before could not be written (there is no room, say): nothing of it is
                left, and the others are as they were. Of this one, `finish` or the next step says
                so.
            RunDiverged: Its numbers are not finite; the checkpoints there are stay.
        """
        began = time.perf_counter()
        self.finish(trainer)
        pl_module.check_finite(everything=True)
        folder = Path(trainer.default_root_dir)
        confirm_mine(folder)
        path = folder / CHECKPOINTS / f"step={trainer.global_step:09d}.ckpt"
        path.parent.mkdir(exist_ok=True)
        if trainer.is_global_zero:  # one of this step that is not whole, if any
            path.with_suffix(".json").unlink(missing_ok=True)
        files: list[Written] = []
        self._writer.start(self._job(trainer, pl_module, path, files))
        self._pending = path, files
        self._saved_at, self._saved_when = trainer.global_step, time.monotonic()
        self.share.add(time.perf_counter() - began)

    def _job(
        self, trainer: L.Trainer, pl_module: Any, path: Path, files: list[Written]
    ) -> Callable[[], None]:
        """Copy this moment; what is returned writes it, and says in `files` what it wrote."""
        began = time.perf_counter()
        first, alone = trainer.is_global_zero, trainer.world_size == 1
        held = copied(pl_module.buffer.state()) if self.buffer else None
        sidecar = buffer_file(path, trainer.global_rank)
        strategy, capture = trainer.strategy, Capture()
        usual, strategy.checkpoint_io = strategy.checkpoint_io, capture
        try:
            trainer.save_checkpoint(path)  # all processes together
        finally:
            strategy.checkpoint_io = usual
        wait, paused = arrived(), time.perf_counter() - began

        def write() -> None:
            began = time.perf_counter()
            try:
                wait()
                if held is not None:
                    files.append(write_tensors(held, sidecar))
                if capture.state is not None:
                    files.append(write_state(capture.state, path))
                if alone:
                    self._seal(path, files)
            except BaseException:
                if first:
                    remove(path)
                raise
            passed = time.perf_counter() - began
            log.debug("saved %s in %s, copied in %s", path, duration(passed), duration(paused))

        return write

    def _seal(self, path: Path, files: list[Written]) -> None:
        """Say that a checkpoint is whole, and take outdated ones away."""
        seal(path, files)
        for other in outdated(path.parent.parent, path, self.keep):
            remove(other)

    def finish(self, trainer: L.Trainer) -> None:
        """Wait until what is being written is whole; several processes together.

        Raises:
            OSError: It could not be written; nothing of it is left.
        """
        if self._pending is None:
            return
        (path, files), self._pending = self._pending, None
        if trainer.world_size == 1:
            self._writer.wait()
            return
        error: BaseException | None = None
        try:
            self._writer.wait()
        except Exception as e:
            error = e
        with ranks.pooled():
            every = ranks.lists([(files, None if error is None else str(error))])
        bad = next((said for _, said in every if said is not None), None)
        if trainer.is_global_zero and bad is None:
            self._seal(path, [file for own, _ in every for file in own])
        elif trainer.is_global_zero:
            remove(path)
        if error is not None:
            raise error
        if bad is not None:
            raise OSError(errno.EIO, f"another process could not write its part: {bad}", str(path))

    def _finish_quietly(self, trainer: L.Trainer) -> bool:
        """Wait without asking other processes; whether what was written is whole."""
        pending, self._pending = self._pending, None
        try:
            self._writer.wait()
        except Exception as e:
            log.warning("the last checkpoint could not be written (%s)", e)
            self._saved_at = -1
            return False
        return pending is None or trainer.world_size == 1


def _validate(trainer: L.Trainer) -> None:
    """Make the validation that a signal ended, as the training loop would have done."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    loop.reset_restart_stage()  # it begins anew, whatever batch it was at
    trainer.validating = True
    loop.run()
    trainer.training = True
