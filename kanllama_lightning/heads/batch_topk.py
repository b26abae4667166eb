"""BatchTopK: the linear baseline."""

from typing import Any

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import LinearEncoder
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Thresholded


class BatchTopK(SAE):
    """z keeps the target_l0 * tokens largest of ReLU((x - b_dec) W_enc + b_enc) over a batch.

    Bussmann, Leask, Nanda 2024 (arXiv 2412.06410). At inference a global threshold takes the
    batch's place, so that a token's latents do not depend on its neighbours.
    """

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        W = self.drawn()
        self.compose(LinearEncoder(W), Thresholded(self.target_l0), UnitDirections(W))
