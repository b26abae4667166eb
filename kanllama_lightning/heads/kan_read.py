"""A KAN layer in the place of the linear encoder: what KANDirect and OnlyKAN share."""

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.heads.dictionary import Branch
from kanllama_lightning.heads.kan_linear import KANLinear
from kanllama_lightning.heads.standardised import Standardised
from kanllama_lightning.types import Curves

LO, HI = -3.0, 3.0
"""The grid, in deviations of a coordinate over the start sample."""


class KANRead(Standardised):
    """p = KAN(x~) + b_enc: every latent reads every coordinate through a curve of its own.

    A mixin: the constructor of a head that has it calls `read_by_kan_`.
    """

    def read_by_kan_(self, grid_size: int) -> None:
        """Put a KAN layer whose curves are the lines of W_enc into W_enc's place."""
        W = self.W_enc.detach()
        del self.W_enc
        self.kan = KANLinear(
            self.d_model,
            self.d_sae,
            grid_size,
            grid_range=(LO, HI),
            linear_tails=True,
            generator=torch.Generator(),
        )
        self.set_encoder_(W)

    @torch.no_grad()
    def set_encoder_(self, W: Float[Tensor, "d_model d_sae"]) -> None:
        """Make every curve the line of (x - b_dec) W."""
        self.kan.set_linear_(self.input_std[:, None] * W)
        self.b_enc.copy_((self.input_mean - self.b_dec) @ W)

    def branches(self, x: Float[Tensor, "tok d_model"]) -> list[Branch]:
        """The KAN layer's features with its weights."""
        planes = self.kan.features(self.standardised(x)).flatten(1)
        return [(planes, self.kan.weight.flatten(1).T)]

    def bias(self) -> Float[Tensor, " d_sae"]:
        """b_enc alone: where b_dec lies is part of the curves."""
        return self.b_enc

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """The encoder's edges, latents and inputs; then those of the rest of the head."""
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
