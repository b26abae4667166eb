"""Gated: one path decides whether a latent fires, another how strongly."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import LinearEncoder
from kanllama_lightning.heads.penalties import Gate, positive
from kanllama_lightning.heads.sae import SAE


class Gated(SAE):
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
        l1_coefficient: Weight of the penalty at the start; it is then steered to target_l0.
        sparsity_ramp: Share of the token budget in which the wanted L0 falls from that of the
            start to target_l0.
    """

    optimizer_args: ClassVar[Mapping[str, Any]] = MappingProxyType({"betas": (0.0, 0.999)})

    def __init__(
        self, l1_coefficient: float = 0.066, sparsity_ramp: float = 0.05, **shared: Any
    ) -> None:
        weight = positive("l1_coefficient", l1_coefficient, "0.066")
        super().__init__(**shared)
        self.l1_coefficient, self.sparsity_ramp = l1_coefficient, sparsity_ramp
        W, gate = self.drawn(), Gate(self.d_sae, self.target_l0, weight, sparsity_ramp)
        self.compose(LinearEncoder(W), gate, UnitDirections(W))
