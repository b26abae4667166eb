"""Sparse heads whose decoder is a KAN: what a latent writes is a curve."""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.functional.curves import secant, straightness
from kanllama_lightning.functional.sparse import Pattern
from kanllama_lightning.heads.standardised import Standardised
from kanllama_lightning.types import InputError

STRAIGHT_POINTS = 32
"""Points on a latent's curve that its straightness is judged at."""
CURVES_AT_ONCE = 64
"""Latents whose curves exist at once."""
SECANTS_AT_ONCE = CURVES_AT_ONCE * STRAIGHT_POINTS
"""Latents whose secants are made at once."""


class KANDecoder(Standardised):
    """x_hat = f(z) - f(0) + b_dec with f a KAN: a silent latent contributes exactly nothing.

    There is no W_dec: what a latent writes is a curve, not a direction. `curve` gives it, and
    `functional.curves` says how straight it is (METHODS B6).

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self, d_model: int, d_sae: int, target_l0: int, alpha_aux: float = 1 / 32, seed: int = 0
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        del self.W_dec

    @abstractmethod
    def decode_kept(
        self, values: Float[Tensor, " nnz"], pattern: Pattern
    ) -> Float[Tensor, "tok d_model"]:
        """f(z) - f(0)."""

    def decode_dense(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """f(z) - f(0) of dense latents, in the head's units."""
        flat = (latents != 0).reshape(-1).nonzero().squeeze(1)
        return self.decode_kept(latents.reshape(-1)[flat], Pattern(flat, *latents.shape))

    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Reconstruction, in the LM's units, of dense latents."""
        return (self.decode_dense(latents) + self.b_dec) / self.scale

    def decode_some(
        self, latents: Float[Tensor, "tok some"], which: Int[Tensor, " some"]
    ) -> Float[Tensor, "tok d_model"]:
        """What some latents alone make."""
        row, column = latents.detach().nonzero(as_tuple=True)
        order = (row * self.d_sae + which[column]).argsort()
        row, column = row[order], column[order]
        pattern = Pattern(row * self.d_sae + which[column], len(latents), self.d_sae)
        return self.decode_kept(latents[row, column], pattern)

    @torch.no_grad()
    def curve(
        self, latent: int, points: Float[Tensor, " points"]
    ) -> Float[Tensor, "points d_model"]:
        """What one latent alone adds to the reconstruction at each activation; head's units."""
        which = torch.full((1,), latent, device=points.device)
        return self.decode_some(points[:, None], which)

    @abstractmethod
    def tangent(
        self, latents: Float[Tensor, "tok d_sae"], which: int
    ) -> Float[Tensor, "tok d_model"]:
        """df/dz of one latent at each code, in the head's units; the derivative of the planes is a
        central difference in fp64, all else is in closed form."""

    @torch.no_grad()
    def secant(
        self, latents: Int[Tensor, " n"], at: Float[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """D_j(a) = (f(a e_j) - f(0)) / a: what latents alone write per unit; head's units.

        Args:
            latents: Which.
            at: Activation of each, positive: the median of those on which it fires.
        """
        if not (at > 0).all():
            raise InputError("at: secants are of positive activations; leave out silent latents")
        flat = torch.arange(len(latents), device=latents.device) * self.d_sae + latents
        return secant(self.decode_kept(at, Pattern(flat, len(latents), self.d_sae)), at)

    @torch.no_grad()
    def directions(
        self, at: Float[Tensor, " d_sae"], x: Float[Tensor, "tok d_model"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """The secants at `at`: exact, where no latent counts for what another one writes."""
        found = at.new_full((self.d_sae, self.d_model), torch.nan)
        for some in (at > 0).nonzero().squeeze(1).split(SECANTS_AT_ONCE):
            found[some] = self.secant(some, at[some])
        return found

    @torch.no_grad()
    def straightness(
        self, latents: Int[Tensor, " n"], upto: Float[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """How straight the curves of latents alone are, 0 to 1; a direction from 0.95 on.

        Args:
            latents: Which.
            upto: End of each curve: the 0.99 quantile of its latent's positive activations.
        """
        steps = torch.linspace(0, 1, STRAIGHT_POINTS, device=upto.device)
        found = []
        for some, ends in zip(
            latents.split(CURVES_AT_ONCE), upto.split(CURVES_AT_ONCE), strict=True
        ):
            n = len(some) * STRAIGHT_POINTS
            which = some.repeat_interleave(STRAIGHT_POINTS)
            flat = torch.arange(n, device=some.device) * self.d_sae + which
            values = (ends.unsqueeze(1) * steps).reshape(-1)
            made = self.decode_kept(values, Pattern(flat, n, self.d_sae))
            found.append(straightness(made.view(len(some), STRAIGHT_POINTS, self.d_model)))
        return torch.cat(found)

    @torch.no_grad()
    def mean_jacobian(
        self, x: Float[Tensor, "tok d_model"], latents: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, " n"]]:
        """Mean of J_j = df/dz_j over the rows on which each latent fires, and its dispersion.

        Head's units. The dispersion is E|J - EJ|^2 / E|J|^2, 0 to 1: the share of what a latent
        writes at the margin that its mean direction misses; 0 where it is the same everywhere.
        NaN for a latent that does not fire.

        Args:
            x: Raw activations.
            latents: Which.
        """
        codes = self.encode(x)
        means, spreads = [], []
        for j in latents.tolist():
            J = self.tangent(codes[codes[:, j] > 0], j).double()
            mean = J.mean(0)
            means.append(mean)
            spreads.append((J - mean).square().sum() / J.square().sum())
        return torch.stack(means).float(), torch.stack(spreads).float()

    def bias(self) -> Float[Tensor, " d_sae"]:
        """b_enc alone: the encoder sees standardised activations, not x - b_dec."""
        return self.b_enc

    def project_grad_(self) -> None:
        """Nothing to project: there are no directions of norm 1."""

    def project_(self) -> None:
        """Nothing to project."""
