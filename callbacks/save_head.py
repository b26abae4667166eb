"""The product: heads saved along the way and at the end, each with its validation behind it."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from kanllama_lightning.runs.folder import HEAD, HEADS, head_folder
from kanllama_lightning.runs.revision import commit


class SaveHead(L.Callback):
    """Saves the head after a validation, so calibrated and measured as saved.

    The final one goes to `head/`, those along the way to `heads/tokens=N/`; of heads side by side,
    in each one's folder.

    Args:
        every_tokens: Tokens between two heads along the way; the first validation after each
            multiple saves one.
    """

    def __init__(self, every_tokens: int = 50_000_000) -> None:
        self.every_tokens = every_tokens
        self._last = 0
        self._commit = commit()  # now: files may change while a run lasts

    def state_dict(self) -> dict[str, Any]:
        """Which multiple was saved last."""
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._last = state_dict["last"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save if it is time."""
        if not trainer.is_global_zero or not pl_module.started:
            return
        tokens = pl_module.tokens_seen
        if trainer.state.fn == TrainerFn.VALIDATING:
            where = Path(HEAD)
        elif tokens // self.every_tokens > self._last:
            where = Path(HEADS) / f"tokens={tokens:012d}"
        else:
            return
        provenance = self._provenance(trainer, pl_module)  # reads the text: once for all heads
        for name, head in pl_module.heads().items():
            head.save(head_folder(trainer.default_root_dir, name) / where, provenance)
        if where != Path(HEAD):
            self._last = tokens // self.every_tokens

    def _provenance(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        lm = pl_module.lm
        epoch = trainer.datamodule.epoch_tokens
        return {
            "lm": lm.name,
            "revision": lm.revision,
            "hook_point": lm.hook.name,
            "input_point": lm.input.name if lm.input else None,
            "bos": lm.bos,
            "lm_dtype": str(lm.dtype).removeprefix("torch."),
            "text": trainer.datamodule.train_corpus.description(),
            "init_from": pl_module.init_from,
            "tokens": pl_module.tokens_seen,
            "passes": round(pl_module.tokens_seen / epoch, 3) if epoch else None,
            "step": trainer.global_step,
            "commit": self._commit or None,
        }
