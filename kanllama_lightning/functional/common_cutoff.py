"""The cut-off above which a given number of values lie, of all processes together.

Values that are positive sort as the integers their bits spell. Their upper and then their lower
halves are counted, so that whatever the values are, there are three all-reduces of fixed size, and
no number is waited for.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kanllama_lightning.functional import ranks

UPPER, LOWER = 16, 15
"""Bits of the two halves; the sign of a positive value is no part of them."""


def largest_in_all(
    values: Float[Tensor, " n"], wanted: int
) -> tuple[Bool[Tensor, " n"], Float[Tensor, ""]]:
    """Which of this process's values are among the largest of all, and the smallest of those.

    Exact: of equal values at the cut-off those of the lowest ranks win, and there the first.
    Needs `ranks.pooled`.

    Args:
        values: Positive, float32.
        wanted: How many are wanted of all processes together, >= 1; if there are not so many, all
            of them are kept and the cut-off is 0.
    """
    assert values.dtype == torch.float32, "the bits of other formats are not looked at"
    bits = values.contiguous().view(torch.int32)
    upper, lower = bits >> LOWER, bits & ((1 << LOWER) - 1)
    at_least = _at_least(upper, torch.ones_like(bits), 1 << UPPER)
    first, beyond = _last(at_least, wanted)
    enough, first, wanted_here = first >= 0, first.clamp_min(0), wanted - beyond
    inside = (upper == first).to(torch.int32)
    second, beyond = _last(_at_least(lower, inside, 1 << LOWER), wanted_here)
    cutoff = ((first << LOWER) | second.clamp_min(0)).to(torch.int32).view(torch.float32)
    ties = values == cutoff
    room = wanted_here - beyond - ranks.of_lower_ranks(ties.sum())
    kept = (values > cutoff) | (ties & (ties.cumsum(0) <= room))
    return kept | ~enough, torch.where(enough, cutoff, 0.0)


def _at_least(
    keys: Int[Tensor, " n"], counts: Int[Tensor, " n"], size: int
) -> Int[Tensor, " size"]:
    """For each number below `size`, how many keys of all processes are that or more."""
    found = torch.zeros(size, dtype=torch.int32, device=keys.device)
    found = ranks.total(found.index_add_(0, keys, counts))
    return found.flip(0).cumsum(0).flip(0)


def _last(
    at_least: Int[Tensor, " size"], wanted: Int[Tensor, ""] | int
) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
    """The largest key that so many reach, -1 if there is none; and how many lie beyond it."""
    last = (at_least >= wanted).sum() - 1
    return last, F.pad(at_least, (0, 1))[last + 1]
