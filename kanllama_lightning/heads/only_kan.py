"""OnlyKAN: a KAN layer on either side of a sparse code."""

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.heads.curved_dictionary import CurvedDictionary
from kanllama_lightning.heads.dictionary import Branch
from kanllama_lightning.heads.kan_linear import KANLinear
from kanllama_lightning.types import Curves

LO, HI = -3.0, 3.0
"""The encoder's grid, in deviations of a coordinate over the start sample."""


class OnlyKAN(CurvedDictionary):
    """p = KAN(x~) + b_enc; z = BatchTopK of ReLU(p); x_hat = sum_j psi_j(z_j) + b_dec.

    The earlier design `only_kan` with what it lacked: a sparse code, b_dec, and a decoder grid that
    lies on the activations (METHODS B4, B5 iii). The decoder is that of `CurvedDictionary`. All
    curves are lines at the start, of the linear `BatchTopK` head of the same seed.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        grid_size: Cells of either grid.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        grid_size: int = 5,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, grid_size, alpha_aux, seed)
        W = self.W_enc.detach().clone()
        del self.W_enc
        self.kan = KANLinear(
            d_model,
            d_sae,
            grid_size,
            grid_range=(LO, HI),
            linear_tails=True,
            generator=torch.Generator(),
        )
        self.set_encoder_(W)

    @torch.no_grad()
    def set_encoder_(self, W: Float[Tensor, "d_model d_sae"]) -> None:
        """Make every curve of the encoder the line of (x - b_dec) W."""
        self.kan.set_linear_(self.input_std[:, None] * W)
        self.b_enc.copy_((self.input_mean - self.b_dec) @ W)

    def branches(self, x: Float[Tensor, "tok d_model"]) -> list[Branch]:
        """The KAN layer's features with its weights."""
        planes = self.kan.features(self.standardised(x)).flatten(1)
        return [(planes, self.kan.weight.flatten(1).T)]

    def bias(self) -> Float[Tensor, " d_sae"]:
        """b_enc alone: the encoder sees standardised activations, not x - b_dec."""
        return self.b_enc

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """The encoder's edges, latents and inputs; and the decoder's latents."""
        found = self.kan.curves(
            self.standardised(x),
            top,
            ends=("input", "latent"),
            axes=("input, in deviations of the start sample", "added to the pre-activation"),
            pools=("latent", "input"),
        )
        return found + super().learned_curves(x, top)

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the encoder's inputs beyond its grid."""
        return {"out_of_grid": self.kan.out_of_grid(self.standardised(x))}
