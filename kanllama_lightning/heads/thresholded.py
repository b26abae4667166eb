"""Batch selection in training, one learned threshold at inference."""

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.functional import ranks
from kanllama_lightning.functional.sparse import largest_positive
from kanllama_lightning.heads.selecting import Selecting
from kanllama_lightning.types import SAEOutput, SparseCodes, StepContext

log = logging.getLogger(__name__)

CALIBRATION_ROWS = 2048
"""Rows whose activations exist at once while calibrating."""


class Thresholded(Selecting):
    """Training keeps the batch's target_l0 * tokens largest, inference what is above theta.

    theta is tracked as a moving average of the smallest kept activation, and set exactly by
    `calibrate_`: the value at which training activations have mean L0 = target_l0. Both are saved;
    inference takes the calibrated one when there is one.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average (L0).
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    in_units: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec", "threshold", "threshold_ema")
    # a threshold of 0 keeps all that is positive: that of too few positive activations
    least: ClassVar[Mapping[str, float]] = MappingProxyType(
        {"threshold": 0.0, "threshold_ema": 0.0, "threshold_ema_weight": 0.0}
    )
    threshold: Tensor
    threshold_ema: Tensor
    threshold_ema_weight: Tensor

    def __init__(
        self, d_model: int, d_sae: int, target_l0: int, alpha_aux: float = 1 / 32, seed: int = 0
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        self.register_buffer("threshold", torch.full((), torch.nan))
        self.register_buffer("threshold_ema", torch.zeros(()))
        self.register_buffer("threshold_ema_weight", torch.zeros(()))
        self._warned = False

    def select(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " nnz"]:
        """In training the batch's largest, at inference everything above the threshold."""
        if self.training:
            return largest_positive(pre_acts, self.target_l0 * len(pre_acts))[0]
        theta = self.inference_threshold()
        if theta is None:
            if not self._warned:
                log.warning("this head has no threshold yet: %s", self.makeshift)
                self._warned = True
            return largest_positive(pre_acts, self.target_l0 * len(pre_acts))[0]
        return (pre_acts > theta).reshape(-1).nonzero().squeeze(1)

    def inference_threshold(self) -> Float[Tensor, ""] | None:
        """The calibrated threshold, else the moving average, else None."""
        if not self.threshold.isnan():
            return self.threshold
        if self.threshold_ema_weight > 0:
            return self.threshold_ema / self.threshold_ema_weight
        return None

    @property
    def makeshift(self) -> str | None:
        """The moving average of training, or the batch at hand."""
        if not self.threshold.isnan():
            return None
        if self.inference_threshold() is not None:
            return "the moving average of training takes its place, and L0 is near its target only"
        return (
            "the largest activations of the batch at hand are kept instead, so its L0 is the "
            "target by construction"
        )

    @torch.no_grad()
    def observe_(self, out: SAEOutput, ctx: StepContext) -> None:
        """Move the average towards the batch's smallest kept activation (bias-corrected)."""
        assert isinstance(out.codes, SparseCodes)
        kept = out.codes.values.detach().float()
        # where a process keeps nothing, the others' smallest counts
        smallest = ranks.smallest(kept.min() if len(kept) else kept.new_full((), torch.inf))
        rate = torch.where(smallest.isfinite(), ctx.rate, 0.0)
        self.threshold_ema.lerp_(smallest.nan_to_num(posinf=0.0), rate)
        self.threshold_ema_weight.lerp_(torch.ones_like(self.threshold_ema_weight), rate)

    @torch.no_grad()
    def calibrate_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Set the threshold at which these raw training activations have the target L0, exactly."""
        wanted = self.target_l0 * len(x)
        best = self.b_enc.new_zeros(0)
        for chunk in x.split(CALIBRATION_ROWS):
            acts = self.pre_acts(chunk).reshape(-1)
            floor = best.min() if len(best) >= wanted else 0.0
            best = torch.cat([best, acts[acts > floor]])
            if len(best) > wanted:
                best = best.topk(wanted, sorted=False).values
        # with too few positive activations everything positive is kept
        cutoff = best.min() if len(best) >= wanted else best.new_zeros(())
        self.threshold.copy_(torch.nextafter(cutoff, torch.zeros_like(cutoff)))
