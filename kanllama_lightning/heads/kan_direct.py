"""KANDirect: a KAN layer straight from the activation to the latents."""

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.heads.dictionary import Branch
from kanllama_lightning.heads.kan_linear import KANLinear
from kanllama_lightning.heads.standardised import Standardised
from kanllama_lightning.types import Curves

LO, HI = -3.0, 3.0
"""The grid, in deviations of a coordinate over the start sample."""


class KANDirect(Standardised):
    """p = KAN(x~) + b_enc; BatchTopK of ReLU(p); linear unit-norm W_dec.

    Every latent reads every coordinate through a curve of its own: grid_size + 4 times the
    parameters of a linear encoder. On a fixed grid of [-3, 3] deviations with linear tails. At the
    start every curve is a line (base weights 0): step 0 equals the linear `BatchTopK` head of
    the same seed to 1e-5 (METHODS B5 ii). The layer's features exist once for a batch
    ((grid_size + 4) * d_model numbers per token); its gradient touches kept latents only.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        grid_size: Cells between the ends of the grid.
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
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        self.grid_size = grid_size
        del self.W_enc
        self.kan = KANLinear(
            d_model,
            d_sae,
            grid_size,
            grid_range=(LO, HI),
            linear_tails=True,
            generator=torch.Generator(),
        )
        self.set_encoder_(self.W_dec.detach().T)

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
        """Edges, latents and inputs."""
        return self.kan.curves(
            self.standardised(x),
            top,
            ends=("input", "latent"),
            axes=("input, in deviations of the start sample", "added to the pre-activation"),
            pools=("latent", "input"),
        )

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the layer's inputs beyond its grid."""
        return {"out_of_grid": self.kan.out_of_grid(self.standardised(x))}
