"""Standard: ReLU and an L1 penalty."""

from typing import Any

from kanllama_lightning.heads.decoders import FREE_NORM, FreeDirections
from kanllama_lightning.heads.encoders import UncentredEncoder
from kanllama_lightning.heads.penalties import L1, positive
from kanllama_lightning.heads.sae import SAE


class Standard(SAE):
    """z = ReLU(x W_enc + b_enc), x_hat = z W_dec + b_dec; no b_dec is taken off at the input.

    L = ||e||^2 / V + lambda sum_j z_j ||w_j|| / sqrt(V) + alpha_aux * AuxK, means over tokens, V
    the variance of the start sample, AuxK of p itself (no ReLU). Anthropic,
    "Update on how we train SAEs" (transformer-circuits.pub, April 2024), with AuxK for dead latents
    and lambda steered to target_l0. Norms of the dictionary rows w_j are free; that they stand in
    the penalty takes the gain from small z and large w. Latents are reported as z_j ||w_j||.
    b_dec is 0 at the start. L1 shrinks what it keeps: expect a relative bias below 1.

    Args:
        l1_coefficient: Weight of the penalty at the start; it is then steered to target_l0.
        sparsity_ramp: Share of the token budget in which the wanted L0 falls from that of the
            start to target_l0.
    """

    def __init__(
        self, l1_coefficient: float = 0.11, sparsity_ramp: float = 0.05, **shared: Any
    ) -> None:
        weight = positive("l1_coefficient", l1_coefficient, "0.11")
        super().__init__(**shared)
        self.l1_coefficient, self.sparsity_ramp = l1_coefficient, sparsity_ramp
        W, penalty = self.drawn(), L1(self.target_l0, weight, sparsity_ramp)
        self.compose(UncentredEncoder(FREE_NORM * W), penalty, FreeDirections(W))
