"""Gated: one path decides whether a latent fires, another how strongly."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.heads.penalised import Penalised, positive
from kanllama_lightning.types import SAEOutput, StepContext


class Gated(Penalised):
    """z = 1[pi > 0] ReLU(u exp(r_mag) + b_mag), pi = u + b_enc, u = (x - b_dec) W_enc.

    L = ||x - (z W_dec + b_dec)||^2 / V + lambda sum_j ReLU(pi_j) / sqrt(V)
        + ||x - (ReLU(pi) sg(W_dec) + sg(b_dec))||^2 / V + alpha_aux * AuxK,

    means over tokens, sg a stop-gradient, V the variance of the start sample; W_dec has unit rows.
    Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders"
    (arXiv 2404.16014), whose b_gate is b_enc here; with AuxK (of pi itself, no ReLU) for dead
    latents and lambda steered to target_l0. The
    step passes no gradient: the gate learns from the second, third and last term alone, so
    the penalty does not shrink the magnitudes.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Non-zero latents per token on average (L0) that lambda is steered to.
        l1_coefficient: lambda at the start.
        sparsity_ramp: Share of the token budget in which the wanted L0 falls from that of the
            start to target_l0.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    in_units: ClassVar[tuple[str, ...]] = (*Penalised.in_units, "b_mag")
    optimizer_args: ClassVar[Mapping[str, Any]] = MappingProxyType({"betas": (0.0, 0.999)})

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        l1_coefficient: float = 0.066,
        sparsity_ramp: float = 0.05,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        weight = positive("l1_coefficient", l1_coefficient, "0.066")
        super().__init__(d_model, d_sae, target_l0, weight, sparsity_ramp, alpha_aux, seed)
        self.l1_coefficient = l1_coefficient
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def vectors(self) -> list[Float[Tensor, " d_sae"]]:
        """exp(r_mag), and what pi exp(r_mag) is less than the magnitude."""
        gain = self.r_mag.exp()
        return [gain, self.b_mag - self.b_enc * gain]

    def latents(
        self, pre_acts: Float[Tensor, "*tok n"], vectors: Sequence[Float[Tensor, " n"]]
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
    ) -> Float[Tensor, ""]:
        """Sum of ReLU(pi_j)."""
        return pre_acts.relu().sum()

    def made(
        self, pre_acts: Float[Tensor, "*tok n"], *vectors: Float[Tensor, " n"]
    ) -> tuple[list[Float[Tensor, "*tok n"]], Float[Tensor, ""]]:
        """z and ReLU(pi) to be decoded, and the sum of the latter."""
        opened = pre_acts.relu()
        return [self.latents(pre_acts, vectors), opened], opened.sum()

    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """`reconstruction`, `l1` of the open gates, `gate_aux`; `auxk` while latents are dead."""
        known = self.by_products(x, out)
        # so that the gate's path can learn to reconstruct, but not to change the dictionary
        by_gate = known.decoded[0] + self.b_dec.detach()
        return {
            **super().losses(x, out, ctx),
            "l1": self.sparsity_coefficient() * known.penalty / self.deviation(),
            "gate_aux": self.unexplained(x.float() * self.scale, by_gate),
        }
