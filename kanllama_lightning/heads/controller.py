"""A penalty's weight that finds itself: it is steered until L0 is what was asked for."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

RANGE = math.log(1e3)
"""The coefficient stays within a factor 1e3 of its default, either way."""
PROPORTIONAL = 1.0
"""Answer of log coefficient to an error of log L0."""
INTEGRAL = 0.5
"""What an error of log L0 adds to log coefficient in one horizon (1 / rate steps)."""
MOST_UP, MOST_DOWN = 0.25, 1.0
"""Errors of log L0 count up to this size. Up is slower: L0 answers late, and a dictionary that a
penalty has shrunk to nothing takes long to come back."""
NOTHING, ENOUGH = 0.1, 0.5
"""Share of the variance in the reconstructions: below the first a coefficient that should rise
falls instead, from the second on it rises freely."""
SETTLED = 0.8
"""Share of the budget from which on the gain falls to 0, as the learning rate does: weights that
hardly move any more would not answer, and the coefficient would run away."""


class SparsityController(nn.Module):
    """Proportional-integral control of log coefficient on the error e = log(L0 / target).

    L0 is smoothed over a horizon of 1 / rate steps, and follows from the token budget like all
    lengths here. Every step does

        I <- I + g INTEGRAL rate e,    coefficient = r initial exp(I + PROPORTIONAL e)

    with I and the exponent clamped to +-RANGE: as the integral itself is clamped nothing
    winds up, and it leaves a bound with the first error of the other sign. In the first `ramp` of
    the budget r rises from 0 to 1, and the target falls geometrically from the L0 of the first
    step to `target_l0`. g is r times a gain that falls to 0 at the end (SETTLED). e is bounded, and
    rising is held back where little is reconstructed (NOTHING, ENOUGH). Tensor arithmetic only: a
    GPU is never waited for. The state is in buffers, so a resumed run goes on as if it had
    not stopped.

    Args:
        initial: Coefficient at the start, > 0.
        target_l0: Wanted mean L0.
        ramp: Share of the token budget in which the target comes down; 0: none.
    """

    coefficient: Tensor
    integral: Tensor
    l0: Tensor
    l0_weight: Tensor
    start_l0: Tensor
    stuck: Tensor

    def __init__(self, initial: float, target_l0: float, ramp: float) -> None:
        super().__init__()
        self.initial, self.target_l0, self.ramp = initial, target_l0, ramp
        self.register_buffer("coefficient", torch.full((), 0.0 if ramp else float(initial)))
        self.register_buffer("integral", torch.zeros(()))
        # moving average of L0, and the weight that corrects its bias to zero
        self.register_buffer("l0", torch.zeros(()))
        self.register_buffer("l0_weight", torch.zeros(()))
        self.register_buffer("start_l0", torch.full((), torch.nan))
        # horizons for which the coefficient has been at a bound with L0 off
        self.register_buffer("stuck", torch.zeros(()))

    def mean_l0(self) -> Float[Tensor, ""]:
        """The smoothed L0."""
        return self.l0 / self.l0_weight

    def target(self, progress: float) -> Float[Tensor, ""]:
        """The L0 wanted at a share of the token budget."""
        done = min(1.0, progress / self.ramp) if self.ramp else 1.0
        start = self.start_l0.nan_to_num(self.target_l0)
        return start ** (1 - done) * self.target_l0**done

    @torch.no_grad()
    def update_(
        self, l0: Float[Tensor, ""], kept: Float[Tensor, ""], progress: float, rate: float
    ) -> None:
        """Move the coefficient after a training step.

        Args:
            l0: Mean L0 of the step's batch.
            kept: Variance of its reconstructions, relative to that of activations.
            progress: Share of the token budget already trained on, 0 to 1.
            rate: One over the horizon in steps.
        """
        # a batch without any activation has no logarithm
        l0 = l0.float().clamp_min(1e-3 * self.target_l0)
        self.start_l0.copy_(torch.where(self.start_l0.isnan(), l0, self.start_l0))
        self.l0.lerp_(l0, rate)
        self.l0_weight.lerp_(torch.ones_like(self.l0_weight), rate)
        error = (self.mean_l0() / self.target(progress)).log().clamp(-MOST_DOWN, MOST_UP)
        # where the penalty wins altogether, L0 is high with latents of no size: it must not grow
        trust = ((kept.float() - NOTHING) / (ENOUGH - NOTHING)).clamp(max=1.0)
        error = torch.where(error > 0, error * trust, error)
        begun = min(1.0, progress / self.ramp) if self.ramp else 1.0
        gain = begun * max(0.0, min(1.0, (1 - progress) / (1 - SETTLED)))
        self.integral.add_(error, alpha=gain * INTEGRAL * rate).clamp_(-RANGE, RANGE)
        wanted = (self.integral + PROPORTIONAL * error).clamp(-RANGE, RANGE)
        self.coefficient.copy_(begun * self.initial * wanted.exp())
        pushing = (wanted.abs() >= RANGE) & (error * wanted > 0) & (error.abs() > 0.1)
        self.stuck.copy_((self.stuck + rate) * pushing)
