"""BentDictionary: what a latent writes is a direction with a bend, at twice the cost of one."""

from typing import Any

from kanllama_lightning.heads.bends import Bends
from kanllama_lightning.heads.encoders import LinearEncoder
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Thresholded


class BentDictionary(SAE):
    """p = (x - b_dec) W_enc + b_enc; z = BatchTopK of ReLU(p); x_hat = sum_j psi_j(z_j) + b_dec.

    psi_j(z) = z u_j + R_j g_j(z / R_j) v_j: as `CurvedDictionary`, but a latent bends towards one
    further direction v_j and not in every coordinate, by a curve g_j of few coefficients. R_j is
    the reach of latent j, which follows its activations for the first tenth of the budget. All
    curves are lines at the start: those of the linear `BatchTopK` head of the same seed.

    `hinges` and `powers` are its controls: is the gain one of splines, or of anything that is not
    linear in z? `hinges` with a grid of 2 is a second direction that a latent adds above half its
    reach.

    Args:
        grid_size: Cells between 0 and a latent's reach, of splines and hinges.
        shape: What g_j is made of: cubic B-splines ("spline"), straight pieces ("hinges"), or u^2
            and u^3 ("powers"); straight beyond the reach.
    """

    def __init__(self, grid_size: int = 5, shape: str = "spline", **shared: Any) -> None:
        super().__init__(**shared)
        self.grid_size, self.shape = grid_size, shape
        decoder = Bends(self.d_sae, self.d_model, shape, grid_size, self.seed)
        self.compose(LinearEncoder(self.drawn()), Thresholded(self.target_l0), decoder)
