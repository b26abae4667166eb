"""SplineLatent: one learned curve per latent, with a hard zero."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from kanllama_lightning.functional.curves import (
    densities,
    edge_bends,
    kept_covariances,
    pooled,
    ranked,
)
from kanllama_lightning.functional.sparse import Pattern
from kanllama_lightning.functional.spline_activation import spline_values
from kanllama_lightning.functional.splines import greville, spline_bases
from kanllama_lightning.heads.reach import first_reach, follow_reach_
from kanllama_lightning.heads.thresholded import Thresholded
from kanllama_lightning.types import Curves, InputError, SAEOutput, StepContext


class SplineLatent(Thresholded):
    """z_j = R_j (S_j(p_j / R_j) - S_j(0)) for kept p_j > 0, 0 elsewhere; p linear, linear W_dec.

    S_j is a cubic B-spline on a grid of [0, 1], continued linearly beyond R_j, the reach of latent
    j's activations. Selection (BatchTopK, then a threshold) looks at p; only kept values are
    evaluated. At the start S_j is the identity: step 0 equals the linear `BatchTopK` head of the
    same seed to 1e-5. While the first `frozen_share` of the budget is trained the splines rest and
    R_j follows the activations; then R_j rests and the splines are trained. `monotone` makes the
    coefficients a running sum of softplus, so that a larger activation is more of the feature.
    Loss: FVU + AuxK + smoothness * mean_j sum_c (second difference of S_j's coefficients)^2.
    After KAN-SAE (arXiv 2605.17493), with a hard zero and a structural sparsity in its place.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        grid_size: Cells between 0 and a latent's reach.
        monotone: Whether the curves can only rise.
        frozen_share: Share of the token budget in which the splines rest.
        smoothness: Weight of the penalty on second differences.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    in_units = (*Thresholded.in_units, "reach")
    reach: Tensor
    free: Tensor
    smallest: Tensor

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        grid_size: int = 5,
        monotone: bool = True,
        frozen_share: float = 0.1,
        smoothness: float = 1e-3,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        if grid_size < 1:
            raise InputError(f"head.grid_size={grid_size}: must be at least 1 (default 5)")
        if not 0 <= frozen_share < 1:
            raise InputError(f"head.frozen_share={frozen_share}: must be from 0 to below 1")
        if not smoothness >= 0:
            raise InputError(f"head.smoothness={smoothness}: must be 0 or more (default 1e-3)")
        self.grid_size, self.monotone = grid_size, monotone
        self.frozen_share, self.smoothness = frozen_share, smoothness
        identity = greville(0, 1, grid_size).float()
        if monotone:
            identity = identity.diff().expm1().log()  # the inverse of softplus
        self.spline = nn.Parameter(identity[:, None].repeat(1, d_sae))
        self.register_buffer("reach", torch.ones(d_sae))
        self.register_buffer("free", torch.zeros(()))  # 1 once the splines are trained
        self.register_buffer("smallest", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """As a linear head, and the first reach of every latent."""
        super().start_(x)
        values, pattern = self.kept(x[:8192])
        self.reach.copy_(first_reach(values, pattern.latents, self.d_sae))

    def coefficients(self) -> Float[Tensor, "bases d_sae"]:
        """Spline coefficients, in units of the reach."""
        if not self.monotone:
            return self.spline
        rising = F.softplus(self.spline).cumsum(0)
        return torch.cat([torch.zeros_like(rising[:1]), rising])

    def activate(self, values: Float[Tensor, " nnz"], pattern: Pattern) -> Float[Tensor, " nnz"]:
        """The curves at kept pre-activations."""
        if self.training:
            kept = values.detach()
            self.smallest.copy_(kept.min() if len(kept) else kept.new_full((), torch.inf))
        return self.curve(values, pattern.latents)

    def curve(self, values: Float[Tensor, " n"], latents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """z of positive pre-activations `values` of `latents`."""
        coefficients = self.coefficients()
        at_zero = spline_bases(values.new_zeros(1, 1), 0, 1, self.grid_size).reshape(-1)
        lifted = coefficients - at_zero @ coefficients  # bases sum to 1: S - S(0)
        reach = self.reach[latents]
        z = spline_values(
            values / reach, latents, lifted, 0.0, 1.0, self.grid_size, linear_tails=True
        )
        return (reach * z).relu()

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """Latents, each over the kept pre-activations of its own."""
        kept, pattern = self.kept(x)
        latents, n = pattern.latents, self.d_sae
        if not len(kept):
            return []
        z = self.activate(kept, pattern).unsqueeze(1)
        moments = kept_covariances(kept, z, latents, n)
        size, bend = (a[0] for a in edge_bends(z.new_ones(1, 1, n), moments))
        fired = torch.bincount(latents, minlength=n)
        beyond = torch.bincount(latents[kept > self.reach[latents]], minlength=n)
        best = ranked(size, bend, min(top, int((fired > 0).sum())))
        best = best[fired[best] > 0]  # the rest has no curve to draw, and size 0
        points, density = densities([kept[latents == j] for j in best.tolist()], start=0.0)
        which = best.repeat_interleave(points.shape[1])
        return [
            Curves(
                "latent",
                [f"latent {j}" for j in best.tolist()],
                ("kept pre-activation, head's units", "latent, head's units"),
                points,
                self.curve(points.reshape(-1), which).view_as(points),
                density,
                bend[best],
                size[best],
                (beyond / fired)[best],
                pooled(size, bend)[1].item(),
                (beyond.sum() / fired.sum()).item(),
            )
        ]

    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """`reconstruction`, `smooth`, and `auxk` while latents are dead."""
        terms = super().losses(x, out, ctx)
        if self.smoothness:
            bend = self.coefficients().diff(n=2, dim=0).square().sum(0).mean()
            terms["smooth"] = self.smoothness * bend
        return terms

    @torch.no_grad()
    def observe_(self, out: SAEOutput, ctx: StepContext) -> None:
        """Follow the smallest kept pre-activation; and the reach, as long as the splines rest."""
        codes = out.codes.sparse()
        smallest = self.smallest.reshape(1) if len(codes.values) else codes.values
        super().observe_(out._replace(codes=codes._replace(values=smallest)), ctx)
        if ctx.progress < self.frozen_share:
            follow_reach_(self.reach, codes.values, codes.latents, ctx.rate)
        else:
            self.free.fill_(1.0)

    @torch.no_grad()
    def project_grad_(self) -> None:
        """As for a linear head; and no gradient for splines that rest."""
        super().project_grad_()
        if self.spline.grad is not None:
            self.spline.grad.mul_(self.free)
