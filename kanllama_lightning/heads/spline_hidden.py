"""SplineHidden: a KAN's learned activations at an MLP's cost."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.functional.curves import densities, line_residual, pooled, ranked
from kanllama_lightning.functional.spline_activation import spline_activation
from kanllama_lightning.functional.splines import greville
from kanllama_lightning.heads.hidden import Hidden, as_large_as_kan, own_stream
from kanllama_lightning.types import Curves, InputError

LO, HI = -3.0, 3.0
"""The grid, in deviations of a hidden unit's input over the start sample."""


class SplineHidden(Hidden):
    """p = (x - b_dec) W_enc + phi(x~ V) U + b_enc; BatchTopK of ReLU(p); linear W_dec.

    phi_h is a cubic B-spline of its own for every hidden unit, on a fixed grid of [-3, 3] with
    linear tails; at the start it is a ReLU with its corner rounded off (coefficients
    ReLU(greville)), and the columns of V are scaled so that x~ V has deviation 1. U = 0: step 0
    equals the linear `BatchTopK` head of the same seed bit for bit.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        d_hidden: Hidden units; left out, as many as give the head the number of parameters of
            KANEncoder with its default layer.
        grid_size: Cells between the ends of the grid.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`); V draws from a stream of
            its own.
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        d_hidden: int | None = None,
        grid_size: int = 5,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        if grid_size < 1:
            raise InputError(f"head.grid_size={grid_size}: must be at least 1 (default 5)")
        per_unit = grid_size + 3
        hidden = as_large_as_kan(d_model, d_sae, per_unit) if d_hidden is None else d_hidden
        super().__init__(d_model, d_sae, target_l0, hidden, alpha_aux, seed)
        self.d_hidden, self.grid_size = d_hidden, grid_size
        V = torch.randn(d_model, hidden, generator=own_stream(seed)) / d_model**0.5
        self.V = nn.Parameter(V)
        rounded = greville(LO, HI, grid_size).relu().float()
        self.spline = nn.Parameter(rounded[:, None].repeat(1, hidden))

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """As a linear head; and scale V to what it will see."""
        super().start_(x)
        seen = self.standardised(x[:8192]) @ self.V
        self.V.div_(seen.std(0).clamp_min(1e-6))

    def hidden(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok hidden"]:
        """phi(x~ V)."""
        return spline_activation(
            x @ self.V,
            self.spline,
            LO,
            HI,
            self.grid_size,
            linear_tails=True,
            compiled=x.is_cuda,  # a CPU gives the same numbers whatever the batch
        )

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """Hidden units, times the length of U's rows."""
        z = self.standardised(x)
        seen, gain = z @ self.V, self.U.norm(dim=1)
        size, bend, _ = (a.float() for a in line_residual(seen, self.hidden(z)))
        size, outside = size * gain, ((seen < LO) | (seen > HI)).float().mean(0)
        best = ranked(size, bend, top)
        points, density = densities(seen[:, best].unbind(1))
        values = spline_activation(
            points.T,
            self.spline[:, best],
            LO,
            HI,
            self.grid_size,
            linear_tails=True,
            compiled=False,
        )
        return [
            Curves(
                "hidden unit",
                [f"hidden {i}" for i in best.tolist()],
                ("input of the unit, in deviations", "unit times |U|, in units of pre-activations"),
                points,
                values.T * gain[best].unsqueeze(1),
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
        """`out_of_grid`: share of the hidden units' inputs beyond the grid."""
        seen = self.standardised(x) @ self.V
        return {"out_of_grid": ((seen < LO) | (seen > HI)).float().mean()}
