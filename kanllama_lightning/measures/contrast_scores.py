"""CE-Bench: whether latents tell pairs of opposite stories apart (METHODS E1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ContrastScores(NamedTuple):
    """Scores of every pair, each the largest of m z-scores: no larger than about sqrt(m)."""

    contrastive: Float[Tensor, " pair"]
    independence: Float[Tensor, " pair"]
    interpretability: Float[Tensor, " pair"]


def contrast_scores(
    first: Float[Tensor, "pair d_sae"],
    second: Float[Tensor, "pair d_sae"],
    tokens: Int[Tensor, "pair 2"],
    subjects: Sequence[str],
    legacy: bool = False,
) -> ContrastScores:
    """The scores of pairs of stories.

    Args:
        first: Mean latents of the first story of each pair, over its tokens.
        second: Of the second.
        tokens: How many tokens each story has.
        subjects: What each pair is about; two or more of them unless `legacy`.
        legacy: Compare with zero instead of the other subjects, as the published code did.

    Raises:
        ValueError: There is one subject alone.
    """
    weight = tokens.double() / tokens.sum(1, keepdim=True).double()
    names = {name: i for i, name in enumerate(dict.fromkeys(subjects))}
    if len(names) < 2 and not legacy:
        raise ValueError("independence is of two or more subjects")
    own = torch.tensor([names[s] for s in subjects])
    average = torch.zeros(len(names), first.shape[1], dtype=torch.float64)
    for i, subject in enumerate(own.tolist()):
        average[subject] += _both(first[i], second[i], weight[i])
    average /= own.bincount(minlength=len(names))[:, None]
    total = average.sum(0)
    scores = []
    for i, subject in enumerate(own.tolist()):
        others = torch.zeros_like(total)
        if not legacy:
            others = (total - average[subject]) / (len(names) - 1)
        apart = (first[i].double() - second[i].double()).abs()
        alone = (_both(first[i], second[i], weight[i]) - others).abs()
        scores.append([_largest(apart), _largest(alone), _largest(apart + alone)])
    return ContrastScores(*torch.tensor(scores, dtype=torch.float64).T)


def permuted(
    means: Float[Tensor, "story d_sae"], generator: torch.Generator
) -> Float[Tensor, "story d_sae"]:
    """Every story's latents in an order of its own: a null of the same values and sparsity."""
    order = torch.rand(means.shape, generator=generator).argsort(1)
    return means.gather(1, order)


def _both(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return weight[0] * a.double() + weight[1] * b.double()


def _largest(values: Float[Tensor, " d_sae"]) -> float:
    """Largest z-score; the deviation is the unbiased one, 1 where it is 0."""
    deviation = values.std()
    scale = deviation if float(deviation) > 0 else 1.0
    return float(((values - values.mean()) / scale).max())
