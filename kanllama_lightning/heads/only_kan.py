"""OnlyKAN: a KAN layer on either side of a sparse code."""

from typing import Any

from kanllama_lightning.heads.decoders import LatentCurves
from kanllama_lightning.heads.encoders import KANReader
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Thresholded


class OnlyKAN(SAE):
    """p = KAN(x~) + b_enc; z = BatchTopK of ReLU(p); x_hat = sum_j psi_j(z_j) + b_dec.

    The earlier design `only_kan` with what it lacked: a sparse code, b_dec, and a decoder grid that
    lies on the activations (METHODS B4, B5 iii). The decoder is that of `CurvedDictionary`. All
    curves are lines at the start, of the linear `BatchTopK` head of the same seed.

    Args:
        grid_size: Cells of either grid.
    """

    def __init__(self, grid_size: int = 5, **shared: Any) -> None:
        super().__init__(**shared)
        self.grid_size = grid_size
        decoder = LatentCurves(self.d_sae, self.d_model, grid_size, self.seed)
        self.compose(KANReader(self.drawn(), grid_size), Thresholded(self.target_l0), decoder)
