"""How far a latent's activations reach: the range of a grid that lies on activations."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.functional import ranks

MIN_FIRINGS = 100
"""A latent that fired less often in the start sample gets the median reach."""


def first_reach(
    values: Float[Tensor, " nnz"], latents: Int[Tensor, " nnz"], d_sae: int
) -> Float[Tensor, " d_sae"]:
    """The largest activation of each latent in a sample (METHODS B3c).

    Args:
        values: Positive activations.
        latents: Latent of each.
        d_sae: Number of latents.
    """
    reach = values.new_zeros(d_sae).scatter_reduce_(0, latents, values, "amax")
    firings = torch.zeros_like(reach, dtype=torch.int64)
    firings.index_add_(0, latents, (values != 0).long())
    known = firings >= min(MIN_FIRINGS, int(firings.max()))
    middle = reach[known].median() if known.any() else reach.new_ones(())
    return torch.where(known, reach, middle).clamp_min(1e-6)


def follow_reach_(
    reach: Float[Tensor, " d_sae"],
    values: Float[Tensor, " nnz"],
    latents: Int[Tensor, " nnz"],
    rate: float,
) -> None:
    """Widen the reach to a batch's activations; where a latent fires, let it shrink by `rate`.

    Args:
        reach: Changed in place.
        values: Positive activations of the batch.
        latents: Latent of each.
        rate: Share by which the reach of a firing latent shrinks before it is widened.
    """
    most = ranks.largest(torch.zeros_like(reach).scatter_reduce_(0, latents, values, "amax"))
    reach.copy_(torch.where(most > 0, torch.maximum(reach * (1 - rate), most), reach))
