"""MLPEncoder: is it the KAN, or just an encoder that is not linear?"""

from typing import Any

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import HiddenEncoder
from kanllama_lightning.heads.hidden_units import MLPUnits, as_large_as_kan
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Thresholded


class MLPEncoder(SAE):
    """p = (x - b_dec) W_enc + ReLU(x~ V + c) U + b_enc; BatchTopK of ReLU(p); linear W_dec.

    The control of the KAN heads: the same dictionary, selection and start, hidden units without
    splines. V is Gaussian with columns of norm about 1, U = 0 and c = 0 at the start: step 0 equals
    the linear `BatchTopK` head of the same seed bit for bit.

    Args:
        d_hidden: Hidden units (default: as many as give the head the number of parameters of
            KANEncoder with its default layer).
    """

    def __init__(self, d_hidden: int | None = None, **shared: Any) -> None:
        super().__init__(**shared)
        self.d_hidden = d_hidden
        hidden = as_large_as_kan(self.d_model, self.d_sae, 1) if d_hidden is None else d_hidden
        W, units = self.drawn(), MLPUnits(self.d_model, hidden, self.seed)
        self.compose(HiddenEncoder(W, units), Thresholded(self.target_l0), UnitDirections(W))
