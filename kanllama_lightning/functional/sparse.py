"""Selecting the largest activations of a batch, and decoding only those."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

SAMPLE_STRIDE = 61
"""Every so many values are looked at to guess a lower bound of the cut-off; odd, so that the
sample walks through all latents."""
SMALL = 1 << 16
"""Below so many values the guess costs more than it saves."""


def largest_positive(
    values: Float[Tensor, "tok d_sae"], count: int
) -> tuple[Int[Tensor, " kept"], Float[Tensor, ""]]:
    """Flat positions of the `count` largest positive values, ascending, and the cut-off.

    Exact: among equal values at the cut-off the lowest positions win. Fewer positions come back
    when fewer values are positive. On the CPU a sampled lower bound first throws away nearly all
    values (it only ever saves time: when it leaves too few, all values are searched).

    Args:
        values: Activations of a batch, any sign.
        count: How many to keep, >= 1.

    Returns:
        The positions, and the smallest kept value (0 when fewer than `count` were positive).
    """
    flat = values.reshape(-1)
    candidates = None
    if flat.device.type == "cpu" and flat.numel() > SMALL and count * 4 < flat.numel():
        sample = flat[::SAMPLE_STRIDE]
        rank = min(sample.numel(), int(1.3 * count * sample.numel() / flat.numel()) + 50)
        bound = sample.topk(rank, sorted=False).values.min().clamp_min(0.0)
        candidates = (flat > bound).nonzero().squeeze(1)
        if candidates.numel() < count:
            candidates = None
    if candidates is None:
        candidates = (flat > 0).nonzero().squeeze(1)
    kept = flat[candidates]
    if candidates.numel() < count:
        return candidates, kept.new_zeros(())
    cutoff = kept.topk(count, sorted=False).values.min()
    above = kept > cutoff
    ties = (kept == cutoff).nonzero().squeeze(1)[: count - int(above.sum())]
    above[ties] = True
    return candidates[above], cutoff


def sparse_decode(
    values: Float[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    latents: Int[Tensor, " nnz"],
    dictionary: Float[Tensor, "d_sae d_model"],
    n_rows: int,
) -> Float[Tensor, "tok d_model"]:
    """Sum of value * dictionary row over the kept activations of each token.

    Touches only kept rows of the dictionary, forward and backward.

    Args:
        values: Kept activations.
        rows: Token of each, ascending.
        latents: Dictionary row of each.
        dictionary: One direction per latent.
        n_rows: Number of tokens.
    """
    counts = torch.zeros(n_rows, dtype=torch.int64, device=rows.device)
    counts.index_add_(0, rows, torch.ones_like(rows))
    offsets = counts.cumsum(0) - counts
    return F.embedding_bag(
        latents, dictionary, offsets, mode="sum", per_sample_weights=values.to(dictionary.dtype)
    )
