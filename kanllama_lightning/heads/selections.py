"""Selections that keep some activations and drop the rest: TopK and its kin."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from kanllama_lightning.functional import ranks, sparse
from kanllama_lightning.functional.curves import (
    densities,
    edge_bends,
    kept_covariances,
    pooled,
    ranked,
)
from kanllama_lightning.functional.shard import SHARD
from kanllama_lightning.functional.sparse import (
    Pattern,
    SparseCodes,
    Sums,
    filled_up,
    fixed_sizes,
    largest_positive,
    sparse_decode,
)
from kanllama_lightning.functional.spline_activation import spline_values
from kanllama_lightning.functional.splines import greville, spline_bases
from kanllama_lightning.heads.decoders import Decoder, UnitDirections
from kanllama_lightning.heads.reach import first_reach, follow_reach_
from kanllama_lightning.types import ByProducts, Codes, Curves, InputError, SAEOutput, StepContext

log = logging.getLogger(__name__)

CALIBRATION_ROWS = 2048
"""Rows whose activations exist at once while calibrating."""


class Selected(NamedTuple):
    """What a selection makes of the pre-activations of a batch."""

    codes: Codes
    decoded: Float[Tensor, "tok d_model"]
    """Their reconstruction without b_dec, in the head's units."""
    by_products: ByProducts | None = None
    """What the losses need beside it."""


class LossBatch(NamedTuple):
    """What the loss terms of a selection are made from."""

    x: Float[Tensor, "tok d_model"]
    """Activations, in the head's units."""
    out: SAEOutput
    ctx: StepContext
    variance: Float[Tensor, ""]
    """V, the unit of the loss (METHODS A3)."""
    base: Float[Tensor, "*tok d_model"]
    """What is written besides what latents write: b_dec, and on every row what a skip adds."""
    decoder: Decoder


class Selection(nn.Module, ABC):
    """From pre-activations p to latents z: which of them there are, and their values."""

    in_units: ClassVar[tuple[str, ...]] = ()
    """Parameters and buffers that are in units of activations, so that they fold (METHODS 0.1)."""
    least: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """The smallest numbers that tensors of a saved head may hold."""

    most: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """The largest numbers that tensors of a saved head may hold, where `LARGEST` is too large."""

    @abstractmethod
    def forward(
        self,
        sums: Sums,
        decoder: Decoder,
        variance: Float[Tensor, ""],
    ) -> Selected:
        """Latents and what they decode to; as in training if `self.training`.

        Args:
            sums: p, not yet multiplied out.
            decoder: What latents write.
            variance: V, whose root is the unit of thresholds and penalties.
        """

    @abstractmethod
    def first(
        self,
        pre_acts: Float[Tensor, "tok d_sae"],
        decoder: Decoder,
        variance: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, "tok d_model"], Float[Tensor, " nnz"], Int[Tensor, " nnz"]]:
        """What p decodes to along the first directions; the latents, and which each is of."""

    def losses(
        self, batch: LossBatch, terms: dict[str, Float[Tensor, ""]]
    ) -> dict[str, Float[Tensor, ""]]:
        """Loss terms, already weighted, to be added to those of every head or put in their place.

        Args:
            batch: The batch.
            terms: Those of every head.
        """
        return {}

    def dead_acts(self, pre_acts: Float[Tensor, "tok n_dead"]) -> Float[Tensor, "tok n_dead"]:
        """Activations that AuxK gives dead latents: ReLU(p), as they would have were they kept."""
        return pre_acts.relu()

    def observe_(  # noqa: B027
        self,
        out: SAEOutput,
        ctx: StepContext,
        scale: Float[Tensor, ""],
        variance: Float[Tensor, ""],
    ) -> None:
        """Update running statistics from a training batch."""

    def calibrate_(  # noqa: B027
        self,
        x: Float[Tensor, "tok d_model"],
        pre_acts: Callable[[Float[Tensor, "some d_model"]], Float[Tensor, "some d_sae"]],
    ) -> None:
        """Set what inference needs from raw training activations and what p is of them."""

    @property
    def makeshift(self) -> str | None:
        """What inference makes do with, in words, where `calibrate_` has not been called."""
        return None

    def project_grad_(self) -> None:  # noqa: B027
        """Drop what the projection would undo from the gradients."""

    def project_(self, variance: Float[Tensor, ""]) -> None:  # noqa: B027
        """Bring the parameters back to where they belong, after a step."""

    def learned_curves(self, sums: Callable[[], Sums], top: int) -> list[Curves]:
        """Its curves over a sample, the most bent ones first.

        Args:
            sums: Makes the pre-activations of the sample.
            top: Curves of each kind.
        """
        return []

    def diagnostics(self) -> dict[str, Float[Tensor, ""]]:
        """Numbers worth logging."""
        return {}


class Selecting(Selection):
    """z is the kept part of ReLU(p); a subclass says which part (`select`).

    After the selection nothing of shape [tok d_sae] is held: decoding and all gradients touch
    kept activations only.
    """

    @abstractmethod
    def select(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " nnz"]:
        """Flat positions, ascending, of the activations to keep: all that are not 0 by ReLU(p).

        All of them are positive, but for a training step in `fixed_sizes`.
        """

    def kept(self, sums: Sums) -> tuple[Float[Tensor, " nnz"], Pattern]:
        """The pre-activations that are kept, and where they are."""
        with torch.no_grad():
            pre = sums.dense()
            pattern = Pattern(self.select(pre), *pre.shape)
            values = pre.reshape(-1).index_select(0, pattern.flat)
            del pre
        return sums.tied(values, pattern), pattern

    def activate(self, values: Float[Tensor, " nnz"], pattern: Pattern) -> Float[Tensor, " nnz"]:
        """Latents from kept (positive) pre-activations: themselves, unless a subclass differs."""
        return values

    def forward(
        self,
        sums: Sums,
        decoder: Decoder,
        variance: Float[Tensor, ""],
    ) -> Selected:
        """The kept latents, and what they decode to."""
        values, pattern = self.kept(sums)
        with torch.autocast(values.device.type, enabled=False):
            values = self.activate(values, pattern)
            decoded = decoder.kept(values, pattern)
        shape = pattern.n_rows, pattern.n_latents
        return Selected(SparseCodes(values, pattern.rows, pattern.latents, *shape), decoded)

    def first(
        self,
        pre_acts: Float[Tensor, "tok d_sae"],
        decoder: Decoder,
        variance: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, "tok d_model"], Float[Tensor, " nnz"], Int[Tensor, " nnz"]]:
        """The kept pre-activations along the directions."""
        pattern = Pattern(self.select(pre_acts), *pre_acts.shape)
        values = filled_up(pre_acts.reshape(-1).index_select(0, pattern.flat))
        return sparse_decode(values, pattern, decoder.first()), values, pattern.latents


def smallest_of(kept: Float[Tensor, " nnz"]) -> Float[Tensor, ""]:
    """The smallest kept activation, infinite where nothing is kept."""
    if fixed_sizes(kept):
        kept = kept.masked_fill(kept <= 0, torch.inf)
    return kept.min() if len(kept) else kept.new_full((), torch.inf)


class TokenTopK(Selecting):
    """The k largest positive pre-activations of each token, in training and at inference.

    Args:
        k: How many; zeros do not count.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def select(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " nnz"]:
        """The k largest positive ones of a token; of equal ones any."""
        shard = SHARD.get()
        k = self.k if shard is None else min(self.k, pre_acts.shape[1])
        top = pre_acts.topk(k, dim=1, sorted=False)
        latents, order = top.indices.sort(dim=1)
        first = torch.arange(len(pre_acts), device=pre_acts.device) * pre_acts.shape[1]
        flat = latents + first[:, None]
        if shard is None and self.training and pre_acts.device.type not in sparse.COUNTED_ON:
            return flat.reshape(-1)
        values = top.values.gather(1, order)
        kept = values > 0
        if shard is not None:
            kept &= shard.among(values, self.k, k)
        return flat[kept]


class Thresholded(Selecting):
    """Training keeps the batch's k * tokens largest, inference what is above theta.

    theta is tracked as a moving average of the smallest kept activation, and set exactly by
    `calibrate_`: the value at which training activations have mean L0 = k. Both are saved;
    inference takes the calibrated one when there is one.

    Args:
        k: Kept latents per token on average.
    """

    in_units: ClassVar[tuple[str, ...]] = ("threshold", "threshold_ema")
    # a threshold of 0 keeps all that is positive: that of too few positive activations
    least: ClassVar[Mapping[str, float]] = MappingProxyType(
        {"threshold": 0.0, "threshold_ema": 0.0, "threshold_ema_weight": 0.0}
    )
    threshold: Tensor
    threshold_ema: Tensor
    threshold_ema_weight: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("threshold", torch.full((), torch.nan))
        self.register_buffer("threshold_ema", torch.zeros(()))
        self.register_buffer("threshold_ema_weight", torch.zeros(()))
        self._warned = False

    def select(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " nnz"]:
        """In training the batch's largest, at inference everything above the threshold."""
        if self.training:
            return largest_positive(pre_acts, self.k * len(pre_acts))[0]
        theta = self.inference_threshold()
        if theta is None:
            if not self._warned:
                log.warning("this head has no threshold yet: %s", self.makeshift)
                self._warned = True
            flat = largest_positive(pre_acts, self.k * len(pre_acts))[0]
            return flat[pre_acts.reshape(-1)[flat] > 0]
        return (pre_acts > theta).reshape(-1).nonzero().squeeze(1)

    def inference_threshold(self) -> Float[Tensor, ""] | None:
        """The calibrated threshold, else the moving average, else None."""
        if not self.threshold.isnan():
            return self.threshold
        if self.threshold_ema_weight > 0:
            return self.threshold_ema / self.threshold_ema_weight
        return None

    @property
    def makeshift(self) -> str | None:
        """The moving average of training, or the batch at hand."""
        if not self.threshold.isnan():
            return None
        if self.inference_threshold() is not None:
            return "the moving average of training takes its place, and L0 is near its target only"
        return (
            "the largest activations of the batch at hand are kept instead, so its L0 is the "
            "target by construction"
        )

    @torch.no_grad()
    def observe_(
        self,
        out: SAEOutput,
        ctx: StepContext,
        scale: Float[Tensor, ""],
        variance: Float[Tensor, ""],
    ) -> None:
        """Move the average towards the batch's smallest kept activation (bias-corrected)."""
        assert isinstance(out.codes, SparseCodes)
        self._track(out.codes.values.detach().float(), ctx.rate)

    def _track(self, kept: Float[Tensor, " nnz"], rate: float) -> None:
        # where a process keeps nothing, the others' smallest counts
        smallest = smallest_of(kept)
        if ranks.POOLED.get():
            smallest = ranks.smallest(smallest)
        shard = SHARD.get()
        if shard is not None:
            smallest = shard.smallest(smallest)
        by = (smallest < torch.inf) * rate
        self.threshold_ema.lerp_(smallest.nan_to_num(posinf=0.0), by)
        self.threshold_ema_weight.lerp_(torch.ones_like(self.threshold_ema_weight), by)

    @torch.no_grad()
    def calibrate_(
        self,
        x: Float[Tensor, "tok d_model"],
        pre_acts: Callable[[Float[Tensor, "some d_model"]], Float[Tensor, "some d_sae"]],
    ) -> None:
        """Set the threshold at which these raw training activations have the target L0, exactly."""
        wanted = self.k * len(x)
        best = self.threshold.new_zeros(0)
        for chunk in x.split(CALIBRATION_ROWS):
            acts = pre_acts(chunk).reshape(-1)
            floor = best.min() if len(best) >= wanted else 0.0
            best = torch.cat([best, acts[acts > floor]])
            if len(best) > wanted:
                best = best.topk(wanted, sorted=False).values
        # with too few positive activations everything positive is kept
        cutoff = best.min() if len(best) >= wanted else best.new_zeros(())
        self.threshold.copy_(torch.nextafter(cutoff, torch.zeros_like(cutoff)))


class Nested(Thresholded):
    """The latents of `Thresholded`, of which nested prefixes each reconstruct x.

    The reconstruction loss is the mean over the prefixes:
    1/G sum_g ||x - b_dec - z[:m_g] W_dec[:m_g]||^2 / V.

    Args:
        k: Kept latents per token on average.
        ends: Sizes of the prefixes, rising; the last one is the number of latents.
    """

    inner_ends: Tensor

    def __init__(self, k: int, ends: list[int]) -> None:
        super().__init__(k)
        self.ends = ends
        self.register_buffer("inner_ends", torch.tensor(ends[:-1]), persistent=False)

    def losses(
        self, batch: LossBatch, terms: dict[str, Float[Tensor, ""]]
    ) -> dict[str, Float[Tensor, ""]]:
        """`reconstruction` of the whole and `nested` of the inner groups, each over G."""
        share = 1 / len(self.ends)
        own = {"reconstruction": share * terms["reconstruction"]}
        if len(self.ends) > 1:
            own["nested"] = share * self._nested(batch)
        return own

    def _nested(self, batch: LossBatch) -> Float[Tensor, ""]:
        codes, decoder, shard = batch.out.codes, batch.decoder, SHARD.get()
        assert isinstance(codes, SparseCodes)
        assert isinstance(decoder, UnitDirections)
        at = codes.latents if shard is None else shard.numbers(codes.latents)
        missing = batch.x - batch.base
        total = missing.new_zeros(())
        with torch.autocast(missing.device.type, enabled=False):
            if fixed_sizes(missing):
                missing = missing.unsqueeze(1) - self._by_group(codes, decoder)[:, :-1].cumsum(1)
                return missing.square().sum((1, 2)).mean() / batch.variance
            for start, end in zip([0, *self.ends], self.ends[:-1], strict=False):
                inside = ((at >= start) & (at < end)).nonzero().squeeze(1)
                flat = codes.rows[inside] * codes.d_sae + codes.latents[inside]
                pattern = Pattern(flat, codes.n_rows, codes.d_sae)
                written = decoder.kept(codes.values[inside], pattern)
                missing = missing - (written if shard is None else shard.total(written))
                total = total + missing.square().sum(-1).mean() / batch.variance
        return total

    def _by_group(
        self, codes: SparseCodes, decoder: UnitDirections
    ) -> Float[Tensor, "tok groups d_model"]:
        """What the latents of each group alone write, all in one pass: a row for each group."""
        n = len(self.ends)
        group = torch.bucketize(codes.latents, self.inner_ends, right=True)
        flat = (codes.rows * n + group) * codes.d_sae + codes.latents
        pattern = Pattern(flat, codes.n_rows * n, codes.d_sae)
        return decoder.kept(codes.values, pattern).unflatten(0, (codes.n_rows, n))


class Reshaped(Thresholded):
    """z_j a function of kept p_j > 0 for each latent, with a hard zero; selection looks at p.

    Args:
        k: Kept latents per token on average.
    """

    smallest: Tensor

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.register_buffer("smallest", torch.zeros(()), persistent=False)

    @abstractmethod
    def curve(self, values: Float[Tensor, " n"], latents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """z, 0 or more, of positive pre-activations `values` of `latents`."""

    def activate(self, values: Float[Tensor, " nnz"], pattern: Pattern) -> Float[Tensor, " nnz"]:
        """The functions at kept pre-activations."""
        if self.training:
            self.smallest.copy_(smallest_of(values.detach()))
        z = self.curve(values, pattern.latents)
        # at 0 a function may round to what would count as a latent
        return torch.where(values > 0, z, 0.0) if fixed_sizes(z) else z

    @torch.no_grad()
    def observe_(
        self,
        out: SAEOutput,
        ctx: StepContext,
        scale: Float[Tensor, ""],
        variance: Float[Tensor, ""],
    ) -> None:
        """Follow the smallest kept pre-activation."""
        codes = out.codes.sparse()
        self._track(self.smallest.reshape(1) if len(codes.values) else codes.values, ctx.rate)


class LatentGains(Reshaped):
    """z_j = ReLU(g_j p_j + o_j) for kept p_j > 0: a line per latent.

    Gain and offset do not decide which latents are kept. At the start they are 1 and 0.

    Args:
        k: Kept latents per token on average.
        d_sae: Number of latents.
    """

    in_units: ClassVar[tuple[str, ...]] = (*Thresholded.in_units, "offset")

    def __init__(self, k: int, d_sae: int) -> None:
        super().__init__(k)
        self.gain = nn.Parameter(torch.ones(d_sae))
        self.offset = nn.Parameter(torch.zeros(d_sae))

    def curve(self, values: Float[Tensor, " n"], latents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The lines of `latents` at `values`."""
        gain, offset = (each.index_select(0, latents) for each in (self.gain, self.offset))
        return (gain * values + offset).relu()


class LatentSplines(Reshaped):
    """z_j = R_j (S_j(p_j / R_j) - S_j(0)) for kept p_j > 0: a curve per latent, with a hard zero.

    S_j is a cubic B-spline on a grid of [0, 1], continued linearly beyond R_j, the reach of latent
    j's activations. Selection looks at p; only kept values are evaluated. At the start S_j is the
    identity. While the first `frozen_share` of the budget is trained the splines rest and R_j
    follows the activations; then R_j rests and the splines are trained. `monotone` makes the
    coefficients a running sum of softplus, so that a larger activation is more of the feature.

    Args:
        k: Kept latents per token on average.
        d_sae: Number of latents.
        grid_size: Cells between 0 and a latent's reach.
        monotone: Whether the curves can only rise.
        frozen_share: Share of the token budget in which the splines rest.
        smoothness: Weight of the penalty on second differences.
    """

    in_units: ClassVar[tuple[str, ...]] = (*Thresholded.in_units, "reach")
    reach: Tensor
    free: Tensor

    def __init__(
        self,
        k: int,
        d_sae: int,
        grid_size: int,
        monotone: bool,
        frozen_share: float,
        smoothness: float,
    ) -> None:
        super().__init__(k)
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

    @torch.no_grad()
    def start_reach_(self, sums: Sums) -> None:
        """The first reach of every latent, over the pre-activations of a sample."""
        values, pattern = self.kept(sums)
        self.reach.copy_(first_reach(values, pattern.latents, pattern.n_latents))

    def coefficients(self) -> Float[Tensor, "bases d_sae"]:
        """Spline coefficients, in units of the reach."""
        if not self.monotone:
            return self.spline
        rising = F.softplus(self.spline).cumsum(0)
        return torch.cat([torch.zeros_like(rising[:1]), rising])

    def curve(self, values: Float[Tensor, " n"], latents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The splines of `latents` at `values`."""
        coefficients = self.coefficients()
        at_zero = spline_bases(values.new_zeros(1, 1), 0, 1, self.grid_size).reshape(-1)
        lifted = coefficients - at_zero @ coefficients  # bases sum to 1: S - S(0)
        reach = self.reach[latents]
        z = spline_values(
            values / reach, latents, lifted, 0.0, 1.0, self.grid_size, linear_tails=True
        )
        return (reach * z).relu()

    def learned_curves(self, sums: Callable[[], Sums], top: int) -> list[Curves]:
        """Latents, each over the kept pre-activations of its own."""
        kept, pattern = self.kept(sums())
        latents, n = pattern.latents, pattern.n_latents
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
        self, batch: LossBatch, terms: dict[str, Float[Tensor, ""]]
    ) -> dict[str, Float[Tensor, ""]]:
        """`smooth`: how much the splines bend."""
        if not self.smoothness:
            return {}
        bend = self.coefficients().diff(n=2, dim=0).square().sum(0).mean()
        return {"smooth": self.smoothness * bend}

    @torch.no_grad()
    def observe_(
        self,
        out: SAEOutput,
        ctx: StepContext,
        scale: Float[Tensor, ""],
        variance: Float[Tensor, ""],
    ) -> None:
        """Follow the smallest kept pre-activation; and the reach, as long as the splines rest."""
        super().observe_(out, ctx, scale, variance)
        if ctx.progress < self.frozen_share:
            codes = out.codes.sparse()
            follow_reach_(self.reach, codes.values, codes.latents, ctx.rate)
        else:
            self.free.fill_(1.0)

    @torch.no_grad()
    def project_grad_(self) -> None:
        """No gradient for splines that rest."""
        if self.spline.grad is not None:
            self.spline.grad.mul_(self.free)
