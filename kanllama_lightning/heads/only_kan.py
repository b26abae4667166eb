"""OnlyKAN: a KAN layer on either side of a sparse code."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.functional.curves import (
    along_first,
    densities,
    edge_bends,
    kept_covariances,
    pooled,
    ranked,
)
from kanllama_lightning.functional.losses import geometric_median
from kanllama_lightning.functional.planes import lifted_planes
from kanllama_lightning.functional.sparse import Pattern, sparse_decode
from kanllama_lightning.functional.splines import greville
from kanllama_lightning.heads.base import SAEHead
from kanllama_lightning.heads.dictionary import MEDIAN_ROWS, Branch, first_directions
from kanllama_lightning.heads.kan_decoder import KANDecoder
from kanllama_lightning.heads.kan_linear import KANLinear
from kanllama_lightning.heads.reach import first_reach, follow_reach_
from kanllama_lightning.types import Curves, SAEOutput, StepContext

LO, HI = -3.0, 3.0
"""The encoder's grid, in deviations of a coordinate over the start sample."""
REACH_SHARE = 0.1
"""Share of the token budget during which the decoder's grid follows the activations."""
STEP = 1e-5
"""Step of the central difference, in fp64, as a share of the reach."""


class OnlyKAN(KANDecoder):
    """p = KAN(x~) + b_enc; z = BatchTopK of ReLU(p); x_hat = sum_j psi_j(z_j) + b_dec.

    The earlier design `only_kan` with what it lacked: a sparse code, b_dec, and a decoder grid that
    lies on the activations (METHODS B4, B5 iii). psi_j(z) = R_j (f_j(z / R_j) - f_j(0)), every
    coordinate of f_j a SiLU and a cubic B-spline on [0, 1] with linear tails, R_j the reach of
    latent j, which follows its activations for the first tenth of the budget. All curves are lines
    at the start, of the linear head of the same seed.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        grid_size: Cells of either grid.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    reach: Tensor

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
        self.kan = KANLinear(
            d_model,
            d_sae,
            grid_size,
            grid_range=(LO, HI),
            linear_tails=True,
            generator=torch.Generator(),
        )
        self.psi: Float[nn.Parameter, "d_sae planes d_model"] = nn.Parameter(
            torch.zeros(d_sae, 1 + grid_size + 3, d_model)
        )
        self.register_buffer("reach", torch.ones(d_sae))
        self._set_lines_(first_directions(d_sae, d_model, seed), torch.ones(()))

    @torch.no_grad()
    def _set_lines_(
        self, directions: Float[Tensor, "d_sae d_model"], size: Float[Tensor, ""]
    ) -> None:
        W = size * directions.T
        self.kan.set_linear_(self.input_std[:, None] * W)
        self.b_enc.copy_((self.input_mean - self.b_dec) @ W)
        line = greville(0, 1, self.grid_size).to(directions)
        self.psi[:, 0] = 0
        self.psi[:, 1:] = line[:, None] * directions[:, None, :]

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """As a linear head, with lines for curves."""
        SAEHead.start_(self, x)
        target = x[:MEDIAN_ROWS].float() * self.scale
        self.b_dec.copy_(geometric_median(target))
        target = target - self.b_dec
        directions = first_directions(self.d_sae, self.d_model, self.seed).to(target)
        pre = target @ directions.T
        pattern = Pattern(self.select(pre), *pre.shape)
        values = pre.reshape(-1)[pattern.flat]
        summed = sparse_decode(values, pattern, directions)
        size = summed.square().sum()
        best = (target * summed).sum() / size if size > 0 else target.new_ones(())
        self.reach.copy_(first_reach(best * values, pattern.latents, self.d_sae))
        self._set_lines_(directions, best)

    def branches(self, x: Float[Tensor, "tok d_model"]) -> list[Branch]:
        """The KAN layer's features with its weights."""
        planes = self.kan.features(self.standardised(x)).flatten(1)
        return [(planes, self.kan.weight.flatten(1).T)]

    def decode_kept(
        self, values: Float[Tensor, " nnz"], pattern: Pattern
    ) -> Float[Tensor, "tok d_model"]:
        """The sum of the kept latents' curves: sparse in planes as the code is in latents."""
        reach = self.reach[pattern.latents]
        planes = reach[:, None] * lifted_planes(values / reach, self.grid_size)
        n = planes.shape[1]
        flat = pattern.flat[:, None] * n + torch.arange(n, device=planes.device)
        wide = Pattern(flat.reshape(-1), pattern.n_rows, pattern.n_latents * n)
        return sparse_decode(planes.reshape(-1), wide, self.psi.flatten(0, 1))

    def tangent(
        self, latents: Float[Tensor, "tok d_sae"], which: int
    ) -> Float[Tensor, "tok d_model"]:
        """psi_j'(z): the decoder is additive, so no other latent counts."""
        u = (latents[:, which] / self.reach[which]).double()
        ahead, behind = (lifted_planes(u + step, self.grid_size) for step in (STEP, -STEP))
        slopes = (ahead - behind) / (2 * STEP)
        return slopes.to(self.psi.dtype) @ self.psi[which]

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """The encoder's edges, latents and inputs; and the decoder's latents.

        A decoder latent writes a curve in d_model dimensions: its size and bend are over all of
        them, and drawn is how it looks along its own first singular direction.
        """
        found = self.kan.curves(
            self.standardised(x),
            top,
            ends=("input", "latent"),
            axes=("input, in deviations of the start sample", "added to the pre-activation"),
            pools=("latent", "input"),
        )
        codes = self(x).codes.sparse()
        if not len(codes.values):
            return found
        reach, n = self.reach, self.d_sae
        u = codes.values / reach[codes.latents]
        moments = kept_covariances(u, lifted_planes(u, self.grid_size), codes.latents, n)
        edges = edge_bends(self.psi.detach().permute(2, 1, 0), moments)
        size, bend = pooled(*edges, dim=0)
        size *= reach
        fired = codes.fired()
        beyond = torch.bincount(codes.latents[u > 1], minlength=n)
        best = ranked(size, bend, min(top, int((fired > 0).sum())))
        best = best[fired[best] > 0]  # the rest has no curve to draw, and size 0
        seen = [codes.values[codes.latents == j] for j in best.tolist()]
        points, density = densities(seen, start=0.0)
        made = [self.curve(j, at) for j, at in zip(best.tolist(), points, strict=True)]
        ends = torch.stack([z.quantile(0.99) for z in seen])
        straight = self.straightness(best, ends).tolist()
        found.append(
            Curves(
                "decoder latent",
                [
                    f"latent {j} (straightness {s:.3f})"
                    for j, s in zip(best.tolist(), straight, strict=True)
                ],
                ("latent, head's units", "written, along its first direction"),
                points,
                torch.stack([along_first(curve) for curve in made]),
                density,
                bend[best],
                size[best],
                (beyond / fired)[best],
                pooled(size, bend)[1].item(),
                (u > 1).float().mean().item(),
            )
        )
        return found

    @torch.no_grad()
    def observe_(self, out: SAEOutput, ctx: StepContext) -> None:
        """The threshold; and the reach, early on."""
        super().observe_(out, ctx)
        if ctx.progress < REACH_SHARE:
            codes = out.codes.sparse()
            follow_reach_(self.reach, codes.values.detach(), codes.latents, ctx.rate)

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the encoder's inputs beyond its grid."""
        return {"out_of_grid": self.kan.out_of_grid(self.standardised(x))}
