"""A linear encoder with hidden units beside it: KAN, MLP or spline, on equal terms."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.heads.dictionary import Branch
from kanllama_lightning.heads.standardised import Standardised
from kanllama_lightning.types import InputError


class Hidden(Standardised):
    """p = (x - b_dec) W_enc + h(x~) U + b_enc; BatchTopK of ReLU(p); linear unit-norm W_dec.

    x~ is the activation standardised per coordinate. U = 0 at the start: step 0 equals the linear
    `BatchTopK` head of the same seed bit for bit. A subclass says what the hidden units h are.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        hidden: Number of hidden units.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`); hidden units draw
            from a stream of their own.
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        hidden: int,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        if hidden < 1:
            raise InputError(f"head.d_hidden={hidden}: must be at least 1")
        self.U = nn.Parameter(torch.zeros(d_sae, hidden).T)

    @abstractmethod
    def hidden(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok hidden"]:
        """The hidden units at standardised activations."""

    def branches(self, x: Float[Tensor, "tok d_model"]) -> list[Branch]:
        """The linear branch, and the hidden units with their weights U."""
        return [*super().branches(x), (self.hidden(self.standardised(x)), self.U)]


def own_stream(seed: int) -> torch.Generator:
    """Where a head draws what its linear twin of the same seed does not have."""
    return torch.Generator().manual_seed(seed + 1)


def as_large_as_kan(d_model: int, d_sae: int, per_unit: int) -> int:
    """How many hidden units give a head the size of KANEncoder with its default layer.

    Args:
        d_model: Width of the activations.
        d_sae: Number of latents.
        per_unit: Parameters a hidden unit has of its own, beside d_model inputs and d_sae outputs.
    """
    planes = 1 + 5 + 3  # base, and the bases of 5 cells at order 3
    kan = d_model * (planes * d_model + d_sae + 1)
    return max(1, round(kan / (d_model + d_sae + per_unit)))
