"""JumpReLU: a learned threshold per latent, and a penalty that counts latents."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.functional.jump import jump_relu
from kanllama_lightning.heads.dictionary import MEDIAN_ROWS
from kanllama_lightning.heads.penalised import FreeNorms, positive
from kanllama_lightning.types import InputError, SAEOutput, StepContext

SHARPNESS = 16.0
"""c of tanh(c z ||w|| / sqrt(V)): well above sqrt(V) / c a latent counts as one."""
START_L0 = 1e4
"""Latents that fire on a token at the start, where so many are less than half (METHODS A5)."""
LEAST_THETA = 0.01
"""Lower bound of theta, relative to its start (METHODS A5): the estimator's gradient is in
proportion to theta, so that a latent once at 0 would be a ReLU for good."""
LATENTS_AT_ONCE = 1024
"""Latents whose start quantiles are made at once."""


class JumpReLU(FreeNorms):
    """z_j = p_j 1[p_j > theta_j], p = (x - b_dec) W_enc + b_enc; x_hat = z W_dec + b_dec.

    L = ||e||^2 / V + lambda sum_j tanh(c z_j ||w_j|| / sqrt(V))
        + alpha_aux * AuxK + lambda_P sum_dead ReLU(theta_j - p_j) sg(||w_j||) / sqrt(V),

    means over tokens, V the variance of the start sample, sg a stop-gradient (ours: without it the
    last term shrinks w_j to nothing). c, the bandwidth and theta at the start are in units of
    sqrt(V), so that all of it is the same at every width (Anthropic has them in units of x, for one
    width that it does not name; METHODS A5 has both).
    Anthropic's form ("Dictionary learning optimization techniques",
    transformer-circuits.pub, January 2025) of Rajamanoharan et al. 2024 (arXiv 2407.14435): the
    straight-through estimator of the jump reaches p as well as theta (`jump_relu`). theta is
    trained itself, not its logarithm, in fp32 and kept > 0. Norms of the dictionary rows w_j
    are free; latents are reported as z_j ||w_j||. The pre-activation loss is for dead latents only
    and off by default: AuxK leaves a tenth as many dead at the same FVU (LOG.md). lambda is
    steered to target_l0, which takes its own ramp's place.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Non-zero latents per token on average (L0) that lambda is steered to.
        tanh_coefficient: lambda at the start.
        pre_act_coefficient: lambda_P, Anthropic's own pull on dead latents; 0 leaves it out.
        bandwidth: Width of the window around theta in which the estimator is not zero, in units
            of sqrt(V).
        theta_init: theta of all latents at the start, in units of sqrt(V).
        sparsity_ramp: Share of the token budget in which the wanted L0 falls from that of the
            start to target_l0.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    in_units: ClassVar[tuple[str, ...]] = (*FreeNorms.in_units, "theta")
    least: ClassVar[Mapping[str, float]] = MappingProxyType({"theta": 0.0})

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        tanh_coefficient: float = 0.005,
        pre_act_coefficient: float = 0.0,
        bandwidth: float = 0.5,
        theta_init: float = 0.025,
        sparsity_ramp: float = 0.05,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        weight = positive("tanh_coefficient", tanh_coefficient, "0.005")
        super().__init__(d_model, d_sae, target_l0, weight, sparsity_ramp, alpha_aux, seed)
        if not pre_act_coefficient >= 0:
            raise InputError(
                f"head.pre_act_coefficient={pre_act_coefficient}: must be 0 or more (default 0)"
            )
        positive("bandwidth", bandwidth, "0.5")
        # the gradient of theta is in proportion to theta, so that 0 would stay 0
        positive("theta_init", theta_init, "0.025")
        self.tanh_coefficient, self.pre_act_coefficient = tanh_coefficient, pre_act_coefficient
        self.bandwidth, self.theta_init = bandwidth, theta_init
        self.theta = nn.Parameter(torch.full((d_sae,), float(theta_init)))

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """As a linear head; then b_enc so that every latent fires, and the encoder's size anew.

        b_enc is such that a latent fires on a share min(1/2, START_L0 / d_sae) of the first
        rows. With q = (x - b_dec) W_dec^T, Q_j its quantile, W_enc = c W_dec^T and b_enc = theta -
        c Q a latent is theta + c (q_j - Q_j) where q_j > Q_j: the best c is a least squares fit.
        """
        super().start_(x)
        self.theta.fill_(self.theta_init).mul_(self.deviation())
        target = self.centred(x[:MEDIAN_ROWS])
        q = target @ self.W_dec.T
        fires = round(len(q) * min(0.5, START_L0 / self.d_sae))
        rank = max(1, len(q) - max(1, fires))
        chunks = q.split(LATENTS_AT_ONCE, dim=1)
        quantile = torch.cat([c.T.contiguous().kthvalue(rank, dim=1).values for c in chunks])
        above = (q - quantile).relu_()
        rest = target - ((above > 0).to(q.dtype) * self.theta) @ self.W_dec
        summed = above @ self.W_dec
        size = summed.square().sum()
        best = (rest * summed).sum() / size if size > 0 else size.new_ones(())
        # no fit is better than one that points the encoder away from its dictionary
        best = torch.where(best > 0, best, 1.0)
        self.set_encoder_(best * self.W_dec.T)
        self.b_enc.copy_(self.theta - best * quantile)

    def vectors(self) -> list[Float[Tensor, " d_sae"]]:
        """||w_j|| and theta."""
        return [self.row_norms(), self.theta.clone()]

    def levels(self) -> list[Float[Tensor, " d_sae"] | float]:
        """The lower end of the window, a little lowered (it is found by rounding), and theta."""
        theta, width = self.theta.detach(), self.bandwidth * self.deviation()
        return [theta - 0.5 * width - 1e-6 * (theta + width), theta]

    def latents(
        self, pre_acts: Float[Tensor, "*tok n"], vectors: Sequence[Float[Tensor, " n"]]
    ) -> Float[Tensor, "*tok n"]:
        """p above the threshold, else 0."""
        return jump_relu(pre_acts, vectors[1], self.bandwidth * self.deviation())

    def penalties(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        z: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
    ) -> Float[Tensor, ""]:
        """Sum of tanh(c z_j ||w_j|| / sqrt(V))."""
        return torch.tanh(z * (SHARPNESS / self.deviation() * vectors[0])).sum()

    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """`reconstruction`, `tanh` (the penalty); `pre_act`, `auxk` while latents are dead."""
        counted = self.by_products(x, out).penalty
        terms = super().losses(x, out, ctx) | {"tanh": self.sparsity_coefficient() * counted}
        if self.pre_act_coefficient and len(ctx.dead):
            short = (self.theta[ctx.dead] - self.pre_acts(x, ctx.dead)).relu()
            # a gradient for ||w_j|| would shrink dead latents to nothing before it revived them
            short_by = (short * self.row_norms()[ctx.dead].detach()).sum(1).mean()
            terms["pre_act"] = self.pre_act_coefficient * short_by / self.deviation()
        return terms

    @torch.no_grad()
    def project_(self) -> None:
        """Keep the thresholds above zero, where they could not come back from."""
        self.theta.clamp_(min=LEAST_THETA * self.theta_init * self.deviation())
