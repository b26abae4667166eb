"""CurvedDictionary: what a latent writes is a curve, not a direction."""

import torch
from jaxtyping import Float, Int
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
from kanllama_lightning.heads.dictionary import MEDIAN_ROWS, Dictionary, first_directions
from kanllama_lightning.heads.kan_decoder import KANDecoder
from kanllama_lightning.heads.reach import first_reach, follow_reach_
from kanllama_lightning.types import Curves, SAEOutput, StepContext

REACH_SHARE = 0.1
"""Share of the token budget during which the decoder's grid follows the activations."""
STEP = 1e-5
"""Step of the central difference, in fp64, as a share of the reach."""


class CurvedDictionary(KANDecoder):
    """p = (x - b_dec) W_enc + b_enc; z = BatchTopK of ReLU(p); x_hat = sum_j psi_j(z_j) + b_dec.

    psi_j(z) = R_j (f_j(z / R_j) - f_j(0)): a KAN layer from the latents to the activation, whose
    curves all go through 0. Every coordinate of f_j is a SiLU and a cubic B-spline on [0, 1] with
    linear tails, R_j the reach of latent j, which follows its activations for the first tenth of
    the budget (METHODS B3c, B5 iii). All curves are lines at the start: those of the linear
    `BatchTopK` head of the same seed. `only_kan` without its KAN encoder: is the gain the
    decoder's?

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        grid_size: Cells between 0 and a latent's reach.
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
        self.psi: Float[nn.Parameter, "d_sae planes d_model"] = nn.Parameter(
            torch.zeros(d_sae, 1 + grid_size + 3, d_model)
        )
        self.register_buffer("reach", torch.ones(d_sae))
        self.set_lines_(first_directions(d_sae, d_model, seed))

    @torch.no_grad()
    def set_lines_(self, directions: Float[Tensor, "d_sae d_model"]) -> None:
        """Make every curve of the decoder a line."""
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
        self.set_lines_(directions)
        self.set_encoder_(best * directions.T)

    def bias(self) -> Float[Tensor, " d_sae"]:
        """As of a linear head."""
        return Dictionary.bias(self)

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

    def decode_dead(
        self, latents: Float[Tensor, "tok n_dead"], dead: Int[Tensor, " n_dead"]
    ) -> Float[Tensor, "tok d_model"]:
        """Along lines from 0 to the curves at their reach.

        A dead latent's activations are small. The curve itself would show AuxK only its beginning,
        which no firing has shaped, and which may point anywhere.
        """
        at_reach = lifted_planes(torch.ones_like(self.reach[dead]), self.grid_size)
        lines = torch.einsum("jp,jpd->jd", at_reach, self.psi[dead])
        return latents @ lines

    def tangent(
        self, latents: Float[Tensor, "tok d_sae"], which: int
    ) -> Float[Tensor, "tok d_model"]:
        """psi_j'(z): the decoder is additive, so no other latent counts."""
        u = (latents[:, which] / self.reach[which]).double()
        ahead, behind = (lifted_planes(u + step, self.grid_size) for step in (STEP, -STEP))
        slopes = (ahead - behind) / (2 * STEP)
        return slopes.to(self.psi.dtype) @ self.psi[which]

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """The decoder's latents.

        One writes a curve in d_model dimensions: its size and bend are over all of them, and drawn
        is how it looks along its own first singular direction.
        """
        codes = self(x).codes.sparse()
        if not len(codes.values):
            return []
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
        return [
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
        ]

    @torch.no_grad()
    def observe_(self, out: SAEOutput, ctx: StepContext) -> None:
        """The threshold; and the reach, early on."""
        super().observe_(out, ctx)
        if ctx.progress < REACH_SHARE:
            codes = out.codes.sparse()
            follow_reach_(self.reach, codes.values.detach(), codes.latents, ctx.rate)
