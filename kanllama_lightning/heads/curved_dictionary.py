"""CurvedDictionary: what a latent writes is a curve, not a direction."""

from typing import Any, ClassVar

from kanllama_lightning.heads.decoders import LatentCurves
from kanllama_lightning.heads.encoders import LinearEncoder
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Thresholded


class CurvedDictionary(SAE):
    """p = (x - b_dec) W_enc + b_enc; z = BatchTopK of ReLU(p); x_hat = sum_j psi_j(z_j) + b_dec.

    psi_j(z) = R_j (f_j(z / R_j) - f_j(0)): a KAN layer from the latents to the activation, whose
    curves all go through 0. Every coordinate of f_j is a SiLU and a cubic B-spline on [0, 1] with
    linear tails, R_j the reach of latent j, which follows its activations for the first tenth of
    the budget (METHODS B3c, B5 iii). All curves are lines at the start: those of the linear
    `BatchTopK` head of the same seed. `only_kan` without its KAN encoder: is the gain the
    decoder's?

    Args:
        grid_size: Cells between 0 and a latent's reach.
    """

    former_extras: ClassVar[tuple[str, ...]] = ("input_mean", "input_std")

    def __init__(self, grid_size: int = 5, **shared: Any) -> None:
        super().__init__(**shared)
        self.grid_size = grid_size
        decoder = LatentCurves(self.d_sae, self.d_model, grid_size, self.seed)
        self.compose(LinearEncoder(self.drawn()), Thresholded(self.target_l0), decoder)
