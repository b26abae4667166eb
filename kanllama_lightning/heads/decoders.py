"""Decoders: what latents write, along directions or along curves."""

from abc import ABC, abstractmethod
from collections.abc import Callable

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
    secant,
    straightness,
)
from kanllama_lightning.functional.planes import lifted_planes
from kanllama_lightning.functional.sparse import Pattern, rows_of, sparse_decode
from kanllama_lightning.functional.splines import greville, rows_at_once
from kanllama_lightning.heads.kan_linear import KANLinear
from kanllama_lightning.heads.reach import first_reach, follow_reach_
from kanllama_lightning.types import Codes, Curves, InputError, StepContext

BLOCK, GPU_BLOCK = 1 << 22, 1 << 25
"""Elements of the dictionary that are worked on at once, on the CPU and on a GPU."""
FREE_NORM = 0.1
"""Norm of the dictionary rows at the start where norms are free (METHODS A0)."""
ROUNDING = 1e-6
"""By which a direction is held inside its bound, so that rounding keeps it there."""
REACH_SHARE = 0.1
"""Share of the token budget during which the grid of curves follows the activations."""
STEP = 1e-5
"""Step of a central difference, in fp64, as a share of the reach."""
STRAIGHT_POINTS = 32
"""Points on a latent's curve that its straightness is judged at."""
CURVES_AT_ONCE = 64
"""Latents whose curves exist at once."""
SECANTS_AT_ONCE = CURVES_AT_ONCE * STRAIGHT_POINTS
"""Latents whose secants are made at once."""
ROWS = 1 << 24
"""Elements of the planes of the rows whose tangents are made at once."""


def first_directions(d_sae: int, d_model: int, seed: int) -> Float[Tensor, "d_sae d_model"]:
    """The dictionary every head of this shape and seed starts from: random, of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, d_model, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


@torch.no_grad()
def take_along_rows_(weight: Tensor) -> None:
    """Take from the gradient of each row, of norm 1, its part along the row; without one, nothing.

    Args:
        weight: The rows.
    """
    if weight.grad is None:
        return
    # in blocks of rows, so that their product stays in the cache, or small
    size = rows_at_once(weight, weight.shape[1], BLOCK, GPU_BLOCK)
    for grad, rows in zip(weight.grad.split(size), weight.split(size), strict=True):
        grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1.0)


@torch.no_grad()
def renormalise_rows_(weight: Tensor) -> None:
    """Make the norm of each row 1."""
    weight.div_(weight.norm(dim=1, keepdim=True))


class Decoder(nn.Module, ABC):
    """Latents to reconstructions without b_dec, in the head's units; no latent, no contribution.

    Args:
        directions: What each latent writes at the start, per unit.
    """

    keeps_rows: bool = True
    """Whether the projections see to `unit_rows`; if not, the optimizer does."""

    def __init__(self, directions: Float[Tensor, "d_sae d_model"]) -> None:
        super().__init__()
        self.d_sae, self.d_model = directions.shape

    @abstractmethod
    def first(self) -> Float[Tensor, "d_sae d_model"]:
        """What each latent writes per unit, before any training."""

    def start_(  # noqa: B027
        self, values: Float[Tensor, " nnz"], latents: Int[Tensor, " nnz"]
    ) -> None:
        """Set what follows from the first activations.

        Args:
            values: Latents of the start sample, positive.
            latents: Which latent each is of.
        """

    @abstractmethod
    def kept(self, values: Float[Tensor, " nnz"], pattern: Pattern) -> Float[Tensor, "tok d_model"]:
        """What kept latents add up to."""

    @abstractmethod
    def dense(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """What latents add up to."""

    @abstractmethod
    def some(
        self, latents: Float[Tensor, "tok some"], which: Int[Tensor, " some"]
    ) -> Float[Tensor, "tok d_model"]:
        """What some latents alone add up to."""

    def dead(
        self,
        latents: Float[Tensor, "tok n_dead"],
        which: Int[Tensor, " n_dead"],
        after: Tensor | None = None,
    ) -> Float[Tensor, "tok d_model"]:
        """What AuxK takes dead latents to write; `after`: what all of them wrote (`rows_of`)."""
        return self.some(latents, which)

    def sizes(
        self, acts: Float[Tensor, "tok n"], which: Int[Tensor, " n"]
    ) -> Float[Tensor, "tok n"]:
        """How much some latents write: by this AuxK takes the best dead ones of each token."""
        return acts

    @abstractmethod
    def directions(
        self,
        at: Float[Tensor, " d_sae"],
        codes: Callable[[], Float[Tensor, "tok d_sae"]],
    ) -> Float[Tensor, "d_sae d_model"]:
        """What each latent writes per unit; a row of NaN where it has no direction.

        Args:
            at: Activation of each latent, positive; NaN for a latent that does not fire.
            codes: Makes the latents of a sample, for decoders in which latents mix.
        """

    def straightness(
        self, latents: Int[Tensor, " n"], upto: Float[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """How straight what latents alone write is, 0 to 1."""
        return torch.ones_like(upto)

    def learned_curves(self, codes: Callable[[], Codes], top: int) -> list[Curves]:
        """Its curves over a sample, the most bent ones first.

        Args:
            codes: Makes the latents of the sample.
            top: Curves of each kind.
        """
        return []

    def observe_(self, codes: Codes, ctx: StepContext) -> None:  # noqa: B027
        """Update running statistics from a training batch."""

    @property
    def unit_rows(self) -> nn.Parameter | None:
        """The weight of which `project_` renormalises the rows and does no more; None without."""
        return None

    def project_grad_(self) -> None:  # noqa: B027
        """Drop what the projection would undo from the gradients."""

    def project_(self) -> None:  # noqa: B027
        """Bring the parameters back to where they belong, after a step."""


class UnitDirections(Decoder):
    """z W_dec: one direction of norm 1 per latent.

    Args:
        directions: The dictionary at the start.
    """

    W_dec: nn.Parameter | Tensor

    def __init__(self, directions: Float[Tensor, "d_sae d_model"]) -> None:
        super().__init__(directions)
        self.W_dec = nn.Parameter(directions.clone())

    def first(self) -> Float[Tensor, "d_sae d_model"]:
        """The dictionary."""
        return self.W_dec.detach()

    def kept(self, values: Float[Tensor, " nnz"], pattern: Pattern) -> Float[Tensor, "tok d_model"]:
        """The sum of kept latents times their directions."""
        return sparse_decode(values, pattern, self.W_dec)

    def dense(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """z W_dec."""
        return latents @ self.W_dec

    def some(
        self, latents: Float[Tensor, "tok some"], which: Int[Tensor, " some"]
    ) -> Float[Tensor, "tok d_model"]:
        """The sum of these latents times their directions, fp32."""
        return self.dead(latents, which)

    def dead(
        self,
        latents: Float[Tensor, "tok n_dead"],
        which: Int[Tensor, " n_dead"],
        after: Tensor | None = None,
    ) -> Float[Tensor, "tok d_model"]:
        """Likewise."""
        return (latents @ rows_of(self.W_dec, which, after)).float()

    def directions(
        self,
        at: Float[Tensor, " d_sae"],
        codes: Callable[[], Float[Tensor, "tok d_sae"]],
    ) -> Float[Tensor, "d_sae d_model"]:
        """The dictionary, whatever the activations."""
        return self.W_dec.detach()

    @property
    def unit_rows(self) -> nn.Parameter | None:
        """The dictionary, but for subclasses that project it in another way."""
        plain = type(self).project_ is UnitDirections.project_
        return self.W_dec if plain and isinstance(self.W_dec, nn.Parameter) else None

    @torch.no_grad()
    def project_grad_(self) -> None:
        """Take from each row's gradient its part along the row."""
        if self.keeps_rows:
            take_along_rows_(self.W_dec)

    @torch.no_grad()
    def project_(self) -> None:
        """Renormalise the rows to 1."""
        if self.keeps_rows:
            renormalise_rows_(self.W_dec)


class FreeDirections(UnitDirections):
    """z W_dec with rows w_j of any norm; latents are reported as z_j ||w_j||.

    That is what a latent writes along its unit direction: the number that stays the same when
    z_j is divided and w_j multiplied by some factor (METHODS A1). `dense` takes them.

    Args:
        directions: The dictionary at the start, of norm 1; it is scaled to `FREE_NORM`.
    """

    def __init__(self, directions: Float[Tensor, "d_sae d_model"]) -> None:
        super().__init__(directions * FREE_NORM)

    def row_norms(self) -> Float[Tensor, " d_sae"]:
        """||w_j||."""
        return self.W_dec.norm(dim=1)

    def dense(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """The reconstruction of latents z_j ||w_j||."""
        return super().dense(latents / self.row_norms().clamp_min(1e-30))

    def sizes(
        self, acts: Float[Tensor, "tok n"], which: Int[Tensor, " n"]
    ) -> Float[Tensor, "tok n"]:
        """p_j ||w_j|| (METHODS A3)."""
        return acts * self.row_norms()[which]

    def directions(
        self,
        at: Float[Tensor, " d_sae"],
        codes: Callable[[], Float[Tensor, "tok d_sae"]],
    ) -> Float[Tensor, "d_sae d_model"]:
        """w_j / ||w_j||, as the latents are z_j ||w_j||."""
        return (self.W_dec / self.row_norms().clamp_min(1e-30).unsqueeze(1)).detach()

    def project_grad_(self) -> None:
        """Nothing: norms are free."""

    def project_(self) -> None:
        """Nothing: norms are free."""


class FrozenDirections(UnitDirections):
    """z W_dec with the W_dec of the start, which is not trained."""

    def __init__(self, directions: Float[Tensor, "d_sae d_model"]) -> None:
        Decoder.__init__(self, directions)
        self.register_buffer("W_dec", directions.clone())

    def project_grad_(self) -> None:
        """Nothing: there is no gradient."""

    def project_(self) -> None:
        """Nothing: it does not move."""


class SoftlyFrozenDirections(UnitDirections):
    """z W_dec whose rows keep a cosine of at least `min_cosine` to where they started.

    After each step a row that has turned further is brought back to that angle, by the shortest
    way on the unit sphere.

    Args:
        directions: The dictionary at the start.
        min_cosine: Least cosine of a direction to its start.
    """

    W_start: Tensor

    def __init__(self, directions: Float[Tensor, "d_sae d_model"], min_cosine: float) -> None:
        super().__init__(directions)
        if not 0 <= min_cosine < 1:
            raise InputError(
                f"head.min_cosine={min_cosine}: must be from 0 to below 1 (default 0.8)"
            )
        self.min_cosine = min_cosine
        # follows from the seed, so it is not saved
        self.register_buffer("W_start", directions.clone(), persistent=False)

    @torch.no_grad()
    def project_(self) -> None:
        """Renormalise the rows to 1 and turn back those that turned too far."""
        super().project_()
        cosine = (self.W_dec * self.W_start).sum(1, keepdim=True)
        across = self.W_dec - cosine * self.W_start
        least = self.min_cosine + ROUNDING
        sine = (1 - least**2) ** 0.5
        length = across.norm(dim=1, keepdim=True)
        back = least * self.W_start + sine * across / length.clamp_min(ROUNDING)
        # one that points straight away from its start has no shortest way back
        back = torch.where(length > ROUNDING, back, self.W_start)
        self.W_dec.copy_(torch.where(cosine < least, back, self.W_dec))


class CurvedDecoder(Decoder):
    """f(z) - f(0) with f a KAN: what a latent writes is a curve, not a direction.

    `curve` gives it, and `straightness` says how near it is to a direction (METHODS B6).
    """

    def dense(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """f(z) - f(0)."""
        flat = (latents != 0).reshape(-1).nonzero().squeeze(1)
        return self.kept(latents.reshape(-1)[flat], Pattern(flat, *latents.shape))

    def some(
        self, latents: Float[Tensor, "tok some"], which: Int[Tensor, " some"]
    ) -> Float[Tensor, "tok d_model"]:
        """f - f(0) where all other latents are 0."""
        row, column = latents.detach().nonzero(as_tuple=True)
        order = (row * self.d_sae + which[column]).argsort()
        row, column = row[order], column[order]
        pattern = Pattern(row * self.d_sae + which[column], len(latents), self.d_sae)
        return self.kept(latents[row, column], pattern)

    @torch.no_grad()
    def curve(
        self, latent: int, points: Float[Tensor, " points"]
    ) -> Float[Tensor, "points d_model"]:
        """What one latent alone adds to the reconstruction at each activation."""
        which = torch.full((1,), latent, device=points.device)
        return self.some(points[:, None], which)

    @abstractmethod
    def tangent(
        self, latents: Float[Tensor, "tok d_sae"], which: int
    ) -> Float[Tensor, "tok d_model"]:
        """df/dz of one latent at each code; the derivative of the planes is a central difference
        in fp64, all else is in closed form."""

    @torch.no_grad()
    def secant(
        self, latents: Int[Tensor, " n"], at: Float[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """D_j(a) = (f(a e_j) - f(0)) / a: what latents alone write per unit.

        Args:
            latents: Which.
            at: Activation of each, positive: the median of those on which it fires.
        """
        if not (at > 0).all():
            raise InputError("at: secants are of positive activations; leave out silent latents")
        flat = torch.arange(len(latents), device=latents.device) * self.d_sae + latents
        return secant(self.kept(at, Pattern(flat, len(latents), self.d_sae)), at)

    @torch.no_grad()
    def directions(
        self,
        at: Float[Tensor, " d_sae"],
        codes: Callable[[], Float[Tensor, "tok d_sae"]],
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
            made = self.kept(values, Pattern(flat, n, self.d_sae))
            found.append(straightness(made.view(len(some), STRAIGHT_POINTS, self.d_model)))
        return torch.cat(found)

    @torch.no_grad()
    def mean_jacobian(
        self, codes: Float[Tensor, "tok d_sae"], latents: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, " n"]]:
        """Mean of J_j = df/dz_j over the rows on which each latent fires, and its dispersion.

        The dispersion is E|J - EJ|^2 / E|J|^2, 0 to 1: the share of what a latent writes at the
        margin that its mean direction misses; 0 where it is the same everywhere. NaN for a latent
        that does not fire.

        Args:
            codes: Latents of a sample.
            latents: Which.
        """
        means, spreads = [], []
        for j in latents.tolist():
            J = self.tangent(codes[codes[:, j] > 0], j).double()
            mean = J.mean(0)
            means.append(mean)
            spreads.append((J - mean).square().sum() / J.square().sum())
        return torch.stack(means).float(), torch.stack(spreads).float()


class AdditiveCurves(CurvedDecoder):
    """sum_j psi_j(z_j): what a latent writes depends on itself alone.

    psi_j(z) = R_j sum_p plane_p(z / R_j) row_jp, with planes that are 0 at 0, so that all curves go
    through it. R_j is the reach of latent j, which follows its activations for the first tenth of
    the budget (METHODS B3c, B5 iii). All curves are lines at the start.

    Args:
        directions: Those of the lines.
    """

    reach: Tensor

    def __init__(self, directions: Float[Tensor, "d_sae d_model"]) -> None:
        super().__init__(directions)
        self.register_buffer("reach", torch.ones(self.d_sae))

    @abstractmethod
    def planes(
        self, u: Float[Tensor, " n"], latents: Int[Tensor, " n"]
    ) -> Float[Tensor, "n planes"]:
        """Planes of latents at activations over their reach."""

    @abstractmethod
    def plane_rows(
        self, latents: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n planes d_model"]:
        """What each plane of some latents writes, or of all."""

    @abstractmethod
    def set_lines_(self, directions: Float[Tensor, "d_sae d_model"]) -> None:
        """Make every curve a line."""

    @torch.no_grad()
    def start_(self, values: Float[Tensor, " nnz"], latents: Int[Tensor, " nnz"]) -> None:
        """The first reach of every latent, and lines for curves."""
        self.reach.copy_(first_reach(values, latents, self.d_sae))
        self.set_lines_(self.first())

    def dead(
        self,
        latents: Float[Tensor, "tok n_dead"],
        which: Int[Tensor, " n_dead"],
        after: Tensor | None = None,
    ) -> Float[Tensor, "tok d_model"]:
        """Along lines from 0 to the curves at their reach.

        A dead latent's activations are small. The curve itself would show AuxK only its beginning,
        which no firing has shaped, and which may point anywhere.
        """
        at_reach = self.planes(torch.ones_like(self.reach[which]), which)
        lines = torch.einsum("jp,jpd->jd", at_reach, self.plane_rows(which))
        return latents @ lines

    def tangent(
        self, latents: Float[Tensor, "tok d_sae"], which: int
    ) -> Float[Tensor, "tok d_model"]:
        """psi_j'(z): the decoder is additive, so no other latent counts."""
        u = (latents[:, which] / self.reach[which]).double()
        own = torch.full((len(u),), which, device=u.device)
        ahead, behind = (self.planes(u + step, own) for step in (STEP, -STEP))
        rows = self.plane_rows(torch.full((1,), which, device=u.device))[0]
        return ((ahead - behind) / (2 * STEP)).to(rows.dtype) @ rows

    @torch.no_grad()
    def learned_curves(self, codes: Callable[[], Codes], top: int) -> list[Curves]:
        """The latents.

        One writes a curve in d_model dimensions: its size and bend are over all of them, and drawn
        is how it looks along its own first singular direction.
        """
        kept = codes().sparse()
        if not len(kept.values):
            return []
        reach, n = self.reach, self.d_sae
        u = kept.values / reach[kept.latents]
        moments = kept_covariances(u, self.planes(u, kept.latents), kept.latents, n)
        size, bend = pooled(*edge_bends(self.plane_rows().permute(2, 1, 0), moments), dim=0)
        size *= reach
        fired = kept.fired()
        beyond = torch.bincount(kept.latents[u > 1], minlength=n)
        best = ranked(size, bend, min(top, int((fired > 0).sum())))
        best = best[fired[best] > 0]  # the rest has no curve to draw, and size 0
        seen = [kept.values[kept.latents == j] for j in best.tolist()]
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
    def observe_(self, codes: Codes, ctx: StepContext) -> None:
        """Let the reach follow the activations, early on."""
        if ctx.progress < REACH_SHARE:
            kept = codes.sparse()
            follow_reach_(self.reach, kept.values.detach(), kept.latents, ctx.rate)


class LatentCurves(AdditiveCurves):
    """A KAN layer from the latents to the activation: psi_j(z) = R_j (f_j(z / R_j) - f_j(0)).

    Every coordinate of f_j is a SiLU and a cubic B-spline on [0, 1] with linear tails.

    Args:
        d_sae: Number of latents.
        d_model: Width of the activations.
        grid_size: Cells between 0 and a latent's reach.
        seed: That of the head.
    """

    def __init__(self, d_sae: int, d_model: int, grid_size: int, seed: int) -> None:
        directions = first_directions(d_sae, d_model, seed)
        super().__init__(directions)
        self.seed, self.grid_size = seed, grid_size
        self.psi: Float[nn.Parameter, "d_sae planes d_model"] = nn.Parameter(
            torch.zeros(d_sae, 1 + grid_size + 3, d_model)
        )
        self.set_lines_(directions)

    def first(self) -> Float[Tensor, "d_sae d_model"]:
        """The directions of the lines."""
        return first_directions(self.d_sae, self.d_model, self.seed).to(self.psi.detach())

    @torch.no_grad()
    def set_lines_(self, directions: Float[Tensor, "d_sae d_model"]) -> None:
        """Make every curve a line."""
        line = greville(0, 1, self.grid_size).to(directions)
        self.psi[:, 0] = 0
        self.psi[:, 1:] = line[:, None] * directions[:, None, :]

    def planes(
        self, u: Float[Tensor, " n"], latents: Int[Tensor, " n"]
    ) -> Float[Tensor, "n planes"]:
        """SiLU and bases, the same for all latents."""
        return lifted_planes(u, self.grid_size)

    def plane_rows(
        self, latents: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n planes d_model"]:
        """Their weights."""
        return self.psi if latents is None else self.psi[latents]

    def kept(self, values: Float[Tensor, " nnz"], pattern: Pattern) -> Float[Tensor, "tok d_model"]:
        """The sum of the kept latents' curves: sparse in planes as the code is in latents."""
        reach = self.reach[pattern.latents]
        planes = reach[:, None] * self.planes(values / reach, pattern.latents)
        n = planes.shape[1]
        flat = pattern.flat[:, None] * n + torch.arange(n, device=planes.device)
        wide = Pattern(flat.reshape(-1), pattern.n_rows, pattern.n_latents * n)
        return sparse_decode(planes.reshape(-1), wide, self.psi.flatten(0, 1))


class MixingKAN(CurvedDecoder):
    """f(z) - f(0), f(z) = KAN(ReLU(z V + c_out) / R): latents mix in it.

    What one writes depends on which others are on. The layer's grid lies on its inputs: [0, 1] of
    their reach R in the start sample, with linear tails (METHODS B5 iii).

    Args:
        V: Weights of the hidden units at the start.
        kan_out: The KAN layer, from the hidden units to d_model.
    """

    reach: Tensor

    def __init__(self, V: Float[Tensor, "d_sae hidden"], kan_out: KANLinear) -> None:
        super().__init__(V.new_empty(len(V), kan_out.out_features))
        self.kan_out = kan_out
        self.c_out = nn.Parameter(torch.zeros(V.shape[1]))
        self.V = nn.Parameter(V.clone())
        self.register_buffer("reach", torch.ones(V.shape[1]))

    def first(self) -> Float[Tensor, "d_sae d_model"]:
        """Nothing: latents have no directions of their own here."""
        raise NotImplementedError(type(self).__name__)

    @torch.no_grad()
    def start_from_(self, values: Float[Tensor, " nnz"], pattern: Pattern) -> None:
        """The reach of the hidden units over the latents of the start sample."""
        widest = torch.relu(sparse_decode(values, pattern, self.V) + self.c_out).amax(0)
        known = widest > 0
        middle = widest[known].median() if known.any() else widest.new_ones(())
        self.reach.copy_(torch.where(known, widest, middle))

    def kept(self, values: Float[Tensor, " nnz"], pattern: Pattern) -> Float[Tensor, "tok d_model"]:
        """f(z) - f(0)."""
        return self._written(sparse_decode(values, pattern, self.V))

    def dead(
        self,
        latents: Float[Tensor, "tok n_dead"],
        which: Int[Tensor, " n_dead"],
        after: Tensor | None = None,
    ) -> Float[Tensor, "tok d_model"]:
        """Along lines, for every edge from its curve at 0 to that at the reach of its hidden unit.

        The curves themselves would cost a second decoding, and all but their beginnings are out of
        a dead latent's sight.
        """
        hidden = torch.relu((latents @ self.V[which]).float() + self.c_out) - self.c_out.relu()
        ends = torch.stack([torch.zeros_like(self.reach), torch.ones_like(self.reach)])
        at_0, at_reach = self.kan_out.features(ends)
        lines = (self.kan_out.weight * (at_reach - at_0).float()).sum(1)
        return (hidden / self.reach) @ lines.T

    def _written(self, summed: Float[Tensor, "tok hidden"]) -> Float[Tensor, "tok d_model"]:
        """f(z) - f(0) of z V."""
        hidden = torch.relu(torch.cat([summed, summed.new_zeros(1, summed.shape[1])]) + self.c_out)
        made: Tensor = self.kan_out(hidden / self.reach)
        return made[:-1] - made[-1]

    def tangent(
        self, latents: Float[Tensor, "tok d_sae"], which: int
    ) -> Float[Tensor, "tok d_model"]:
        """Through the hidden units that are on: what else fires decides which those are."""
        n_planes = self.kan_out.weight[0].numel()
        weights = self.kan_out.weight.flatten(1).T
        made = []
        for rows in latents.split(max(1, ROWS // n_planes)):
            hidden = rows @ self.V + self.c_out
            u = (hidden.relu() / self.reach).double()
            ahead, behind = (self.kan_out.features(u + step) for step in (STEP, -STEP))
            slopes = (ahead - behind) / (2 * STEP)
            moved = (hidden > 0) * self.V[which] / self.reach
            made.append((slopes * moved.unsqueeze(1)).flatten(1).to(weights.dtype) @ weights)
        return torch.cat(made)

    def directions(
        self,
        at: Float[Tensor, " d_sae"],
        codes: Callable[[], Float[Tensor, "tok d_sae"]],
    ) -> Float[Tensor, "d_sae d_model"]:
        """The mean Jacobian over a sample; NaN for a latent that does not fire there."""
        return self.mean_jacobian(codes(), torch.arange(self.d_sae, device=at.device))[0]

    def learned_curves(self, codes: Callable[[], Codes], top: int) -> list[Curves]:
        """The edges."""
        kept = codes().sparse()
        pattern = Pattern(kept.rows * self.d_sae + kept.latents, kept.n_rows, self.d_sae)
        hidden = torch.relu(sparse_decode(kept.values, pattern, self.V) + self.c_out)
        return self.kan_out.curves(
            hidden / self.reach,
            top,
            ends=("hidden", "output"),
            axes=("hidden unit over its reach", "added to the reconstruction, head's units"),
            kind="decoder edge",
        )
