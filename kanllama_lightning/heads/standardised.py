"""What every KAN head needs: inputs of known range for its fixed grid."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.heads.base import LARGEST, SAEHead
from kanllama_lightning.heads.thresholded import Thresholded


class Standardised(Thresholded):
    """Freezes mean and deviation of every coordinate of the start sample (METHODS B3a).

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    least: ClassVar[Mapping[str, float]] = MappingProxyType(
        {**Thresholded.least, "input_std": 1 / LARGEST}
    )
    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self, d_model: int, d_sae: int, target_l0: int, alpha_aux: float = 1 / 32, seed: int = 0
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        self.register_buffer("input_mean", torch.zeros(d_model))
        self.register_buffer("input_std", torch.ones(d_model))

    def folded(self) -> SAEHead:
        """Refused: a curve of standardised activations has no other units (METHODS 0.1)."""
        return SAEHead.folded(self)

    def standardise_(self, mean: Float[Tensor, " d_model"], std: Float[Tensor, " d_model"]) -> None:
        """Freeze the standardisation."""
        self.input_mean.copy_(mean)
        self.input_std.copy_(std.clamp_min(1e-6))

    def standardised(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_model"]:
        """x~: raw activations in the head's units, brought to mean 0 and deviation 1; fp32."""
        return (x.float() * self.scale - self.input_mean) / self.input_std
