"""What callbacks share that look at every N-th validation, and always at the final one."""

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from kanllama_lightning.types import InputError


class LookingCallback(L.Callback):
    """Says which validations are looked at; a subclass looks.

    Args:
        every_n_validations: Validations from one look to the next; the final one always looks.
    """

    def __init__(self, every_n_validations: int) -> None:
        if every_n_validations < 1:
            name = type(self).__name__
            raise InputError(
                f"{name}.every_n_validations={every_n_validations}: must be at least 1"
            )
        self.every_n_validations = every_n_validations
        self.looks = False
        self.only_final = False
        """Whether the final validation alone is looked at: where the time decides how often a run
        is validated, as nobody knows before what a look takes."""
        self._validations, self._counted_at = 0, -1

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were: a continued run looks when an undisturbed one would."""
        return {"validations": self._validations, "counted_at": self._counted_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._validations = state_dict["validations"]
        self._counted_at = state_dict.get("counted_at", -1)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Decide whether this validation is looked at."""
        final = trainer.state.fn == TrainerFn.VALIDATING
        if not final and trainer.global_step != self._counted_at:  # not one that is made again
            self._validations, self._counted_at = self._validations + 1, trainer.global_step
        self.looks = (
            final or not self.only_final and self._validations % self.every_n_validations == 0
        )
