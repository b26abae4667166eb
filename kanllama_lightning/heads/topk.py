"""TopK: exactly target_l0 latents per token."""

from typing import Any

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import LinearEncoder
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import TokenTopK


class TopK(SAE):
    """z keeps the target_l0 largest of ReLU((x - b_dec) W_enc + b_enc) of each token.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093). The same in
    training and at inference; L0 <= target_l0, as zeros do not count.
    """

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        W = self.drawn()
        self.compose(LinearEncoder(W), TokenTopK(self.target_l0), UnitDirections(W))
