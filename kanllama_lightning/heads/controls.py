"""Controls: what more latents, or a dictionary or an encoder that is not trained, reach."""

from typing import Any, ClassVar

from kanllama_lightning.heads.decoders import (
    FrozenDirections,
    SoftlyFrozenDirections,
    UnitDirections,
)
from kanllama_lightning.heads.encoders import FrozenLinearEncoder, LinearEncoder
from kanllama_lightning.heads.head import width
from kanllama_lightning.heads.hidden_units import kan_size
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Thresholded
from kanllama_lightning.storage.named import ship
from kanllama_lightning.types import InputError


class WideBatchTopK(SAE):
    """BatchTopK with as many more latents as give it the parameters of KANEncoder.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents of the KANEncoder (with its default layer) that this head is to
            be as large as; its own number follows.
    """

    def __init__(self, d_model: int, d_sae: int | None, **shared: Any) -> None:
        d_sae = width(d_model, d_sae)
        if d_sae < 1:
            raise InputError(f"head.d_sae={d_sae}: a dictionary needs at least 1 latent")
        wide = d_sae + round(kan_size(d_model, d_sae) / (2 * d_model + 1))
        super().__init__(d_model=d_model, d_sae=wide, **shared)
        self.rival_d_sae, W = d_sae, self.drawn()
        self.compose(LinearEncoder(W), Thresholded(self.target_l0), UnitDirections(W))

    def init_args(self) -> dict[str, Any]:
        """The constructor arguments this head was built with."""
        return super().init_args() | {"d_sae": self.rival_d_sae}


class FrozenDecoder(SAE):
    """BatchTopK whose dictionary stays as it was drawn; encoder and biases are trained.

    What a trained encoder makes of directions that mean nothing: a head whose dictionary is
    worth something has to beat it (arXiv 2602.14111).
    """

    control: ClassVar[str] = "frozen decoder"

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        W = self.drawn()
        self.compose(LinearEncoder(W), Thresholded(self.target_l0), FrozenDirections(W))


ship(FrozenDecoder, "RandomDictionary")  # its former name, by which saved heads know it


class SoftlyFrozenDecoder(SAE):
    """BatchTopK whose directions keep a cosine of at least `min_cosine` to where they started.

    After each step a row of W_dec that has turned further is brought back to that angle, by the
    shortest way on the unit sphere. What can be had by turning random directions a little
    (arXiv 2602.14111).

    Args:
        min_cosine: Least cosine of a direction to its start.
    """

    control: ClassVar[str] = "softly frozen decoder"

    def __init__(self, min_cosine: float = 0.8, **shared: Any) -> None:
        super().__init__(**shared)
        self.min_cosine, W = min_cosine, self.drawn()
        decoder = SoftlyFrozenDirections(W, min_cosine)
        self.compose(LinearEncoder(W), Thresholded(self.target_l0), decoder)


class FrozenEncoder(SAE):
    """BatchTopK whose encoder stays as it was at the start; the dictionary and b_dec are trained.

    p = (x - c) W_enc + b_enc with c, W_enc and b_enc those of the start: which latents fire on a
    token is decided by random directions for good (arXiv 2602.14111). AuxK cannot revive latents
    here, but the directions of dead ones can still move.
    """

    control: ClassVar[str] = "frozen encoder"

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        W = self.drawn()
        self.compose(FrozenLinearEncoder(W), Thresholded(self.target_l0), UnitDirections(W))
