"""KANDirect: a KAN layer straight from the activation to the latents."""

from typing import Any

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import KANReader
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Thresholded


class KANDirect(SAE):
    """p = KAN(x~) + b_enc; BatchTopK of ReLU(p); linear unit-norm W_dec.

    Every latent reads every coordinate through a curve of its own: grid_size + 4 times the
    parameters of a linear encoder. On a fixed grid of [-3, 3] deviations with linear tails. At the
    start every curve is a line (base weights 0): step 0 equals the linear `BatchTopK` head of
    the same seed to 1e-5 (METHODS B5 ii). The layer's features exist once for a batch
    ((grid_size + 4) * d_model numbers per token); its gradient touches kept latents only.

    Args:
        grid_size: Cells between the ends of the grid.
    """

    def __init__(self, grid_size: int = 5, **shared: Any) -> None:
        super().__init__(**shared)
        self.grid_size, W = grid_size, self.drawn()
        self.compose(KANReader(W, grid_size), Thresholded(self.target_l0), UnitDirections(W))
