"""95 % intervals of ratios of sums, by resampling documents.

Tokens of a document depend on each other, documents hardly: so a resample draws whole documents,
with replacement, and divides summed numerators by summed denominators once. Two runs are compared
over the same draws, which takes out what is hard about a document for both. Inputs are sums per
document; everything is computed in fp64 on the CPU and repeats exactly for a seed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
BLOCK = 2**21
"""Counts held at once (16 MiB as fp64)."""


class Contrast(NamedTuple):
    """A difference of two groups of runs."""

    value: float
    low: float
    high: float
    """Ends of its 95 % interval."""
    p: float
    """Twice the share of draws on the other side of zero, at most 1: two-sided, not corrected."""


def interval(
    numerator: Float[Tensor, " doc"],
    denominator: Float[Tensor, " doc"],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of sum(numerator) / sum(denominator); NaN for fewer than 2 documents.

    Args:
        numerator: Sum of each document.
        denominator: Sum of each document, in the same order.
        resamples: How many times the documents are drawn.
        seed: Seed of the draws.
    """
    return middle(ratios(numerator[:, None], denominator[:, None], resamples, seed)[:, 0])


def difference(
    num_a: Float[Tensor, " doc"],
    den_a: Float[Tensor, " doc"],
    num_b: Float[Tensor, " doc"],
    den_b: Float[Tensor, " doc"],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Contrast:
    """Ratio of a minus ratio of b, and its percentile interval over the same resampled documents.

    Args:
        num_a: Numerators of the first run.
        den_a: Its denominators.
        num_b: Numerators of the second run, for the same documents in the same order.
        den_b: Its denominators.
        resamples: How many times the documents are drawn.
        seed: Seed of the draws.
    """
    return group_difference(
        num_a[:, None], den_a[:, None], num_b[:, None], den_b[:, None], resamples, seed
    )


def group_difference(
    num_a: Float[Tensor, "doc runs_a"],
    den_a: Float[Tensor, "doc runs_a"],
    num_b: Float[Tensor, "doc runs_b"],
    den_b: Float[Tensor, "doc runs_b"],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Contrast:
    """Mean ratio of the runs of a minus that of b, and its interval; see `contrast`.

    Args:
        num_a: Numerators of the first group, one column per run.
        den_a: Its denominators.
        num_b: Numerators of the second group, for the same documents in the same order.
        den_b: Its denominators.
        resamples: How many times documents and seeds are drawn.
        seed: Seed of the draws.
    """
    n_a, n_b = num_a.shape[1], num_b.shape[1]
    top = torch.cat([num_a, num_b], 1).double().cpu()
    bottom = torch.cat([den_a, den_b], 1).double().cpu()
    whole_a, whole_b = (top.sum(0) / bottom.sum(0)).split([n_a, n_b])
    draws_a, draws_b = ratios(top, bottom, resamples, seed).split([n_a, n_b], 1)
    return contrast(whole_a, draws_a, whole_b, draws_b, seed)


def contrast(
    whole_a: Float[Tensor, " runs_a"],
    draws_a: Float[Tensor, "resamples runs_a"],
    whole_b: Float[Tensor, " runs_b"],
    draws_b: Float[Tensor, "resamples runs_b"],
    seed: int = 0,
) -> Contrast:
    """Mean of the runs of a minus that of b, its interval, and how seldom chance gives as much.

    The interval covers the documents (one draw of them serves all runs) and, where a group has
    several runs, the seeds they differ in: what another training run would give. Three seeds drawn
    with replacement spread far too little, so the seeds' part is drawn from Student's t with the
    spread within groups, pooled, as in a two-sample t-test; a group of one run borrows the spread
    of the other. With one run in each it covers the documents alone. It never covers other
    training data, other settings, or the choice of the pair among many.

    Args:
        whole_a: Ratio of each run of the first group over all documents.
        draws_a: The same over each resample, from `ratios`.
        whole_b: Sums of the second group.
        draws_b: Over the same resamples.
        seed: Seed of the seeds' part.
    """
    n_a, n_b = len(whole_a), len(whole_b)
    draws = draws_a.mean(1) - draws_b.mean(1)
    free = n_a + n_b - 2
    if free > 0:
        squares = [(w - w.mean()).square().sum() for w in (whole_a, whole_b)]
        error = ((squares[0] + squares[1]) / free * (1 / n_a + 1 / n_b)).sqrt()
        draws = draws + error * _student(len(draws), free, seed + 1)
    value = float(whole_a.mean() - whole_b.mean())
    return Contrast(value, *middle(draws), two_sided(draws))


def centre(
    whole: Float[Tensor, " runs"], draws: Float[Tensor, "resamples runs"], seed: int = 0
) -> tuple[float, float, float]:
    """Mean of runs that differ in their seed, and its interval over documents and seeds.

    The seeds' part is that of a one-sample t-test, for the reason given at `contrast`; of one run
    the interval covers the documents alone.

    Args:
        whole: Ratio of each run over all documents.
        draws: The same over each resample, from `ratios`.
        seed: Seed of the seeds' part.
    """
    n, mean = len(whole), draws.mean(1)
    if n > 1:
        error = (whole.var(correction=1) / n).sqrt()
        mean = mean + error * _student(len(draws), n - 1, seed + 1)
    return float(whole.mean()), *middle(mean)


def ratios(
    numerators: Float[Tensor, "doc quantity"],
    denominators: Float[Tensor, "doc quantity"],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[Tensor, "resamples quantity"]:
    """Ratios of sums over each resample; all quantities see the same documents.

    NaN for fewer than 2 documents, which say nothing of how documents differ.

    Args:
        numerators: Sums of each document.
        denominators: Sums of each document.
        resamples: How many times the documents are drawn.
        seed: Seed of the draws.
    """
    top, bottom = numerators.double().cpu(), denominators.double().cpu()
    if len(top) < 2:
        return torch.full((resamples, top.shape[1]), torch.nan, dtype=torch.float64)
    sums = [(counts @ top, counts @ bottom) for counts in _counts(len(top), resamples, seed)]
    return torch.cat([n / d for n, d in sums])


def middle(draws: Float[Tensor, " resamples"]) -> tuple[float, float]:
    """Ends of the middle 95 % of the draws; NaN ones (0 / 0) are left out."""
    tail = (1 - LEVEL) / 2
    low, high = draws.nanquantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return low, high


def two_sided(draws: Float[Tensor, " resamples"]) -> float:
    """p of a difference whose draws these are, of zero; NaN without a draw that is a number.

    Twice the smaller tail with one draw added to it, so that n draws say no less than 2 / (n + 1)
    (Davison and Hinkley 1997, Bootstrap Methods and their Application, section 4.2).
    """
    known = draws[~draws.isnan()]
    if not len(known):
        return math.nan
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(known) + 1))


def holm(p: Sequence[float]) -> list[float]:
    """p of each of many comparisons, corrected for all of them (Holm 1979).

    The chance that any of those below a level is below it by accident is at most the level. NaN
    counts as a comparison and stays NaN.

    Args:
        p: Of each comparison by itself.
    """
    order = sorted(range(len(p)), key=lambda i: math.inf if math.isnan(p[i]) else p[i])
    corrected, least = [math.nan] * len(p), 0.0
    for done, i in enumerate(order):
        if not math.isnan(p[i]):
            least = max(least, min(1.0, (len(p) - done) * p[i]))
            corrected[i] = least
    return corrected


def _counts(n_doc: int, resamples: int, seed: int) -> Iterator[Float[Tensor, "block doc"]]:
    """How often each resample holds each document, in blocks of resamples."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, BLOCK // n_doc)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = torch.randint(n_doc, (rows, n_doc), generator=generator)
        drawn += torch.arange(rows)[:, None] * n_doc
        counts = torch.bincount(drawn.flatten(), minlength=rows * n_doc)
        yield counts.view(rows, n_doc).double()


def _student(draws: int, free: int, seed: int) -> Float[Tensor, " draws"]:
    """Draws from Student's t with `free` degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(draws, free + 1, generator=generator, dtype=torch.float64)
    return normal[:, 0] / normal[:, 1:].square().mean(1).sqrt()
