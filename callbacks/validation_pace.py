"""How often a run is validated where nobody says so: what a share of the time pays for."""

import logging
import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from kanllama_lightning.callbacks.looking import LookingCallback
from kanllama_lightning.functional import ranks
from kanllama_lightning.lm.splice import spliced_losses
from kanllama_lightning.plan.costs import SPLICED
from kanllama_lightning.plan.validation import FORWARD
from kanllama_lightning.runs.time_share import VALIDATIONS, TimeShare

log = logging.getLogger(__name__)


class ValidationPace(L.Callback):
    """Counts the seconds of validations within training, and leaves out what is too much.

    The first is priced by one of its batches, run through the LM twice, the later ones by the
    dearest before. The final validation belongs to the result, not to the training: it is always
    made, and not counted; what costs most of it, the looks of `LookingCallback`, are then left to
    it. Training is the same with and without them.

    Args:
        paced: Whether validations are left out that would bring all of them above 5 % of the time;
            the command sets it where `trainer.val_check_interval` is left out.
    """

    def __init__(self, paced: bool = False) -> None:
        self.paced = paced
        self.share = TimeShare(VALIDATIONS)
        self._began: float | None = None
        self._left_out = 0

    def state_dict(self) -> dict[str, Any]:
        """Time spent."""
        return {"share": self.share.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.share.load_(state_dict["share"])

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock; say how often."""
        self.share.begin()
        for callback in trainer.callbacks:
            if isinstance(callback, LookingCallback):
                callback.only_final = self.paced
        every = trainer.val_check_interval
        how = f"where all take at most {VALIDATIONS:.0%} of the time" if self.paced else "as told"
        log.info("validations: every %s steps, %s, and one at the end", every, how)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The clock of a validation within training starts."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._began = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """The validation before this step, if there was one, is over."""
        self._count()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide on the validation that is due after this step, if one is."""
        step, every = trainer.global_step, trainer.val_check_interval
        if self.paced and step % every == 0:
            trainer.val_check_batch = every if self._affords(trainer, pl_module) else math.inf

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say what was left out."""
        self._count()
        if self._left_out:
            log.info(
                "%d validations were left out, to stay within %.0f %% of the time; "
                "--trainer.val_check_interval makes them, whatever they take",
                self._left_out,
                100 * VALIDATIONS,
            )

    def _count(self) -> None:
        if self._began is not None:
            self.share.add(time.perf_counter() - self._began)
            self._began = None

    def _affords(self, trainer: L.Trainer, pl_module: Any) -> bool:
        """Whether a validation may come now: the first process decides for all."""
        if trainer.global_step >= trainer.max_steps:
            return False  # the final one comes now
        if not self.share.dearest:
            began = time.perf_counter()
            self.share.dearest = _priced(trainer, pl_module)
            self.share.spent += time.perf_counter() - began
        seconds = self.share.dearest
        with ranks.pooled():
            affords = bool(ranks.lists([self.share.affords(seconds)])[0])
        self._left_out += not affords
        return affords


@torch.no_grad()
def _priced(trainer: L.Trainer, pl_module: Any) -> float:
    """Seconds that a validation will take this process, as far as a batch of it tells."""
    data: Any = trainer.datamodule
    batch = next(iter(data.val_dataloader()[0])).to(pl_module.device)
    names = range(SPLICED - 1 + len(pl_module.heads()))
    seconds = 0.0
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        prefix = pl_module.lm.prefix(batch.ids)
        runs = {str(name): prefix.acts for name in names}
        losses = spliced_losses(pl_module.lm, prefix, batch, runs)
        losses.ce["clean"].sum().item()  # waits for the device
        seconds = time.perf_counter() - began
    # the module counts this step's tokens after the callbacks
    trained = (pl_module.tokens_seen + pl_module.schedule.batch) / trainer.world_size
    heads = FORWARD * pl_module.clock.state()["head"] / trained
    per_token = seconds / batch.ids.numel() + heads
    return per_token * data.val_tokens * data.val_sets / trainer.world_size
