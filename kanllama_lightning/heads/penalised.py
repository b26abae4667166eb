"""Heads that select nothing: a penalty keeps their latents sparse."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.functional import ranks
from kanllama_lightning.functional.controller import SparsityController
from kanllama_lightning.functional.row_blocks import Kept, decode_in_blocks, few_above
from kanllama_lightning.functional.sparse import Pattern, kept_products, sparse_decode
from kanllama_lightning.heads.dictionary import Branch, Dictionary, products
from kanllama_lightning.types import (
    Codes,
    InputError,
    LazyCodes,
    SAEOutput,
    SparseCodes,
    StepContext,
)

log = logging.getLogger(__name__)

CHECK_STEPS = 250
"""The controller's bound is looked at so often: reading it waits for the GPU."""
STUCK_HORIZONS = 3.0
"""At a bound for so many horizons with L0 off, the controller is said to have failed."""
LAST_LOOK, TOLERANCE = 0.95, 0.1
"""Share of the budget at which L0 should be within that share of its target."""
FREE_NORM = 0.1
"""Norm of the dictionary rows at the start where norms are free (METHODS A0)."""


def positive(name: str, value: float, default: str) -> float:
    """The value of a head's argument that must be larger than 0.

    Raises:
        InputError: It is not, or it is NaN.
    """
    if not value > 0:
        raise InputError(f"head.{name}={value}: must be larger than 0 (default {default})")
    return float(value)


Made = tuple[Codes, Float[Tensor, ""], list[Float[Tensor, "tok d_model"]]]
"""Codes, the penalty summed over latents and tokens, and what has been decoded, without b_dec."""


class Source(NamedTuple):
    """What the latents of a batch are made of."""

    branches: list[Branch]
    bias: Float[Tensor, " d_sae"]
    vectors: list[Float[Tensor, " d_sae"]]


class PenalisedOutput(SAEOutput):
    """An output with what the losses would have to make again; a copy (`_replace`) is without."""

    by_products: "ByProducts | None" = None


class ByProducts(NamedTuple):
    """What else is known once latents are."""

    penalty: Float[Tensor, ""]
    """Mean over tokens, without its coefficient."""
    decoded: list[Float[Tensor, "tok d_model"]]
    """Of what else is decoded beside z; without b_dec."""


class Penalised(Dictionary):
    """z is an elementwise function of p (`activate`); L = FVU + coefficient * penalty + ...

    The coefficient is no setting: a controller (`SparsityController`) moves it from the given
    value until the mean L0 of the training batches is `target_l0`. It is saved with the head.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Non-zero latents per token on average (L0) that the penalty is steered to.
        coefficient: Weight of the penalty at the start.
        sparsity_ramp: Share of the token budget in which the wanted L0 falls from that of the
            start to target_l0.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        coefficient: float,
        sparsity_ramp: float = 0.05,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        if not 0 <= sparsity_ramp <= 0.5:
            raise InputError(
                f"head.sparsity_ramp={sparsity_ramp}: must be from 0 to 0.5 of the token budget "
                "(default 0.05); later, too little is left to settle in"
            )
        self.sparsity_ramp = sparsity_ramp
        self.controller = SparsityController(coefficient, target_l0, sparsity_ramp)
        self._steps, self._warned, self._ended = 0, False, False

    def deviation(self) -> Float[Tensor, ""]:
        """Root of the start sample's variance: the unit that penalties of activations are in."""
        return self.x_variance.sqrt()

    @abstractmethod
    def vectors(self) -> list[Float[Tensor, " d_sae"]]:
        """What latents and penalty are made with, one number per latent; new tensors."""

    @abstractmethod
    def latents(
        self, pre_acts: Float[Tensor, "*tok n"], vectors: Sequence[Float[Tensor, " n"]]
    ) -> Float[Tensor, "*tok n"]:
        """z, elementwise: of rows, or of single entries with the vectors' entries."""

    @abstractmethod
    def penalties(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        z: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
    ) -> Float[Tensor, ""]:
        """The penalty, summed over latents and tokens."""

    def levels(self) -> list[Float[Tensor, " d_sae"] | float]:
        """Pre-activations up to the first level have no effect and no gradient.

        Up to the last they are latents of value 0, though in between they may have a gradient.
        """
        return [0.0]

    def reported(
        self, z: Float[Tensor, "*tok n"], vectors: Sequence[Float[Tensor, " n"]]
    ) -> Float[Tensor, "*tok n"]:
        """Latents in the units in which they are reported."""
        return z

    def made(
        self, pre_acts: Float[Tensor, "*tok n"], *vectors: Float[Tensor, " n"]
    ) -> tuple[list[Float[Tensor, "*tok n"]], Float[Tensor, ""]]:
        """What is decoded (z, and what else a subclass has decoded), and the summed penalty."""
        z = self.latents(pre_acts, vectors)
        return [z], self.penalties(pre_acts, z, vectors)

    def activate(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_sae"]:
        """z of pre-activations."""
        return self.latents(pre_acts, self.vectors())

    def reconstruct(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """What the dictionary makes of pre-activations, without b_dec."""
        return (self.activate(pre_acts) @ self.W_dec).float()

    def forward(self, x: Float[Tensor, "tok d_model"]) -> "PenalisedOutput":
        """Reconstruction and latents of raw activations; training and inference are the same.

        On the CPU, where few latents have a value or a gradient, only those are computed with;
        else nothing of shape [tok d_sae] is held but the pre-activations.
        """
        source = Source(self.branches(x), self.bias(), self.vectors())
        with torch.no_grad():
            pre = products(source.branches, source.bias)
        pattern = few_above(pre, self.levels()[0])
        if pattern is not None:
            codes, penalty, decoded = self._from_few(pre, pattern, source)
        else:
            codes, penalty, decoded = self._in_blocks(pre, source)
        x_hat = (decoded[0] + self.b_dec) / self.scale
        out = PenalisedOutput(x_hat, codes, partial(products, source.branches, source.bias))
        out.by_products = ByProducts(penalty / len(x), decoded[1:])
        return out

    def _from_few(
        self, pre: Float[Tensor, "tok d_sae"], pattern: Pattern, source: "Source"
    ) -> Made:
        values = pre.reshape(-1).index_select(0, pattern.flat)
        values = kept_products(values, pattern, source.bias, source.branches)
        with torch.autocast(pre.device.type, enabled=False):
            entries = pattern.of_latents(source.vectors)
            latents, penalty = self.made(values, *entries)
            # only z trains the dictionary, as in `decode_in_blocks`
            dictionaries = [self.W_dec] + [self.W_dec.detach()] * (len(latents) - 1)
            decoded = [
                sparse_decode(z, pattern, dictionary)
                for z, dictionary in zip(latents, dictionaries, strict=True)
            ]
            z = self.reported(latents[0], entries)
        fires = z.detach().nonzero().squeeze(1)
        z, rows, at = (t.index_select(0, fires) for t in (z, pattern.rows, pattern.latents))
        return SparseCodes(z, rows, at, *pre.shape), penalty, decoded

    def _in_blocks(self, pre: Float[Tensor, "tok d_sae"], source: "Source") -> Made:
        branches, bias, vectors = source
        kept = None
        if len(self.levels()) > 1:
            kept = self._fired(pre, vectors)
        pre, penalty, decoded = decode_in_blocks(
            self.made, pre, bias, branches, self.W_dec, vectors, kept
        )

        def reported(rows: Float[Tensor, "some d_sae"]) -> Float[Tensor, "some d_sae"]:
            return self.reported(self.latents(rows, vectors), vectors)

        return LazyCodes(pre, reported), penalty, decoded

    @torch.no_grad()
    def _fired(
        self, pre: Float[Tensor, "tok d_sae"], vectors: Sequence[Float[Tensor, " d_sae"]]
    ) -> Kept | None:
        pattern = few_above(pre, self.levels()[-1])
        if pattern is None:
            return None
        values = pre.reshape(-1).index_select(0, pattern.flat)
        (z,), penalty = self.made(values, *pattern.of_latents(vectors))
        return Kept(pattern, z, penalty)

    def dead_acts(self, pre_acts: Float[Tensor, "tok n_dead"]) -> Float[Tensor, "tok n_dead"]:
        """p itself: a dead latent has p <= 0 on every token, where a ReLU has no gradient."""
        return pre_acts

    def by_products(self, x: Float[Tensor, "tok d_model"], out: SAEOutput) -> ByProducts:
        """Those of `out`, or of another forward pass where it has none."""
        found = out.by_products if isinstance(out, PenalisedOutput) else None
        if found is None:
            found = self(x).by_products
        assert found is not None
        return found

    def sparsity_coefficient(self) -> Float[Tensor, ""]:
        """The penalty's weight now; a copy, as autograd keeps it while the controller goes on."""
        return self.controller.coefficient.clone()

    @torch.no_grad()
    def observe_(self, out: SAEOutput, ctx: StepContext) -> None:
        """Steer the penalty's weight by the batch's L0; warn once where it is at its bound."""
        n_tokens = max(1, len(out.x_hat)) * ranks.world()
        l0 = ranks.total(out.codes.l0().sum()) / n_tokens
        kept = ranks.summed_squares(out.x_hat * self.scale) / n_tokens / self.x_variance
        self.controller.update_(l0, kept, ctx.progress, ctx.rate)
        self._steps += 1
        ending = ctx.progress >= LAST_LOOK and not self._ended
        if not self._warned and (ending or self._steps % CHECK_STEPS == 0):
            self._warn_if_off(ending)
        self._ended |= ending

    def _warn_if_off(self, ending: bool) -> None:
        """Say so once where L0 is off and the controller can do no more about it."""
        controller = self.controller
        stuck = bool(controller.stuck >= STUCK_HORIZONS)
        off = abs(float(controller.mean_l0()) / self.target_l0 - 1) > TOLERANCE
        if not (stuck or (ending and off)):
            return
        self._warned = True
        log.warning(
            "%s: L0 is %.3g instead of target_l0=%s; the sparsity coefficient is %.3g%s; %s",
            type(self).__name__,
            float(controller.mean_l0()),
            self.target_l0,
            float(controller.coefficient),
            ", at its bound" if stuck else ", and the run ends",
            "start it from another value, or choose another target_l0"
            if stuck
            else "train on more tokens or with a larger learning rate",
        )

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`sparsity_coefficient`: the penalty's weight."""
        return {"sparsity_coefficient": self.sparsity_coefficient()}


class FreeNorms(Penalised):
    """The rows w_j of W_dec have any norm; reported latents are z_j ||w_j||.

    That is what a latent writes along its unit direction: the number that stays the same
    when z_j is divided and w_j multiplied by some factor. So the head needs no fold after
    training (METHODS A1): `encode` reports folded latents, and `decode` takes them.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Non-zero latents per token on average (L0) that the penalty is steered to.
        coefficient: Weight of the penalty at the start.
        sparsity_ramp: Share of the token budget in which the wanted L0 falls from that of the
            start to target_l0.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        coefficient: float,
        sparsity_ramp: float = 0.05,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, coefficient, sparsity_ramp, alpha_aux, seed)
        with torch.no_grad():
            self.W_dec.mul_(FREE_NORM)
            self.W_enc.copy_(self.W_dec.T)

    def row_norms(self) -> Float[Tensor, " d_sae"]:
        """||w_j||."""
        return self.W_dec.norm(dim=1)

    def reported(
        self, z: Float[Tensor, "*tok n"], vectors: Sequence[Float[Tensor, " n"]]
    ) -> Float[Tensor, "*tok n"]:
        """z_j ||w_j||; the norms are the first of the vectors."""
        return z * vectors[0]

    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Reconstruction, in the LM's units, of dense latents z_j ||w_j||."""
        return super().decode(latents / self.row_norms().clamp_min(1e-30))

    def directions(
        self, at: Float[Tensor, " d_sae"], x: Float[Tensor, "tok d_model"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """w_j / ||w_j||, as the latents are z_j ||w_j||."""
        return (self.W_dec / self.row_norms().clamp_min(1e-30).unsqueeze(1)).detach()

    def dead_sizes(
        self, acts: Float[Tensor, "tok n_dead"], dead: Int[Tensor, " n_dead"]
    ) -> Float[Tensor, "tok n_dead"]:
        """p_j ||w_j||: the best are those that write most (METHODS A3)."""
        return acts * self.row_norms()[dead]

    def project_grad_(self) -> None:
        """Nothing: norms are free."""

    def project_(self) -> None:
        """Nothing: norms are free."""
