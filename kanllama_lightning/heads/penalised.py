"""Heads that select nothing: a penalty keeps their latents sparse."""

import logging
from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.functional.controller import SparsityController
from kanllama_lightning.heads.dictionary import Dictionary
from kanllama_lightning.types import DenseCodes, InputError, SAEOutput, StepContext

log = logging.getLogger(__name__)

CHECK_STEPS = 250
"""The controller's bound is looked at so often: reading it waits for the GPU."""
STUCK_HORIZONS = 3.0
"""At a bound for so many horizons with L0 off, the controller is said to have failed."""
REFERENCE_WIDTH = 2048
"""d_model that the default coefficients are for."""
LAST_LOOK, TOLERANCE = 0.95, 0.1
"""Share of the budget at which L0 should be within that share of its target."""
FREE_NORM = 0.1
"""Norm of the dictionary rows at the start where norms are free (METHODS A0)."""


def start_weight(name: str, given: float, d_model: int, power: int) -> float:
    """Weight of a penalty at the start: what was given is for REFERENCE_WIDTH.

    Activations have norm sqrt(d_model) here, so the squared error grows with d_model, and what
    weighs a penalty against it has to grow as well: a penalty in units of activations by
    sqrt(d_model), one that counts latents by d_model.

    Args:
        name: The argument, for messages.
        given: Its value.
        d_model: Width of the activations.
        power: Of the norm of activations, by which the weight goes.

    Raises:
        InputError: The value is not positive.
    """
    if not given > 0:
        raise InputError(
            f"head.{name}={given}: must be larger than 0; it is where the search for the weight "
            "that gives target_l0 begins"
        )
    return float(given * (d_model / REFERENCE_WIDTH) ** (power / 2))


class Penalised(Dictionary):
    """z is an elementwise function of p (`activate`); L = ||e||^2 + coefficient * penalty + ...

    The coefficient is no setting: a controller (`SparsityController`) moves it from the given
    value until the mean L0 of the training batches is `target_l0`. It is saved with the head.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Non-zero latents per token on average (L0) that the penalty is steered to.
        coefficient: Weight of the penalty at the start (`start_weight`).
        sparsity_ramp: Share of the token budget in which the wanted L0 falls from that of the
            start to target_l0.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    x_variance: Tensor

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
        # of the start sample, summed over coordinates, in the head's units
        self.register_buffer("x_variance", torch.full((), torch.nan))
        self._steps, self._warned, self._ended = 0, False, False

    @torch.no_grad()
    def standardise_(self, mean: Float[Tensor, " d_model"], std: Float[Tensor, " d_model"]) -> None:
        """Keep the variance that reconstructions are held against."""
        self.x_variance.copy_(std.square().sum())

    @abstractmethod
    def activate(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_sae"]:
        """z of pre-activations."""

    def codes(
        self, pre_acts: Float[Tensor, "tok d_sae"], z: Float[Tensor, "tok d_sae"]
    ) -> DenseCodes:
        """The latents as they are reported."""
        return DenseCodes(z)

    def reconstruct(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """What the dictionary makes of pre-activations, without b_dec."""
        return (self.activate(pre_acts) @ self.W_dec).float()

    def forward(self, x: Float[Tensor, "tok d_model"]) -> SAEOutput:
        """Reconstruction and latents of raw activations; training and inference are the same."""
        pre_acts = self.pre_acts(x)
        z = self.activate(pre_acts)
        x_hat = ((z @ self.W_dec).float() + self.b_dec) / self.scale
        return SAEOutput(x_hat, self.codes(pre_acts, z))

    def sparsity_coefficient(self) -> Float[Tensor, ""]:
        """The penalty's weight now; a copy, as autograd keeps it while the controller goes on."""
        return self.controller.coefficient.clone()

    @torch.no_grad()
    def observe_(self, out: SAEOutput, ctx: StepContext) -> None:
        """Steer the penalty's weight by the batch's L0; warn once where it is at its bound."""
        n_tokens = max(1, len(out.x_hat))
        l0 = torch.count_nonzero(out.codes.dense()) / n_tokens
        # 1 where a head was never started and the activations' variance is not known
        variance = (out.x_hat * self.scale).var(0, correction=0).sum()
        kept = (variance / self.x_variance).nan_to_num(1.0)
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
        coefficient: Weight of the penalty at the start (`start_weight`).
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

    def codes(
        self, pre_acts: Float[Tensor, "tok d_sae"], z: Float[Tensor, "tok d_sae"]
    ) -> DenseCodes:
        """z_j ||w_j||."""
        return DenseCodes(z * self.row_norms())

    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Reconstruction, in the LM's units, of dense latents z_j ||w_j||."""
        return super().decode(latents / self.row_norms().clamp_min(1e-30))

    def directions(
        self, at: Float[Tensor, " d_sae"], x: Float[Tensor, "tok d_model"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """w_j / ||w_j||, as the latents are z_j ||w_j||."""
        return (self.W_dec / self.row_norms().clamp_min(1e-30).unsqueeze(1)).detach()

    def _dead_reconstruction(
        self, pre_acts: Float[Tensor, "tok n_dead"], dead: Int[Tensor, " n_dead"]
    ) -> Float[Tensor, "tok d_model"]:
        """As with unit rows, the best being those with the largest p_j ||w_j|| (METHODS A3 a)."""
        acts = pre_acts.relu()
        k_aux = min(self.d_model // 2, len(dead))
        best = (acts * self.row_norms()[dead]).topk(k_aux, dim=1).indices
        kept = torch.zeros_like(acts).scatter(1, best, acts.gather(1, best))
        return (kept @ self.W_dec[dead]).float()

    def project_grad_(self) -> None:
        """Nothing: norms are free."""

    def project_(self) -> None:
        """Nothing: norms are free."""
