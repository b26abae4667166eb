"""Baselines on the same tokens: PCA, and the head as it was before training."""

import copy
import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from kanllama_lightning.heads import PCA, LinearMap, SAEHead
from kanllama_lightning.lm.splice import losses_by_head
from kanllama_lightning.measures.metrics import (
    ReconstructionMetric,
    SparsityMetric,
    SplicedLossMetric,
)
from kanllama_lightning.runs.folder import head_folder

log = logging.getLogger(__name__)

FOLDER = "baselines"
UNTRAINED = "untrained head"
"""What the head as it was at step 0 is called."""


class Baselines(L.Callback):
    """PCA with k components (of a transcoder: the best linear map), and the untrained head.

    Kept beside the run when training starts, measured in its final validation on the first
    validation set; `results` maps each head to its controls, and those to their figures. Heads side
    by side of one size and sparsity share their controls.

    Args:
        measure: Whether to measure them; for many runs on one text, once is enough.
    """

    def __init__(self, measure: bool = True) -> None:
        self.measure = measure
        self.results: dict[str, dict[str, dict[str, float]]] = {}
        self._controls: dict[str, SAEHead] = {}
        self._of: dict[str, dict[str, str]] = {}
        self._meters: dict[str, tuple[SparsityMetric, ReconstructionMetric, SplicedLossMetric]] = {}

    def on_head_started(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the untrained heads: nothing else can bring them back after a restart."""
        if trainer.is_global_zero:
            for name, head in pl_module.heads().items():
                folder = head_folder(trainer.default_root_dir, name)
                copy.deepcopy(head).save(folder / FOLDER / "untrained")

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """In the final validation: estimate the controls from training activations."""
        self._controls, self._of, self._meters = {}, {}, {}
        if not self.measure or trainer.state.fn != TrainerFn.VALIDATING:
            return
        x = pl_module.sample(1 << 15)
        for name, head in pl_module.heads().items():
            self._of[name] = self._add(trainer, name, head, x)
        for control, made in self._controls.items():
            made.eval().calibrate_(x[:, -made.d_row :])
            loss = SplicedLossMetric(pl_module.lm.vocab_size, ("recon",))
            meters = (SparsityMetric(made.d_sae), ReconstructionMetric(made.d_model), loss)
            self._meters[control] = tuple(m.to(pl_module.device) for m in meters)

    def _add(self, trainer: L.Trainer, name: str, head: SAEHead, x: Tensor) -> dict[str, str]:
        """Make the controls of a head that are not there yet; what each is kept under."""
        k = getattr(head, "target_l0", None)
        if k is None:
            return {}
        d, own = head.d_model, {}
        wanted: dict[str, tuple[str, Any]] = {
            "PCA": (f"PCA {k}", lambda: PCA(d, min(k, d))),
        }
        if head.transcoder:
            wanted = {"linear map": ("linear map", lambda: LinearMap(d))}
        for title, (key, make) in wanted.items():
            if key not in self._controls:
                self._controls[key] = control = make().to(x.device)
                control.start_(x[:, -control.d_row :])
                control.norm_limit.copy_(head.norm_limit)
            own[title] = key
        # a validation on its own looks at the run whose checkpoint it was given
        run = Path(trainer.ckpt_path).parents[1] if trainer.ckpt_path else trainer.default_root_dir
        untrained = Path(run) / name / FOLDER / "untrained"
        if not untrained.exists():
            log.warning("%s is missing: the head as it was at step 0 is not measured", untrained)
        else:
            own[UNTRAINED] = f"untrained {name}"
            control = SAEHead.load(untrained, allow=head.modules_named())
            self._controls[own[UNTRAINED]] = control.to(x.device)
        return own

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
        if dataloader_idx or not self._controls:
            return
        view = next(iter(outputs.values()))
        outs = {
            key: control(view.rows[:, -control.d_row :]) for key, control in self._controls.items()
        }
        losses = losses_by_head(pl_module.lm, view, {k: o.x_hat for k, o in outs.items()}, {})
        for key, (sparsity, reconstruction, loss) in self._meters.items():
            sparsity.update(outs[key].codes)
            reconstruction.update(view.x, outs[key].x_hat)
            own = losses[key]
            loss.update(own.ce, own.kl, view.tokens.doc[own.where])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Collect the figures; what the ablations cost on these tokens the heads' figures say."""
        found: dict[str, dict[str, float]] = {}
        for key, meters in self._meters.items():
            found[key] = {}
            for meter in meters:
                found[key] |= meter.compute()
        if found:
            self.results = {
                name: {title: dict(found[key]) for title, key in own.items()}
                for name, own in self._of.items()
            }
        self._controls = {}
