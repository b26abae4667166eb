"""Bends: what a latent writes is a direction, and a second one by a curve of its activation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kanllama_lightning.functional.planes import lifted_planes
from kanllama_lightning.functional.sparse import Pattern, rows_of, sparse_decode
from kanllama_lightning.heads.decoders import (
    AdditiveCurves,
    first_directions,
    renormalise_rows_,
    take_along_rows_,
)
from kanllama_lightning.heads.hidden_units import own_stream
from kanllama_lightning.types import InputError

SHAPES = ("spline", "hinges", "powers")
"""What g may be made of: cubic B-splines, straight pieces with kinks, or u^2 and u^3."""


class Bends(AdditiveCurves):
    """sum_j z_j u_j + R_j g_j(z_j / R_j) v_j, with u_j and v_j of norm 1 and g_j(0) = 0.

    g_j has a few coefficients, 0 at the start. So a latent costs two rows where a curve of every
    coordinate (`LatentCurves`) costs nine, and stays one number per token.

    Args:
        d_sae: Number of latents.
        d_model: Width of the activations.
        shape: What g_j is made of.
        grid_size: Cells between 0 and a latent's reach, of splines and hinges.
        seed: That of the head.
    """

    def __init__(self, d_sae: int, d_model: int, shape: str, grid_size: int, seed: int) -> None:
        directions = first_directions(d_sae, d_model, seed)
        super().__init__(directions)
        if grid_size < 1:
            raise InputError(f"head.grid_size={grid_size}: must be 1 or more (default 5)")
        if shape not in SHAPES:
            raise InputError(f"head.shape={shape!r}: must be one of {', '.join(SHAPES)}")
        self.shape, self.grid_size, self.seed = shape, grid_size, seed
        self.W_dec = nn.Parameter(directions)
        across = torch.randn(d_sae, d_model, generator=own_stream(seed))
        self.W_bend = nn.Parameter(across / across.norm(dim=1, keepdim=True))
        n = self._features(torch.zeros(1)).shape[1]
        self.bend: Float[nn.Parameter, "d_sae features"] = nn.Parameter(torch.zeros(d_sae, n))

    def first(self) -> Float[Tensor, "d_sae d_model"]:
        """The first directions."""
        return self.W_dec.detach()

    @torch.no_grad()
    def set_lines_(self, directions: Float[Tensor, "d_sae d_model"]) -> None:
        """Make every curve a line."""
        self.W_dec.copy_(directions)
        self.bend.zero_()

    def _features(self, u: Float[Tensor, " n"]) -> Float[Tensor, "n features"]:
        """What g is a sum of: 0 at 0, and straight beyond the reach."""
        if self.shape == "powers":
            inside, beyond = u.clamp_max(1), (u - 1).clamp_min(0)
            return torch.stack([inside**n + n * beyond for n in (2, 3)], 1)
        order = 3 if self.shape == "spline" else 1
        return lifted_planes(u, self.grid_size, order)[:, 1:]  # without the SiLU

    def bends(self, u: Float[Tensor, " n"], latents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """g_j(u) of latents at activations over their reach."""
        return (self._features(u) * self.bend[latents]).sum(1)

    def planes(
        self, u: Float[Tensor, " n"], latents: Int[Tensor, " n"]
    ) -> Float[Tensor, "n planes"]:
        """u and g_j(u)."""
        return torch.stack([u, self.bends(u, latents)], 1)

    def plane_rows(
        self, latents: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n planes d_model"]:
        """Their two directions."""
        both = (self.W_dec, self.W_bend)
        return torch.stack([w if latents is None else w[latents] for w in both], 1)

    def kept(self, values: Float[Tensor, " nnz"], pattern: Pattern) -> Float[Tensor, "tok d_model"]:
        """Lines and bends of the kept latents, each as sparse as the code."""
        reach = self.reach[pattern.latents]
        bent = reach * self.bends(values / reach, pattern.latents)
        lines = sparse_decode(values, pattern, self.W_dec)
        return lines + sparse_decode(bent, pattern, self.W_bend)

    def dead(
        self,
        latents: Float[Tensor, "tok n_dead"],
        which: Int[Tensor, " n_dead"],
        after: Tensor | None = None,
    ) -> Float[Tensor, "tok d_model"]:
        """Along lines from 0 to the curves at their reach."""
        bent = latents * self.bends(torch.ones_like(self.reach[which]), which)
        lines = latents @ rows_of(self.W_dec, which, after)
        return (lines + bent @ rows_of(self.W_bend, which, after)).float()

    def project_grad_(self) -> None:
        """Take from each row's gradient its part along the row."""
        for weight in (self.W_dec, self.W_bend):
            take_along_rows_(weight)

    def project_(self) -> None:
        """Renormalise the rows to 1."""
        for weight in (self.W_dec, self.W_bend):
            renormalise_rows_(weight)
