"""GainLatent: SplineLatent with a straight line for each curve, as its control."""

from typing import Any

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import LinearEncoder
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import LatentGains


class GainLatent(SAE):
    """p = (x - b_dec) W_enc + b_enc; z_j = ReLU(g_j p_j + o_j), p_j kept; x_hat = z W_dec + b_dec.

    As `SplineLatent` it parts what decides whether a latent fires from how strongly it counts then,
    but with a gain and an offset for each latent instead of a curve. What `SplineLatent` gains over
    it is the splines'; what both gain over `BatchTopK` is not. At the start it is that head.
    """

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        W = self.drawn()
        gains = LatentGains(self.target_l0, self.d_sae)
        self.compose(LinearEncoder(W), gains, UnitDirections(W))
