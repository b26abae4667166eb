"""Standard: ReLU and an L1 penalty."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.heads.dictionary import MEDIAN_ROWS
from kanllama_lightning.heads.penalised import FreeNorms, positive
from kanllama_lightning.types import SAEOutput, StepContext


class Standard(FreeNorms):
    """z = ReLU(x W_enc + b_enc), x_hat = z W_dec + b_dec; no b_dec is taken off at the input.

    L = ||e||^2 / V + lambda sum_j z_j ||w_j|| / sqrt(V) + alpha_aux * AuxK, means over tokens, V
    the variance of the start sample, AuxK of p itself (no ReLU). Anthropic,
    "Update on how we train SAEs" (transformer-circuits.pub, April 2024), with AuxK for dead latents
    and lambda steered to target_l0. Norms of the dictionary rows w_j are free; that they stand in
    the penalty takes the gain from small z and large w. Latents are reported as z_j ||w_j||.
    b_dec is 0 at the start. L1 shrinks what it keeps: expect a relative bias below 1.

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

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        l1_coefficient: float = 0.11,
        sparsity_ramp: float = 0.05,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        weight = positive("l1_coefficient", l1_coefficient, "0.11")
        super().__init__(d_model, d_sae, target_l0, weight, sparsity_ramp, alpha_aux, seed)
        self.l1_coefficient = l1_coefficient

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """As a linear head, with b_dec = 0: c of W_enc = c W_dec^T is found anew."""
        super().start_(x)
        self.b_dec.zero_()
        target = x[:MEDIAN_ROWS].float() * self.scale
        summed = self.reconstruct(target @ self.W_dec.T)
        size = summed.square().sum()
        best = (target * summed).sum() / size if size > 0 else target.new_ones(())
        self.set_encoder_(best * self.W_dec.T)

    def centred(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_model"]:
        """Raw activations in the head's units: this encoder takes nothing off."""
        return x.float() * self.scale

    def bias(self) -> Float[Tensor, " d_sae"]:
        """b_enc alone, as b_dec is not at the input."""
        return self.b_enc

    def vectors(self) -> list[Float[Tensor, " d_sae"]]:
        """||w_j||."""
        return [self.row_norms()]

    def latents(
        self, pre_acts: Float[Tensor, "*tok n"], vectors: Sequence[Float[Tensor, " n"]]
    ) -> Float[Tensor, "*tok n"]:
        """ReLU."""
        return pre_acts.relu()

    def penalties(
        self,
        pre_acts: Float[Tensor, "*tok n"],
        z: Float[Tensor, "*tok n"],
        vectors: Sequence[Float[Tensor, " n"]],
    ) -> Float[Tensor, ""]:
        """Sum of z_j ||w_j||."""
        return (z @ vectors[0]).sum()

    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """`reconstruction`, `l1` (the penalty), `auxk` while latents are dead."""
        l1 = self.sparsity_coefficient() * self.by_products(x, out).penalty / self.deviation()
        return {**super().losses(x, out, ctx), "l1": l1}
