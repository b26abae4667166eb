"""SplineLatent: one learned curve per latent, with a hard zero."""

from typing import Any

import torch

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import LinearEncoder
from kanllama_lightning.heads.sae import SAE, FirstRows
from kanllama_lightning.heads.selections import LatentSplines


class SplineLatent(SAE):
    """z_j = R_j (S_j(p_j / R_j) - S_j(0)) for kept p_j > 0, 0 elsewhere; p linear, linear W_dec.

    S_j is a cubic B-spline on a grid of [0, 1], continued linearly beyond R_j, the reach of latent
    j's activations. Selection (BatchTopK, then a threshold) looks at p; only kept values are
    evaluated. At the start S_j is the identity: step 0 equals the linear `BatchTopK` head of the
    same seed to 1e-5. While the first `frozen_share` of the budget is trained the splines rest and
    R_j follows the activations; then R_j rests and the splines are trained.
    Loss: FVU + AuxK + smoothness * mean_j sum_c (second difference of S_j's coefficients)^2.
    After KAN-SAE (arXiv 2605.17493), with a hard zero and a structural sparsity in its place.

    Args:
        grid_size: Cells between 0 and a latent's reach.
        monotone: Whether the curves can only rise, so that a larger activation is more of the
            feature: the coefficients are then a running sum of softplus.
        frozen_share: Share of the token budget in which the splines rest.
        smoothness: Weight of the penalty on second differences.
    """

    selection: LatentSplines

    def __init__(
        self,
        grid_size: int = 5,
        monotone: bool = True,
        frozen_share: float = 0.1,
        smoothness: float = 1e-3,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.grid_size, self.monotone = grid_size, monotone
        self.frozen_share, self.smoothness = frozen_share, smoothness
        splines = LatentSplines(
            self.target_l0, self.d_sae, grid_size, monotone, frozen_share, smoothness
        )
        W = self.drawn()
        self.compose(LinearEncoder(W), splines, UnitDirections(W))

    @torch.no_grad()
    def start_parts_(self, first: FirstRows) -> None:
        """As a linear head, and the first reach of every latent."""
        super().start_parts_(first)
        self.selection.start_reach_(self.sums(first.read))
