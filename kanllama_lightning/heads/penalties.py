"""Selections that keep latents sparse by a penalty: L1, a gate, or a jump."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kanllama_lightning.functional import ranks
from kanllama_lightning.functional.jump import jump_relu
from kanllama_lightning.functional.row_blocks import KeptEntries, decode_in_blocks, few_above
from kanllama_lightning.functional.shard import SHARD
from kanllama_lightning.functional.sparse import Pattern, SparseCodes, Sums, sparse_decode
from kanllama_lightning.heads.controller import SparsityController
from kanllama_lightning.heads.decoders import Decoder, FreeDirections, UnitDirections
from kanllama_lightning.heads.head import MOST_LOG
from kanllama_lightning.heads.sae import unexplained
from kanllama_lightning.heads.selections import LossBatch, Selected, Selection
from kanllama_lightning.types import (
    ByProducts,
    Codes,
    InputError,
    LazyCodes,
    SAEOutput,
    StepContext,
)

log = logging.getLogger(__name__)

CHECK_STEPS = 250
"""The controller's bound is looked at so often: reading it waits for the GPU, as logging does."""
STUCK_HORIZONS = 3.0
"""At a bound for so many horizons with L0 off, the controller is said to have failed."""
LAST_LOOK, TOLERANCE = 0.95, 0.1
"""Share of the budget at which L0 should be within that share of its target."""
SHARPNESS = 16.0
"""c of tanh(c z ||w|| / sqrt(V)): well above sqrt(V) / c a latent counts as one."""
LEAST_THETA = 0.01
"""Lower bound of theta, relative to its start (METHODS A5): the estimator's gradient is in
proportion to theta, so that a latent once at 0 would be a ReLU for good."""


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

    sums: Sums
    vectors: list[Float[Tensor, " d_sae"]]
    dictionary: Float[Tensor, "d_sae d_model"]
    variance: Float[Tensor, ""]


class Penalised(Selection):
    """z is an elementwise function of p (`latents`); a weighted penalty keeps it sparse.

    The weight is no setting: a controller (`SparsityController`) moves it from the given value
    until the mean L0 of the training batches is `target_l0`. It is saved with the head.

    Args:
        target_l0: Non-zero latents per token on average (L0) that the penalty is steered to.
        coefficient: Weight of the penalty at the start.
        sparsity_ramp: Share of the token budget in which the wanted L0 falls from that of the
            start to target_l0.
    """

    def __init__(self, target_l0: int, coefficient: float, sparsity_ramp: float) -> None:
        super().__init__()
        if not 0 <= sparsity_ramp <= 0.5:
            raise InputError(
                f"head.sparsity_ramp={sparsity_ramp}: must be from 0 to 0.5 of the token budget "
                "(default 0.05); later, too little is left to settle in"
            )
        self.target_l0 = target_l0
        self.controller = SparsityController(coefficient, target_l0, sparsity_ramp)
        self._steps, self._warned, self._ended = 0, False, False

    @abstractmethod
    def vectors(
        self, decoder: UnitDirections, b_enc: Float[Tensor, " d_sae"]
    ) -> list[Float[Tensor, " d_sae"]]:
        """What latents and penalty are made with, one number per latent; new tensors."""

    @abstractmethod
    def latents(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
        variance: Float[Tensor, ""],
    ) -> Float[Tensor, "*tok n"]:
        """z, elementwise: of rows, or of single entries with the vectors' entries."""

    @abstractmethod
    def penalties(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        z: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
        variance: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """The penalty, summed over latents and tokens."""

    def levels(self, variance: Float[Tensor, ""]) -> list[Float[Tensor, " d_sae"] | float]:
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
        self,
        variance: Float[Tensor, ""],
        pre_acts: Float[Tensor, "*tok n"],
        *vectors: Float[Tensor, " n"],
    ) -> tuple[list[Float[Tensor, "*tok n"]], Float[Tensor, ""]]:
        """What is decoded (z, and what else a subclass has decoded), and the summed penalty."""
        z = self.latents(pre_acts, vectors, variance)
        return [z], self.penalties(pre_acts, z, vectors, variance)

    def first(
        self, pre_acts: Float[Tensor, "tok d_sae"], decoder: Decoder, variance: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, "tok d_model"], Float[Tensor, " nnz"], Int[Tensor, " nnz"]]:
        """z along the directions; and no latents, as directions do not ask for them."""
        assert isinstance(decoder, UnitDirections)
        vectors = self.vectors(decoder, pre_acts.new_zeros(decoder.d_sae))
        z = self.latents(pre_acts, vectors, variance)
        none = torch.zeros(0, dtype=torch.int64, device=z.device)
        return (z @ decoder.W_dec).float(), z.new_zeros(0), none

    def forward(self, sums: Sums, decoder: Decoder, variance: Float[Tensor, ""]) -> Selected:
        """Latents, their reconstruction and the penalty; the same in training and at inference.

        On the CPU, where few latents have a value or a gradient, only those are computed with;
        else nothing of shape [tok d_sae] is held but the pre-activations.
        """
        assert isinstance(decoder, UnitDirections)
        vectors = self.vectors(decoder, sums.b_enc)
        source = Source(sums, vectors, decoder.W_dec, variance)
        with torch.no_grad():
            pre = sums.dense()
        pattern = few_above(pre, self.levels(variance)[0])
        if pattern is not None:
            codes, penalty, decoded = self._from_few(pre, pattern, source)
        else:
            codes, penalty, decoded = self._in_blocks(pre, source)
        return Selected(codes, decoded[0], ByProducts(penalty / len(pre), decoded[1:]))

    def _from_few(self, pre: Float[Tensor, "tok d_sae"], pattern: Pattern, source: Source) -> Made:
        values = pre.reshape(-1).index_select(0, pattern.flat)
        values = source.sums.tied(values, pattern)
        with torch.autocast(pre.device.type, enabled=False):
            entries = pattern.of_latents(source.vectors)
            latents, penalty = self.made(source.variance, values, *entries)
            # only z trains the dictionary, as in `decode_in_blocks`
            dictionaries = [source.dictionary] + [source.dictionary.detach()] * (len(latents) - 1)
            decoded = [
                sparse_decode(z, pattern, dictionary)
                for z, dictionary in zip(latents, dictionaries, strict=True)
            ]
            z = self.reported(latents[0], entries)
        fires = z.detach().nonzero().squeeze(1)
        z, rows, at = (t.index_select(0, fires) for t in (z, pattern.rows, pattern.latents))
        return SparseCodes(z, rows, at, *pre.shape), penalty, decoded

    def _in_blocks(self, pre: Float[Tensor, "tok d_sae"], source: Source) -> Made:
        vectors, variance = source.vectors, source.variance
        kept = None
        if len(self.levels(variance)) > 1:
            kept = self._fired(pre, source)
        pre, penalty, decoded = decode_in_blocks(
            partial(self.made, variance),
            pre,
            source.sums.bias,
            source.sums.branches,
            source.dictionary,
            vectors,
            kept,
        )

        def reported(rows: Float[Tensor, "some d_sae"]) -> Float[Tensor, "some d_sae"]:
            return self.reported(self.latents(rows, vectors, variance), vectors)

        return LazyCodes(pre, reported), penalty, decoded

    @torch.no_grad()
    def _fired(self, pre: Float[Tensor, "tok d_sae"], source: Source) -> KeptEntries | None:
        pattern = few_above(pre, self.levels(source.variance)[-1])
        if pattern is None:
            return None
        values = pre.reshape(-1).index_select(0, pattern.flat)
        (z,), penalty = self.made(source.variance, values, *pattern.of_latents(source.vectors))
        return KeptEntries(pattern, z, penalty)

    def dead_acts(self, pre_acts: Float[Tensor, "tok n_dead"]) -> Float[Tensor, "tok n_dead"]:
        """p itself: a dead latent has p <= 0 on every token, where a ReLU has no gradient."""
        return pre_acts

    def weighted_penalty(self, batch: LossBatch) -> Float[Tensor, ""]:
        """The penalty of a batch, a mean over tokens, times its weight now."""
        assert batch.out.by_products is not None
        # a copy, as autograd keeps it while the controller goes on
        return self.controller.coefficient.clone() * batch.out.by_products.penalty

    @torch.no_grad()
    def observe_(
        self,
        out: SAEOutput,
        ctx: StepContext,
        scale: Float[Tensor, ""],
        variance: Float[Tensor, ""],
    ) -> None:
        """Steer the penalty's weight by the batch's L0; warn once where it is at its bound."""
        n_tokens = max(1, len(out.x_hat)) * ranks.world()
        l0, shard = ranks.total(out.codes.l0().sum()), SHARD.get()
        l0 = (l0 if shard is None else shard.total(l0)) / n_tokens
        kept = ranks.summed_squares(out.x_hat * scale) / n_tokens / variance
        self.controller.update_(l0, kept, ctx.progress, ctx.rate)
        self._steps += 1
        ending = ctx.progress >= LAST_LOOK and not self._ended
        if not self._warned and (ending or self._steps % CHECK_STEPS == 1):
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
            "L0 is %.3g and not target_l0=%s: the sparsity coefficient is %.3g, %s",
            float(controller.mean_l0()),
            self.target_l0,
            float(controller.coefficient),
            "the limit of what it may be; choose another --model.head.target_l0"
            if stuck
            else "and the run ends; train on more tokens (--model.tokens) or with a larger "
            "--model.optimizer.lr",
        )

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Float[Tensor, ""]]:
        """`sparsity_coefficient`: the penalty's weight."""
        return {"sparsity_coefficient": self.controller.coefficient.clone()}


class L1(Penalised):
    """z = ReLU(p), penalised by sum_j z_j ||w_j|| / sqrt(V); latents are reported as z_j ||w_j||.

    That the norms stand in the penalty takes the gain from small z and large w.
    """

    def vectors(
        self, decoder: UnitDirections, b_enc: Float[Tensor, " d_sae"]
    ) -> list[Float[Tensor, " d_sae"]]:
        """||w_j||."""
        return [decoder.W_dec.norm(dim=1)]

    def latents(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
        variance: Float[Tensor, ""],
    ) -> Float[Tensor, "*tok n"]:
        """ReLU."""
        return pre_acts.relu()

    def penalties(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        z: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
        variance: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """Sum of z_j ||w_j||."""
        return (z @ vectors[0]).sum()

    def reported(
        self, z: Float[Tensor, "*tok n"], vectors: Sequence[Float[Tensor, " n"]]
    ) -> Float[Tensor, "*tok n"]:
        """z_j ||w_j||."""
        return z * vectors[0]

    def losses(
        self, batch: LossBatch, terms: dict[str, Float[Tensor, ""]]
    ) -> dict[str, Float[Tensor, ""]]:
        """`l1`: the penalty."""
        return {"l1": self.weighted_penalty(batch) / batch.variance.sqrt()}


class Jump(Penalised):
    """z_j = p_j 1[p_j > theta_j], penalised by sum_j tanh(c z_j ||w_j|| / sqrt(V)).

    The straight-through estimator of the jump reaches p as well as theta (`jump_relu`). theta is
    trained itself, not its logarithm, in fp32 and kept > 0. Latents are reported as z_j ||w_j||.

    Args:
        d_sae: Number of latents.
        target_l0: L0 that the penalty is steered to.
        coefficient: Weight of the penalty at the start.
        sparsity_ramp: See `Penalised`.
        pre_act_coefficient: Weight of a pull on the pre-activations of dead latents.
        bandwidth: Width of the window around theta in which the estimator is not zero, in units
            of sqrt(V).
        theta_init: theta of all latents at the start, in units of sqrt(V).
    """

    in_units: ClassVar[tuple[str, ...]] = ("theta",)
    least: ClassVar[Mapping[str, float]] = MappingProxyType({"theta": 0.0})

    def __init__(
        self,
        d_sae: int,
        target_l0: int,
        coefficient: float,
        sparsity_ramp: float,
        pre_act_coefficient: float,
        bandwidth: float,
        theta_init: float,
    ) -> None:
        super().__init__(target_l0, coefficient, sparsity_ramp)
        if not pre_act_coefficient >= 0:
            raise InputError(
                f"head.pre_act_coefficient={pre_act_coefficient}: must be 0 or more (default 0)"
            )
        self.pre_act_coefficient = pre_act_coefficient
        self.bandwidth = positive("bandwidth", bandwidth, "0.5")
        # the gradient of theta is in proportion to theta, so that 0 would stay 0
        self.theta_init = positive("theta_init", theta_init, "0.025")
        self.theta = nn.Parameter(torch.full((d_sae,), self.theta_init))

    def vectors(
        self, decoder: UnitDirections, b_enc: Float[Tensor, " d_sae"]
    ) -> list[Float[Tensor, " d_sae"]]:
        """||w_j|| and theta."""
        return [decoder.W_dec.norm(dim=1), self.theta.clone()]

    def levels(self, variance: Float[Tensor, ""]) -> list[Float[Tensor, " d_sae"] | float]:
        """The lower end of the window, a little lowered (it is found by rounding), and theta."""
        # of a head that was saved before the variance was, nothing but theta counts
        theta, width = self.theta.detach(), self.bandwidth * variance.sqrt().nan_to_num(0.0)
        return [theta - 0.5 * width - 1e-6 * (theta + width), theta]

    def latents(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
        variance: Float[Tensor, ""],
    ) -> Float[Tensor, "*tok n"]:
        """p above the threshold, else 0."""
        return jump_relu(pre_acts, vectors[1], self.bandwidth * variance.sqrt())

    def penalties(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        z: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
        variance: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """Sum of tanh(c z_j ||w_j|| / sqrt(V))."""
        return torch.tanh(z * (SHARPNESS / variance.sqrt() * vectors[0])).sum()

    def reported(
        self, z: Float[Tensor, "*tok n"], vectors: Sequence[Float[Tensor, " n"]]
    ) -> Float[Tensor, "*tok n"]:
        """z_j ||w_j||."""
        return z * vectors[0]

    def losses(
        self, batch: LossBatch, terms: dict[str, Float[Tensor, ""]]
    ) -> dict[str, Float[Tensor, ""]]:
        """`tanh` (the penalty); `pre_act` while latents are dead."""
        own, dead = {"tanh": self.weighted_penalty(batch)}, batch.ctx.dead
        if self.pre_act_coefficient and (len(dead) or batch.ctx.dead_of):
            assert batch.out.pre_acts is not None
            assert isinstance(batch.decoder, FreeDirections)
            short = (self.theta[dead] - batch.out.pre_acts(dead)).relu()
            # a gradient for ||w_j|| would shrink dead latents to nothing before it revived them
            norms = batch.decoder.row_norms()[dead].detach()
            short_by, shard = (short * norms).sum(1).mean(), SHARD.get()
            if shard is not None:
                short_by = shard.total(short_by)
            own["pre_act"] = self.pre_act_coefficient * short_by / batch.variance.sqrt()
        return own

    @torch.no_grad()
    def project_(self, variance: Float[Tensor, ""]) -> None:
        """Keep the thresholds above zero, where they could not come back from."""
        self.theta.clamp_(min=LEAST_THETA * self.theta_init * variance.sqrt())


class Gate(Penalised):
    """z = 1[pi > 0] ReLU(u exp(r_mag) + b_mag), penalised by sum_j ReLU(pi_j) / sqrt(V).

    pi is p, and u = p - b_enc. The step passes no gradient: the gate learns from the penalty, from
    its own reconstruction ReLU(pi) W_dec, which does not train the dictionary, and from AuxK.

    Args:
        d_sae: Number of latents.
        target_l0: L0 that the penalty is steered to.
        coefficient: Weight of the penalty at the start.
        sparsity_ramp: See `Penalised`.
    """

    in_units: ClassVar[tuple[str, ...]] = ("b_mag",)
    most: ClassVar[Mapping[str, float]] = MappingProxyType({"r_mag": MOST_LOG})

    def __init__(
        self, d_sae: int, target_l0: int, coefficient: float, sparsity_ramp: float
    ) -> None:
        super().__init__(target_l0, coefficient, sparsity_ramp)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def vectors(
        self, decoder: UnitDirections, b_enc: Float[Tensor, " d_sae"]
    ) -> list[Float[Tensor, " d_sae"]]:
        """exp(r_mag), and what pi exp(r_mag) is less than the magnitude."""
        gain = self.r_mag.exp()
        return [gain, self.b_mag - b_enc * gain]

    def latents(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
        variance: Float[Tensor, ""],
    ) -> Float[Tensor, "*tok n"]:
        """The magnitude where the gate, pi = pre_acts, is open."""
        gain, shift = vectors
        magnitude = torch.addcmul(shift, pre_acts, gain)
        return torch.where(pre_acts > 0, magnitude.relu(), 0.0)

    def penalties(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        z: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
        variance: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """Sum of ReLU(pi_j)."""
        return pre_acts.relu().sum()

    def made(
        self,
        variance: Float[Tensor, ""],
        pre_acts: Float[Tensor, "*tok n"],
        *vectors: Float[Tensor, " n"],
    ) -> tuple[list[Float[Tensor, "*tok n"]], Float[Tensor, ""]]:
        """z and ReLU(pi) to be decoded, and the sum of the latter."""
        opened = pre_acts.relu()
        return [self.latents(pre_acts, vectors, variance), opened], opened.sum()

    def losses(
        self, batch: LossBatch, terms: dict[str, Float[Tensor, ""]]
    ) -> dict[str, Float[Tensor, ""]]:
        """`l1` of the open gates, and `gate_aux`, what the gate's own reconstruction misses."""
        assert batch.out.by_products is not None
        # so that the gate's path can learn to reconstruct, but not to change the dictionary
        by_gate = batch.out.by_products.decoded[0] + batch.base.detach()
        return {
            "l1": self.weighted_penalty(batch) / batch.variance.sqrt(),
            "gate_aux": unexplained(batch.x, by_gate, batch.variance),
        }
