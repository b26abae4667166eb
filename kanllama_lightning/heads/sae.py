"""SAE: a head put together from an encoder, a selection and a decoder."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kanllama_lightning.functional.losses import auxk, geometric_median
from kanllama_lightning.functional.moments import mean_and_std, norms
from kanllama_lightning.functional.shard import SHARD
from kanllama_lightning.functional.sparse import Sums, fixed_sizes
from kanllama_lightning.heads.decoders import CurvedDecoder, Decoder, first_directions
from kanllama_lightning.heads.encoders import Encoder, FrozenLinearEncoder, LinearEncoder
from kanllama_lightning.heads.head import LARGEST, SAEHead
from kanllama_lightning.heads.selections import LossBatch, Selection
from kanllama_lightning.types import ByProducts, Curves, InputError, SAEOutput, StepContext

MEDIAN_ROWS = 8192
"""Rows of the start sample that the geometric median is taken of."""
RIDGE = 1e-3
"""Share of the mean variance of the inputs that is added where a linear map is fitted to them."""
PARTS = ("encoder", "selection", "decoder", "units", "standardised")
"""Modules that heads are put together from; in heads saved before, their tensors lay flat."""


class FirstRows(NamedTuple):
    """The first activations, in the head's units, that the parts of a head start from."""

    read: Float[Tensor, "tok d_model"]
    """What the encoder gets."""
    target: Float[Tensor, "tok d_model"]
    """What is to be written, without b_dec."""
    guess: Float[Tensor, "tok d_model"]
    """The best linear guess of the target from what is read; where they are one, that itself."""
    map: Float[Tensor, "d_model d_model"] | None = None
    """The guess as a map of what is read, its offset taken off; None where they are one."""


class SAE(SAEHead, shipped=False):
    """x_hat = decoder(selection(encoder(x))) + b_dec.

    A kind of head is a subclass whose constructor names its parts (`compose`). Loss: FVU of the
    start sample, alpha_aux * AuxK, which revives dead latents (Gao et al. 2024, arXiv 2406.04093),
    and what the selection adds.

    A transcoder (Paulo et al. 2025, arXiv 2501.18823) reads one place x and writes another, y: for
    example what an MLP gets, and what it makes of it. y_hat = decoder(selection(encoder(x))) +
    b_dec, and with a skip + (x - c) W_skip. Each side has a scale of its own; in the formulas of
    the heads the mean c of x takes the place of the b_dec that is taken off the input. It starts as
    the SAE of the best linear guess of y.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents (default: 8 times the width).
        target_l0: Latents per token (L0): exactly, on average, or what a penalty is steered to.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`); the same seed gives the
            same dictionary to every kind of head.
        transcoder: Whether it reads another place than it writes (linked to `lm.input_point`).
        skip: Of a transcoder: whether what is read also reaches what is written through a matrix,
            which leaves to the latents what is not linear.
    """

    input_scale: Tensor
    input_centre: Tensor
    encoder: Encoder
    selection: Selection
    decoder: Decoder

    def __init__(
        self,
        d_model: int,
        d_sae: int | None,
        target_l0: int,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
        transcoder: bool = False,
        skip: bool = False,
    ) -> None:
        super().__init__(d_model, d_sae, seed)
        if not 1 <= target_l0 <= self.d_sae:
            remedy = "; lower it or widen the dictionary" if target_l0 > 1 else ""
            raise InputError(
                f"head.target_l0={target_l0}: must be from 1 to d_sae={self.d_sae}{remedy}"
            )
        if not alpha_aux >= 0:
            raise InputError(f"head.alpha_aux={alpha_aux}: must be 0 or more (default 1/32)")
        if skip and not transcoder:
            raise InputError(
                "head.skip=true: of a transcoder only; give lm.input_point, where it reads, or "
                "leave head.skip out"
            )
        self.target_l0, self.alpha_aux = target_l0, alpha_aux
        self.transcoder, self.skip = transcoder, skip
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        if transcoder:
            self.register_buffer("input_scale", torch.ones(()))
            self.register_buffer("input_centre", torch.zeros(d_model))
        self.W_skip = nn.Parameter(torch.zeros(d_model, d_model)) if skip else None

    def compose(self, encoder: Encoder, selection: Selection, decoder: Decoder) -> None:
        """Name the parts; called once, by the constructor of a kind of head."""
        self.decoder, self.encoder, self.selection = decoder, encoder, selection

    def drawn(self) -> Float[Tensor, "d_sae d_model"]:
        """The random directions of norm 1 that heads of this shape and seed start from."""
        return first_directions(self.d_sae, self.d_model, self.seed)

    @property
    def least(self) -> Mapping[str, float]:
        """The smallest numbers that tensors of a saved head may hold, by their names."""
        parts = (("encoder", self.encoder.least), ("selection", self.selection.least))
        found = {f"{part}.{name}": least for part, own in parts for name, least in own.items()}
        return found | ({"input_scale": 1 / LARGEST} if self.transcoder else {})

    @property
    def most(self) -> Mapping[str, float]:
        """The largest numbers that tensors of a saved head may hold, by their names."""
        return {f"selection.{name}": most for name, most in self.selection.most.items()}

    def read(self, x: Float[Tensor, "tok _"]) -> Float[Tensor, "tok d_model"]:
        """What the encoder gets of raw rows, in the head's units."""
        if self.transcoder:
            return x[:, : self.d_model].float() * self.input_scale
        return x.float() * self.scale

    @property
    def offset(self) -> Float[Tensor, " d_model"]:
        """What is taken off the encoder's input."""
        return self.input_centre if self.transcoder else self.b_dec

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_row"]) -> None:
        """Scale from all rows; b_dec and the encoder's size from the first ones.

        b_dec is their geometric median, or 0 where the encoder does not take it off.
        """
        super().start_(x)
        first = x[:MEDIAN_ROWS]
        target = self.target(first).float() * self.scale
        centred = not self.encoder.b_dec_starts_at_zero
        if centred:
            self.b_dec.copy_(geometric_median(target))
        else:
            self.b_dec.zero_()
        missing = target - self.b_dec
        if not self.transcoder:
            self.start_parts_(FirstRows(target, missing, missing))
            return
        inputs = x[:, : self.d_model]
        self.input_scale.copy_(self.d_model**0.5 / norms(inputs).double().mean())
        mean, std = mean_and_std(inputs)
        self.standardise_(mean * self.input_scale, std * self.input_scale)
        self.input_centre.copy_(mean * self.input_scale if centred else torch.zeros_like(mean))
        read = self.read(first)
        linear = best_linear_map(read - self.input_centre, missing)
        guess = (read - self.input_centre) @ linear
        self.start_parts_(FirstRows(read, missing, guess, linear))

    def standardise_(self, mean: Float[Tensor, " d_model"], std: Float[Tensor, " d_model"]) -> None:
        """Let the encoder take note of them."""
        self.encoder.standardise_(mean, std)

    def start_parts_(self, first: FirstRows) -> None:
        """Encoder c W^T along the directions W of the decoder, and what follows from its latents.

        c makes the first reconstruction best: k overlapping directions overshoot at c = 1,
        three-fold at d_model 128 and k 16, and the first steps then drive all latents down instead
        of apart (LOG.md). Of a transcoder it is c M W^T, M the linear guess of what it is to write.
        """
        target, directions = first.target, self.decoder.first()
        pre_acts = first.guess @ directions.T
        summed, values, latents = self.selection.first(pre_acts, self.decoder, self.x_variance)
        size = summed.square().sum()
        best = (target * summed).sum() / size if size > 0 else target.new_ones(())
        self.decoder.start_(best * values, latents)
        self.set_encoder_(best * directions.T, first)
        self.encoder.start_(first.read)

    def set_encoder_(self, W: Float[Tensor, "d_model d_sae"], first: FirstRows) -> None:
        """Make the encoder the map W of the guess of what is to be written."""
        self.encoder.set_linear_(W if first.map is None else first.map @ W, self.offset)

    def sums(self, x: Float[Tensor, "tok d_model"]) -> Sums:
        """Pre-activations of what is read, in the head's units, not yet multiplied out."""
        branches, offset = self.encoder.branches(x, self.offset), self.offset
        shard = SHARD.get()
        if shard is not None:
            offset = shard.shared(offset)
            branches = [(shard.shared(inputs), weights) for inputs, weights in branches]
        return Sums(branches, self.encoder.bias(offset), self.encoder.b_enc)

    def pre_acts(
        self, x: Float[Tensor, "tok _"], latents: Int[Tensor, " some"] | None = None
    ) -> Float[Tensor, "tok _"]:
        """Pre-activations of raw rows, fp32, of all latents or of some."""
        return self.sums(self.read(x)).dense(latents)

    def base(self, x: Float[Tensor, "tok _"]) -> Float[Tensor, "*tok d_model"]:
        """What is written besides what latents write: b_dec, of a skip on every row; head's units.

        Args:
            x: Raw rows.
        """
        if self.W_skip is None:
            return self.b_dec
        with torch.autocast(x.device.type, enabled=False):
            return (self.read(x) - self.input_centre) @ self.W_skip + self.b_dec

    def forward(self, x: Float[Tensor, "tok _"]) -> SAEOutput:
        """Reconstruction and codes of raw rows."""
        sums = self.sums(self.read(x))
        codes, decoded, by_products = self.selection(sums, self.decoder, self.x_variance)
        shard = SHARD.get()
        if shard is not None:
            decoded = shard.total(decoded)
            if by_products is not None:
                penalty, *others = map(shard.total, (by_products.penalty, *by_products.decoded))
                by_products = ByProducts(penalty, others)
        with torch.autocast(x.device.type, enabled=False):
            x_hat = (decoded + self.base(x)) / self.scale
        return SAEOutput(x_hat, codes, partial(sums.dense, after=x_hat), by_products)

    def encode(self, x: Float[Tensor, "tok _"]) -> Float[Tensor, "tok d_sae"]:
        """Dense latents as at inference, whatever mode the head is in."""
        training = self.training
        try:
            return self.eval()(x).codes.dense()
        finally:
            self.train(training)

    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Reconstruction, in the LM's units, of dense latents; without what a skip adds."""
        return (self.decoder.dense(latents) + self.b_dec) / self.scale

    def losses(
        self, x: Float[Tensor, "tok d_row"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """`reconstruction` (FVU of the start sample), `auxk` while latents are dead, and the
        selection's own."""
        target = x[:, -self.d_model :]
        x_n, x_hat_n = target.float() * self.scale, out.x_hat.float() * self.scale
        terms = {"reconstruction": unexplained(x_n, x_hat_n, self.x_variance)}
        if self.alpha_aux and (len(ctx.dead) or ctx.dead_of):
            error = (x_n - x_hat_n).detach()
            pre = self.pre_acts(x, ctx.dead) if out.pre_acts is None else out.pre_acts(ctx.dead)
            made = self._dead_reconstruction(pre, ctx, out.x_hat)
            terms["auxk"] = self.alpha_aux * auxk(error, made)
        batch = LossBatch(x_n, out, ctx, self.x_variance, self.base(x), self.decoder)
        return terms | self.selection.losses(batch, terms)

    def _dead_reconstruction(
        self,
        pre_acts: Float[Tensor, "tok n_dead"],
        ctx: StepContext,
        x_hat: Float[Tensor, "tok d_model"],
    ) -> Float[Tensor, "tok d_model"]:
        """What the k_aux best dead latents make of x, without b_dec."""
        acts, dead, shard = self.selection.dead_acts(pre_acts), ctx.dead, SHARD.get()
        k_aux = self.d_model // 2
        if shard is not None:
            k_aux = min(k_aux, sum(ctx.dead_of))
            best = self.decoder.sizes(acts, dead).topk(min(k_aux, len(dead)), dim=1)
            won = shard.among(best.values.detach(), k_aux, min(k_aux, max(ctx.dead_of)))
            values = acts.gather(1, best.indices).where(won, 0.0)
            kept = torch.zeros_like(acts).scatter(1, best.indices, values)
            return shard.total(self.decoder.dead(kept, dead, x_hat))
        if len(dead) > k_aux:
            with torch.no_grad():
                sizes = self.decoder.sizes(acts, dead)
                best = sizes.topk(k_aux, dim=1, sorted=not fixed_sizes(acts))
            if fixed_sizes(acts):  # the same but for ties, in half of the passes
                least = best.values.amin(1, keepdim=True)
                acts = torch.where(sizes >= least, acts, 0.0)
            else:
                at = best.indices
                acts = torch.zeros_like(acts).scatter(1, at, acts.gather(1, at))
        return self.decoder.dead(acts, dead, x_hat)

    def observe_(self, out: SAEOutput, ctx: StepContext) -> None:
        """Update the running statistics of selection and decoder."""
        self.selection.observe_(out, ctx, self.scale, self.x_variance)
        self.decoder.observe_(out.codes, ctx)

    def calibrate_(self, x: Float[Tensor, "tok d_row"]) -> None:
        """Set what the selection needs at inference."""
        self.selection.calibrate_(x, self.pre_acts)

    @property
    def makeshift(self) -> str | None:
        """What the selection makes do with."""
        return self.selection.makeshift

    @property
    def unit_rows(self) -> nn.Parameter | None:
        """The decoder's."""
        return self.decoder.unit_rows

    def keep_rows(self, kept: bool) -> None:
        """Tell the decoder."""
        self.decoder.keeps_rows = kept

    def project_grad_(self) -> None:
        """Drop what the projection would undo."""
        self.decoder.project_grad_()
        self.selection.project_grad_()

    def project_(self) -> None:
        """Bring the parts' parameters back to where they belong."""
        self.decoder.project_()
        self.selection.project_(self.x_variance)

    @torch.no_grad()
    def directions(
        self, at: Float[Tensor, " d_sae"], x: Float[Tensor, "tok d_row"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """What the decoder writes per unit of each latent."""
        return self.decoder.directions(at, lambda: self.encode(x))

    def straightness(
        self, latents: Int[Tensor, " n"], upto: Float[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """How straight what the decoder writes for latents alone is, 0 to 1."""
        return self.decoder.straightness(latents, upto)

    def learned_curves(self, x: Float[Tensor, "tok d_row"], top: int) -> list[Curves]:
        """Those of the encoder, of the selection and of the decoder."""
        x_n = self.read(x)
        found = self.encoder.learned_curves(x_n, top)
        # most selections and decoders have none: what theirs are judged over is made if they do
        found += self.selection.learned_curves(lambda: self.sums(x_n), top)
        return found + self.decoder.learned_curves(lambda: self(x).codes, top)

    def diagnostics(self, x: Float[Tensor, "tok d_row"]) -> dict[str, Float[Tensor, ""]]:
        """Those of encoder and selection."""
        return self.encoder.diagnostics(self.read(x)) | self.selection.diagnostics()

    @staticmethod
    def former_name(name: str) -> str:
        """Without the parts, as tensors of heads once lay flat."""
        return flat_name(name)

    @torch.no_grad()
    def folded(self) -> SAEHead:
        """A copy in the LM's units: all that is added or compared, divided by the scale.

        Directions keep their norm; latents come out in the LM's units too (METHODS 0.1).

        Raises:
            InputError: It has curves of standardised activations or of latents.
        """
        if self.encoder.standardised is not None or isinstance(self.decoder, CurvedDecoder):
            return super().folded()
        copied = copy.deepcopy(self)
        copied.b_dec.div_(self.scale)
        for part in (copied.encoder, copied.selection):
            for name in part.in_units:
                getattr(part, name).div_(self.scale)
        if self.transcoder:
            ratio = self.input_scale / self.scale
            assert isinstance(copied.encoder, LinearEncoder | FrozenLinearEncoder)
            copied.encoder.W_enc.mul_(ratio)
            if isinstance(copied.encoder, FrozenLinearEncoder):  # it is of the input
                copied.encoder.centre.div_(ratio)
            copied.input_centre.div_(self.input_scale)
            if copied.W_skip is not None:
                copied.W_skip.mul_(ratio)
            copied.input_scale.fill_(1.0)
        copied.x_variance.div_(self.scale.square())
        copied.scale.fill_(1.0)
        return copied


def best_linear_map(
    inputs: Float[Tensor, "tok d_in"], outputs: Float[Tensor, "tok d_out"]
) -> Float[Tensor, "d_in d_out"]:
    """The map of least squared error, with a ridge of `RIDGE` of the mean variance."""
    x, y = inputs.double(), outputs.double()
    covariance = x.T @ x
    ridge = RIDGE * covariance.diagonal().mean()
    covariance.diagonal().add_(ridge)
    return torch.linalg.solve(covariance, x.T @ y).to(outputs.dtype)


def unexplained(
    x: Float[Tensor, "tok d_model"],
    x_hat: Float[Tensor, "tok d_model"],
    variance: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Squared error, summed over d_model, mean over tokens, as a share of a variance (METHODS 0.4).

    Args:
        x: Activations in the head's units.
        x_hat: Their reconstructions, in the same units.
        variance: The unit of the loss: `x_variance`, that of the start sample.
    """
    return (x - x_hat).square().sum(-1).mean() / variance


def flat_name(name: str) -> str:
    """What a tensor was called in heads saved before they had parts."""
    return ".".join(word for word in name.split(".") if word not in PARTS)
