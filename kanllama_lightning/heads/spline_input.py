"""SplineInput: one learned curve per input coordinate, then the linear encoder."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.functional.curves import densities, line_residual, pooled, ranked
from kanllama_lightning.functional.spline_activation import spline_activation
from kanllama_lightning.heads.dictionary import Branch
from kanllama_lightning.heads.standardised import Standardised
from kanllama_lightning.types import Curves, InputError

LO, HI = -3.0, 3.0
"""The grid, in deviations of a coordinate over the start sample."""


class SplineInput(Standardised):
    """p = (x + std phi(x~) - b_dec) W_enc + b_enc; BatchTopK of ReLU(p); linear W_dec.

    phi_i is what a cubic B-spline per coordinate adds to the identity, on a fixed grid of [-3, 3]
    with linear tails; std is the coordinate's deviation. phi = 0 at the start: step 0 equals the
    linear `BatchTopK` head of the same seed bit for bit. (grid_size + 3) * d_model parameters more.

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
        if grid_size < 1:
            raise InputError(f"head.grid_size={grid_size}: must be at least 1 (default 5)")
        self.grid_size = grid_size
        self.spline = nn.Parameter(torch.zeros(grid_size + 3, d_model))

    def branches(self, x: Float[Tensor, "tok d_model"]) -> list[Branch]:
        """The bent coordinates with W_enc."""
        [(linear, weights)] = super().branches(x)
        bend = spline_activation(
            self.standardised(x),
            self.spline,
            LO,
            HI,
            self.grid_size,
            linear_tails=True,
            compiled=x.is_cuda,  # a CPU gives the same numbers whatever the batch
        )
        return [(linear + self.input_std * bend, weights)]

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """Inputs: the identity and what their splines add to it."""

        def bent(z: Tensor, which: Tensor) -> Tensor:
            return z + spline_activation(
                z,
                self.spline[:, which],
                LO,
                HI,
                self.grid_size,
                linear_tails=True,
                compiled=False,
            )

        z = self.standardised(x)
        every = torch.arange(self.d_model, device=z.device)
        size, bend, _ = (a.float() for a in line_residual(z, bent(z, every)))
        outside = ((z < LO) | (z > HI)).float().mean(0)
        best = ranked(size, bend, top)
        points, density = densities(z[:, best].unbind(1))
        return [
            Curves(
                "input",
                [f"input {i}" for i in best.tolist()],
                ("input, in deviations of the start sample", "bent input, in the same units"),
                points,
                bent(points.T, best).T,
                density,
                bend[best],
                size[best],
                outside[best],
                pooled(size, bend)[1].item(),
                outside.mean().item(),
            )
        ]

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the coordinates beyond the grid."""
        z = self.standardised(x)
        return {"out_of_grid": ((z < LO) | (z > HI)).float().mean()}
