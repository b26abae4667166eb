"""How much is validated where nobody says: a share of the training, by operations that are counted.

No clock is asked: the same run has the same sets on every machine.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from kanllama_lightning.data.token_data import VAL_TOKENS, TokenData
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.plan.costs import SPLICED, head_cost, lm_flops, lm_rest_flops
from kanllama_lightning.training.module import SAEModule

SHARE = 0.1
"""Of the operations of the training, for all validations of a run together."""
LEAST = 4096
"""Tokens of a set, whatever they take; VAL_TOKENS are the most."""
FEW = 8192
"""Tokens below which the interval of delta CE is wide."""
MOST = 10
"""Validations within a training, where nobody says how often, if the time allows them."""
FORWARD = 1 / 3
"""Share of a training step that is the forward pass: the backward pass takes about two."""


class ValidationSize(NamedTuple):
    """What is chosen, and what comes of it."""

    tokens: int
    """Of each set; whole rows."""
    share: float
    """Operations of all validations, as a share of the training's."""


def validations(steps: int, every: Any) -> int:
    """Validations within a training, the final one not counted.

    Args:
        steps: Of the training.
        every: Steps between two; anything but a number is none.
    """
    return steps // every if isinstance(every, int) and every > 0 else 0


def spacing(steps: int) -> int:
    """Steps between two validations where nobody says how often.

    Args:
        steps: Of the training.
    """
    return max(1, steps // MOST)


def control_runs(heads: Sequence[SAEHead]) -> int:
    """Runs of the LM for the controls of heads: untouched, PCA of each L0, each head untrained."""
    l0 = [head.target_l0 for head in heads if hasattr(head, "target_l0")]
    return 1 + len(set(l0)) + len(l0) if l0 else 0


def validation_size(module: SAEModule, data: TokenData, every: Any) -> ValidationSize:
    """As many tokens as SHARE of the training's operations pay for, within LEAST and VAL_TOKENS.

    Counted are matrix products of the LM and of the heads. With a cache the LM is left out of the
    training, as all runs but the first do without it.

    Args:
        module: Gives the LM, whose weights need not be loaded, heads and schedule.
        data: Gives the rows and the number of sets.
        every: `trainer.val_check_interval`.
    """
    lm, schedule, heads = module.lm, module.schedule, list(module.heads().values())
    upto, rest = lm_flops(lm, data.ctx_len), lm_rest_flops(lm, data.ctx_len)
    costs = [head_cost(copy.deepcopy(head), autocast=False) for head in heads]
    per_token = sum(cost.flops_per_token for cost in costs)
    per_step = sum(cost.flops_per_step for cost in costs)
    tokens = schedule.steps * schedule.batch
    training = tokens * per_token + schedule.steps * per_step
    if data.cache is None:
        training += (tokens + module.filling_rows) * upto
    seen = upto + (SPLICED + len(heads)) * rest + FORWARD * per_token
    times = data.val_sets * (validations(schedule.steps, every) + 1)
    one = times * seen + control_runs(heads) * rest  # a token of each set, in all validations
    rows = int(SHARE * training / one) // data.ctx_len
    least, most = -(-LEAST // data.ctx_len), max(1, VAL_TOKENS // data.ctx_len)
    chosen = max(least, min(rows, most)) * data.ctx_len
    return ValidationSize(chosen, chosen * one / training)
