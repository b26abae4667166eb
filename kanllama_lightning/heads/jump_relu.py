"""JumpReLU: a learned threshold per latent, and a penalty that counts latents."""

from typing import Any

import torch

from kanllama_lightning.heads.decoders import FREE_NORM, FreeDirections
from kanllama_lightning.heads.encoders import LinearEncoder
from kanllama_lightning.heads.penalties import Jump, positive
from kanllama_lightning.heads.sae import SAE, FirstRows

START_L0 = 1e4
"""Latents that fire on a token at the start, where so many are less than half (METHODS A5)."""
LATENTS_AT_ONCE = 1024
"""Latents whose start quantiles are made at once."""


class JumpReLU(SAE):
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
        tanh_coefficient: Weight of the penalty at the start; it is then steered to target_l0.
        pre_act_coefficient: lambda_P, Anthropic's own pull on dead latents; 0 leaves it out.
        bandwidth: Width of the window around theta in which the estimator is not zero, in units
            of sqrt(V).
        theta_init: theta of all latents at the start, in units of sqrt(V).
        sparsity_ramp: Share of the token budget in which the wanted L0 falls from that of the
            start to target_l0.
    """

    selection: Jump
    decoder: FreeDirections

    def __init__(
        self,
        tanh_coefficient: float = 0.005,
        pre_act_coefficient: float = 0.0,
        bandwidth: float = 0.5,
        theta_init: float = 0.025,
        sparsity_ramp: float = 0.05,
        **shared: Any,
    ) -> None:
        weight = positive("tanh_coefficient", tanh_coefficient, "0.005")
        super().__init__(**shared)
        self.tanh_coefficient, self.pre_act_coefficient = tanh_coefficient, pre_act_coefficient
        self.bandwidth, self.theta_init = bandwidth, theta_init
        self.sparsity_ramp = sparsity_ramp
        penalty = Jump(
            self.d_sae,
            self.target_l0,
            weight,
            sparsity_ramp,
            pre_act_coefficient,
            bandwidth,
            theta_init,
        )
        W = self.drawn()
        self.compose(LinearEncoder(FREE_NORM * W), penalty, FreeDirections(W))

    @torch.no_grad()
    def start_parts_(self, first: FirstRows) -> None:
        """theta; b_enc so that every latent fires; and the encoder's size.

        b_enc is such that a latent fires on a share min(1/2, START_L0 / d_sae) of the first
        rows. With q = (x - b_dec) W_dec^T, Q_j its quantile, W_enc = c W_dec^T and b_enc = theta -
        c Q a latent is theta + c (q_j - Q_j) where q_j > Q_j: the best c is a least squares fit.
        """
        theta, W = self.selection.theta, self.decoder.W_dec
        theta.fill_(self.theta_init).mul_(self.x_variance.sqrt())
        q = first.guess @ W.T
        fires = round(len(q) * min(0.5, START_L0 / self.d_sae))
        rank = max(1, len(q) - max(1, fires))
        chunks = q.split(LATENTS_AT_ONCE, dim=1)
        quantile = torch.cat([c.T.contiguous().kthvalue(rank, dim=1).values for c in chunks])
        above = (q - quantile).relu_()
        rest = first.target - ((above > 0).to(q.dtype) * theta) @ W
        summed = above @ W
        size = summed.square().sum()
        best = (rest * summed).sum() / size if size > 0 else size.new_ones(())
        # no fit is better than one that points the encoder away from its dictionary
        best = torch.where(best > 0, best, 1.0)
        self.set_encoder_(best * W.T, first)
        self.encoder.b_enc.copy_(theta - best * quantile)
