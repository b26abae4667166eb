"""Every length of a run, in tokens: the recipe's absolute numbers, or a share of a small budget."""

import math
from typing import NamedTuple

from kanllama_lightning.types import InputError


class Schedule(NamedTuple):
    """Lengths for a budget of `tokens` in batches of `batch` (METHODS A0)."""

    tokens: int
    """Rows to train on in all."""
    batch: int
    """Rows per step."""
    decay: float = 0.2
    """Share of the run, at its end, over which the learning rate falls to 0."""

    @classmethod
    def of(cls, tokens: int, sae_batch_tokens: int, decay: float = 0.2) -> "Schedule":
        """The schedule of what a user asks for.

        Raises:
            InputError: A number is below 1, or `decay` is no share.
        """
        for name, value in (("tokens", tokens), ("sae_batch_tokens", sae_batch_tokens)):
            if value < 1:
                raise InputError(f"model.{name}={value}: must be at least 1")
        if not 0 <= decay <= 1:
            raise InputError(f"model.decay={decay}: must be from 0 to 1 (default 0.2)")
        return cls(tokens, sae_batch_tokens, decay)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return max(1, math.ceil(self.tokens / self.batch))

    @property
    def warmup_steps(self) -> int:
        """Linear rise of the learning rate: 1,000 steps, at most 5 % of the run."""
        return min(1000, self.steps // 20)

    @property
    def dead_after_tokens(self) -> int:
        """A latent is dead when it has not fired for so many tokens: 5 %, from 100k to 10M."""
        return min(max(self.tokens // 20, 100_000), 10_000_000)

    @property
    def threshold_rate(self) -> float:
        """Rate of the threshold's moving average: a horizon of 1,000 steps, at most 2 %."""
        return 1 / max(1, min(1000, self.steps // 50))

    @property
    def start_tokens(self) -> int:
        """Rows the start statistics are taken of: 65,536 or 1 %, at most a million."""
        return min(max(65_536, self.tokens // 100), 1_000_000)

    def rows_read(self, held: int) -> int:
        """Rows that processes take from their data: `held` to begin with, then those trained on.

        Args:
            held: Rows that the start statistics and the buffer take.
        """
        return held + self.steps * self.batch

    def lr_factor(self, step: int) -> float:
        """Multiplier of the learning rate: rise, hold, linear fall to 0 over the last share."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        # by the inverse, which is exactly 5 for 0.2
        falling = self.steps / (1 / self.decay) if self.decay else 0
        fall = min(1.0, (self.steps - step) / max(1, falling))
        return max(0.0, min(rise, fall))
