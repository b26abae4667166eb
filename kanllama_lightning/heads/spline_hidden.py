"""SplineHidden: a KAN's learned activations at an MLP's cost."""

from typing import Any

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import HiddenEncoder
from kanllama_lightning.heads.hidden_units import SplineUnits, as_large_as_kan
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Thresholded
from kanllama_lightning.types import InputError


class SplineHidden(SAE):
    """p = (x - b_dec) W_enc + phi(x~ V) U + b_enc; BatchTopK of ReLU(p); linear W_dec.

    phi_h is a cubic B-spline of its own for every hidden unit, on a fixed grid of [-3, 3] with
    linear tails; at the start it is a ReLU with its corner rounded off (coefficients
    ReLU(greville)), and the columns of V are scaled so that x~ V has deviation 1. U = 0: step 0
    equals the linear `BatchTopK` head of the same seed bit for bit.

    Args:
        d_hidden: Hidden units (default: as many as give the head the number of parameters of
            KANEncoder with its default layer).
        grid_size: Cells between the ends of the grid.
    """

    def __init__(self, d_hidden: int | None = None, grid_size: int = 5, **shared: Any) -> None:
        super().__init__(**shared)
        if grid_size < 1:
            raise InputError(f"head.grid_size={grid_size}: must be at least 1 (default 5)")
        self.d_hidden, self.grid_size = d_hidden, grid_size
        per_unit = grid_size + 3
        size = as_large_as_kan(self.d_model, self.d_sae, per_unit)
        units = SplineUnits(
            self.d_model, size if d_hidden is None else d_hidden, grid_size, self.seed
        )
        W = self.drawn()
        self.compose(HiddenEncoder(W, units), Thresholded(self.target_l0), UnitDirections(W))
