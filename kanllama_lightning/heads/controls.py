"""Controls: what more latents, or no learned directions at all, would have reached."""

from typing import Any

from torch import Tensor

from kanllama_lightning.heads.batch_topk import BatchTopK
from kanllama_lightning.types import InputError


class WideBatchTopK(BatchTopK):
    """BatchTopK with as many more latents as give it the parameters of KANEncoder.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents of the KANEncoder (with its default layer) that this head is to
            be as large as; its own number follows.
        target_l0: Kept latents per token on average.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self, d_model: int, d_sae: int, target_l0: int, alpha_aux: float = 1 / 32, seed: int = 0
    ) -> None:
        if d_sae < 1:
            raise InputError(f"head.d_sae={d_sae}: a dictionary needs at least 1 latent")
        planes = 1 + 5 + 3  # base, and the bases of 5 cells at order 3
        more = d_model * (planes * d_model + d_sae + 1)
        wide = d_sae + round(more / (2 * d_model + 1))
        super().__init__(d_model, wide, target_l0, alpha_aux, seed)
        self.rival_d_sae = d_sae

    def init_args(self) -> dict[str, Any]:
        """The constructor arguments this head was built with."""
        return super().init_args() | {"d_sae": self.rival_d_sae}


class RandomDictionary(BatchTopK):
    """BatchTopK whose dictionary stays as it was drawn; encoder and biases are trained.

    What sparse coding on directions that mean nothing reaches (METHODS D, controls).

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self, d_model: int, d_sae: int, target_l0: int, alpha_aux: float = 1 / 32, seed: int = 0
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        directions: Tensor = self.W_dec.detach()
        del self.W_dec
        self.register_buffer("W_dec", directions)

    def project_grad_(self) -> None:
        """Nothing: the dictionary has no gradient."""

    def project_(self) -> None:
        """Nothing: the dictionary does not move."""
