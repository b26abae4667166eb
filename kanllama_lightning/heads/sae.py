"""SAE: a head put together from an encoder, a selection and a decoder."""

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kanllama_lightning.functional.losses import auxk, geometric_median
from kanllama_lightning.functional.sparse import Sums
from kanllama_lightning.heads.decoders import CurvedDecoder, Decoder, first_directions
from kanllama_lightning.heads.encoders import Encoder
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.heads.selections import LossBatch, Selection
from kanllama_lightning.types import Curves, InputError, SAEOutput, StepContext

MEDIAN_ROWS = 8192
"""Rows of the start sample that the geometric median is taken of."""
PARTS = ("encoder", "selection", "decoder", "units", "standardised")
"""Modules that heads are put together from; in heads saved before, their tensors lay flat."""


class SAE(SAEHead, shipped=False):
    """x_hat = decoder(selection(encoder(x))) + b_dec.

    A kind of head is a subclass whose constructor names its parts (`compose`). Loss: FVU of the
    start sample, alpha_aux * AuxK, which revives dead latents (Gao et al. 2024, arXiv 2406.04093),
    and what the selection adds.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents (default: 8 times the width).
        target_l0: Latents per token (L0): exactly, on average, or what a penalty is steered to.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`); the same seed gives the
            same dictionary to every kind of head.
    """

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
    ) -> None:
        super().__init__(d_model, d_sae, seed)
        if not 1 <= target_l0 <= self.d_sae:
            raise InputError(
                f"head.target_l0={target_l0}: must be from 1 to d_sae={self.d_sae}; lower it or "
                "widen the dictionary"
            )
        if not alpha_aux >= 0:
            raise InputError(f"head.alpha_aux={alpha_aux}: must be 0 or more (default 1/32)")
        self.target_l0, self.alpha_aux = target_l0, alpha_aux
        self.b_dec = nn.Parameter(torch.zeros(d_model))

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
        return {f"{part}.{name}": least for part, own in parts for name, least in own.items()}

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Scale from all rows; b_dec and the encoder's size from the first ones.

        b_dec is their geometric median, or 0 where the encoder does not take it off.
        """
        super().start_(x)
        target = x[:MEDIAN_ROWS].float() * self.scale
        if self.encoder.b_dec_starts_at_zero:
            self.b_dec.zero_()
        else:
            self.b_dec.copy_(geometric_median(target))
        self.start_parts_(target)

    def standardise_(self, mean: Float[Tensor, " d_model"], std: Float[Tensor, " d_model"]) -> None:
        """Let the encoder take note of them."""
        self.encoder.standardise_(mean, std)

    def start_parts_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Encoder c W^T along the directions W of the decoder, and what follows from its latents.

        c makes the first reconstruction best: k overlapping directions overshoot at c = 1,
        three-fold at d_model 128 and k 16, and the first steps then drive all latents down instead
        of apart (LOG.md).

        Args:
            x: The first activations, in the head's units.
        """
        target, directions = x - self.b_dec, self.decoder.first()
        pre_acts = target @ directions.T
        summed, values, latents = self.selection.first(pre_acts, self.decoder, self.x_variance)
        size = summed.square().sum()
        best = (target * summed).sum() / size if size > 0 else target.new_ones(())
        self.decoder.start_(best * values, latents)
        self.encoder.set_linear_(best * directions.T, self.b_dec)
        self.encoder.start_(x)

    def sums(self, x: Float[Tensor, "tok d_model"]) -> Sums:
        """Pre-activations of activations in the head's units, not yet multiplied out."""
        branches = self.encoder.branches(x, self.b_dec)
        return Sums(branches, self.encoder.bias(self.b_dec), self.encoder.b_enc)

    def pre_acts(
        self, x: Float[Tensor, "tok d_model"], latents: Int[Tensor, " some"] | None = None
    ) -> Float[Tensor, "tok _"]:
        """Pre-activations of raw activations, fp32, of all latents or of some."""
        return self.sums(x.float() * self.scale).dense(latents)

    def forward(self, x: Float[Tensor, "tok d_model"]) -> SAEOutput:
        """Reconstruction and codes of raw activations."""
        sums = self.sums(x.float() * self.scale)
        codes, decoded, by_products = self.selection(sums, self.decoder, self.x_variance)
        with torch.autocast(x.device.type, enabled=False):
            x_hat = (decoded + self.b_dec) / self.scale
        return SAEOutput(x_hat, codes, sums.dense, by_products)

    def encode(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_sae"]:
        """Dense latents as at inference, whatever mode the head is in."""
        training = self.training
        try:
            return self.eval()(x).codes.dense()
        finally:
            self.train(training)

    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Reconstruction, in the LM's units, of dense latents."""
        return (self.decoder.dense(latents) + self.b_dec) / self.scale

    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """`reconstruction` (FVU of the start sample), `auxk` while latents are dead, and the
        selection's own."""
        x_n, x_hat_n = x.float() * self.scale, out.x_hat.float() * self.scale
        terms = {"reconstruction": unexplained(x_n, x_hat_n, self.x_variance)}
        if self.alpha_aux and len(ctx.dead):
            error = (x_n - x_hat_n).detach()
            pre = self.pre_acts(x, ctx.dead) if out.pre_acts is None else out.pre_acts(ctx.dead)
            terms["auxk"] = self.alpha_aux * auxk(error, self._dead_reconstruction(pre, ctx.dead))
        batch = LossBatch(x_n, out, ctx, self.x_variance, self.b_dec, self.decoder)
        return terms | self.selection.losses(batch, terms)

    def _dead_reconstruction(
        self, pre_acts: Float[Tensor, "tok n_dead"], dead: Int[Tensor, " n_dead"]
    ) -> Float[Tensor, "tok d_model"]:
        """What the k_aux best dead latents make of x, without b_dec."""
        acts = self.selection.dead_acts(pre_acts)
        k_aux = min(self.d_model // 2, len(dead))
        best = self.decoder.sizes(acts, dead).topk(k_aux, dim=1).indices
        kept = torch.zeros_like(acts).scatter(1, best, acts.gather(1, best))
        return self.decoder.dead(kept, dead)

    def observe_(self, out: SAEOutput, ctx: StepContext) -> None:
        """Update the running statistics of selection and decoder."""
        self.selection.observe_(out, ctx, self.scale, self.x_variance)
        self.decoder.observe_(out.codes, ctx)

    def calibrate_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Set what the selection needs at inference."""
        self.selection.calibrate_(x, self.pre_acts)

    @property
    def makeshift(self) -> str | None:
        """What the selection makes do with."""
        return self.selection.makeshift

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
        self, at: Float[Tensor, " d_sae"], x: Float[Tensor, "tok d_model"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """What the decoder writes per unit of each latent."""
        return self.decoder.directions(at, lambda: self.encode(x))

    def straightness(
        self, latents: Int[Tensor, " n"], upto: Float[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """How straight what the decoder writes for latents alone is, 0 to 1."""
        return self.decoder.straightness(latents, upto)

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """Those of the encoder, of the selection and of the decoder."""
        x_n = x.float() * self.scale
        found = self.encoder.learned_curves(x_n, top)
        # most selections and decoders have none: what theirs are judged over is made if they do
        found += self.selection.learned_curves(lambda: self.sums(x_n), top)
        return found + self.decoder.learned_curves(lambda: self(x).codes, top)

    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """Those of encoder and selection."""
        return self.encoder.diagnostics(x.float() * self.scale) | self.selection.diagnostics()

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
        copied.x_variance.div_(self.scale.square())
        copied.scale.fill_(1.0)
        return copied


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
