"""SplineInput: one learned curve per input coordinate, then the linear encoder."""

from typing import Any

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import BentInputEncoder
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Thresholded


class SplineInput(SAE):
    """p = (x + std phi(x~) - b_dec) W_enc + b_enc; BatchTopK of ReLU(p); linear W_dec.

    phi_i is what a cubic B-spline per coordinate adds to the identity, on a fixed grid of [-3, 3]
    with linear tails; std is the coordinate's deviation. phi = 0 at the start: step 0 equals the
    linear `BatchTopK` head of the same seed bit for bit. (grid_size + 3) * d_model parameters more.

    Args:
        grid_size: Cells between the ends of the grid.
    """

    def __init__(self, grid_size: int = 5, **shared: Any) -> None:
        super().__init__(**shared)
        self.grid_size, W = grid_size, self.drawn()
        encoder = BentInputEncoder(W, grid_size)
        self.compose(encoder, Thresholded(self.target_l0), UnitDirections(W))
