"""What a head is worth that learned nothing, on the same tokens."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.spliced_loss import splice_sums
from kanllama_lightning.heads import PCA, BatchTopK, SAEHead
from kanllama_lightning.metrics import Reconstruction, Sparsity, SplicedLoss

FOLDER = "baselines"
RANDOM_SEED = 1_000_003


class Baselines(L.Callback):
    """PCA with k components, a random dictionary, and the head as it was at step 0.

    Kept beside the run when training starts, measured in its final validation on the first
    validation set; `results` maps each name to its figures.
    """

    def __init__(self) -> None:
        self.results: dict[str, dict[str, float]] = {}
        self._heads: dict[str, SAEHead] = {}
        self._meters: dict[str, tuple[Sparsity, Reconstruction, SplicedLoss]] = {}

    def on_head_started(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the untrained head: nothing else can bring it back after a restart."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            copy.deepcopy(pl_module.head).save(self._folder(trainer) / "untrained")

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """In the final validation: estimate the controls from training activations."""
        self._heads, self._meters = {}, {}
        if trainer.state.fn != TrainerFn.VALIDATING or not pl_module.buffer.filled:
            return
        head: SAEHead = pl_module.head
        x = pl_module.buffer.sample(1 << 15)
        k = getattr(head, "target_l0", None)
        if k is None:
            return
        controls: dict[str, SAEHead] = {
            "PCA": PCA(head.d_model, min(k, head.d_model)),
            "random dictionary": BatchTopK(head.d_model, head.d_sae, k, seed=RANDOM_SEED),
        }
        for control in controls.values():
            control.to(pl_module.device).start_(x)
            control.norm_limit.copy_(head.norm_limit)
        if (self._folder(trainer) / "untrained").exists():
            untrained = SAEHead.load(self._folder(trainer) / "untrained")
            controls["untrained head"] = untrained.to(pl_module.device)
        for name, control in controls.items():
            control.eval().calibrate_(x)
            self._heads[name] = control
            meters = (Sparsity(control.d_sae), Reconstruction(control.d_model), SplicedLoss())
            self._meters[name] = tuple(m.to(pl_module.device) for m in meters)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the controls on one batch of the first set."""
        if dataloader_idx or not self._heads:
            return
        outs = {name: head(outputs.x) for name, head in self._heads.items()}
        sums, n = splice_sums(pl_module.lm, outputs, {k: o.x_hat for k, o in outs.items()})
        zero = torch.zeros((), dtype=torch.float64, device=pl_module.device)
        for name, (sparsity, reconstruction, spliced) in self._meters.items():
            sparsity.update(outs[name].codes)
            reconstruction.update(outputs.x, outs[name].x_hat)
            own = {"ce_recon": sums[f"ce_{name}"], "kl_recon": sums[f"kl_{name}"]}
            spliced.update(own | {"ce_clean": sums["ce_clean"], "ce_zero": zero}, n)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Collect the figures; the scores follow with the head's own zero and mean ablation."""
        for name, meters in self._meters.items():
            merged: dict[str, float] = {}
            for meter in meters:
                merged |= meter.compute()
            self.results[name] = merged
        self._heads = {}

    @staticmethod
    def _folder(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / FOLDER
