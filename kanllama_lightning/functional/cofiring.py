"""Latents that fire on the same tokens: how much two of them overlap, and go together."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CELLS = 1 << 22
"""Numbers that exist at once, a few times over."""
DENSE = 16
"""Tokens on which more than d_sae / DENSE latents fire on average are counted as matrices."""


class Neighbours(NamedTuple):
    """Per latent, those that overlap most with it, best first; fewer than asked end in -1."""

    latent: Int[Tensor, "d_sae top"]
    jaccard: Float[Tensor, "d_sae top"]
    """|i and j| / |i or j| of the tokens on which each fires; fp64, 0 where there is none."""
    joint: Int[Tensor, "d_sae top"]
    """|i and j|."""
    pearson: Float[Tensor, "d_sae top"]
    """Correlation of the two activations over all tokens, silent ones too; fp64."""


def neighbours(
    values: Float[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    latents: Int[Tensor, " nnz"],
    n_rows: int,
    d_sae: int,
    top: int = 5,
    least: int = 50,
) -> Neighbours:
    """The latents that fire on the same tokens as each one; exact over these codes.

    Counts of all pairs exist for some latents at a time only. The work is that of all pairs that
    fire on a token: nnz times L0.

    Args:
        values: Activations of many tokens, on the CPU.
        rows: Token of each, ascending.
        latents: Latent of each.
        n_rows: Number of tokens.
        d_sae: Number of latents.
        top: Most neighbours of each latent.
        least: Tokens on which both have to fire (METHODS C).
    """
    fires = values != 0
    rows, latents, z, n = rows[fires], latents[fires], values[fires].double(), n_rows
    order = latents.argsort(stable=True)
    fired = torch.bincount(latents, minlength=d_sae)
    total = z.new_zeros(d_sae).index_add_(0, latents, z)
    mean = total / max(1, n)
    squares = z.new_zeros(d_sae).index_add_(0, latents, z.square())
    deviation = (squares / max(1, n) - mean.square()).clamp_min(0).sqrt()
    ends = fired.cumsum(0)
    row_starts = torch.searchsorted(rows, torch.arange(n + 1))
    found: list[Neighbours] = []
    top = min(top, max(0, d_sae - 1))
    step = max(1, CELLS // d_sae)
    dense = len(rows) > n * d_sae / DENSE
    for first in range(0, d_sae, step):
        last = min(first + step, d_sae)
        begin = int(ends[first - 1]) if first else 0
        owners = order[begin : int(ends[last - 1])]
        if dense:
            joint, product = _by_matrix(rows, latents, z, row_starts, first, last, d_sae)
        else:
            joint, product = _by_pairs(rows, latents, z, owners, row_starts, first, last, d_sae)
        either = fired[first:last, None] + fired - joint
        jaccard = joint.double() / either.clamp_min(1)
        jaccard[joint < least] = -1.0
        jaccard[torch.arange(last - first), torch.arange(first, last)] = -1.0
        best = jaccard.topk(top, dim=1)
        which = best.indices
        covariance = product.gather(1, which) / max(1, n) - mean[first:last, None] * mean[which]
        pearson = covariance / (deviation[first:last, None] * deviation[which])
        none = best.values < 0
        found.append(
            Neighbours(
                which.masked_fill(none, -1),
                best.values.clamp_min(0),
                joint.gather(1, which).masked_fill(none, 0),
                pearson.masked_fill(none, 0),
            )
        )
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _by_pairs(
    rows: Int[Tensor, " nnz"],
    latents: Int[Tensor, " nnz"],
    z: Float[Tensor, " nnz"],
    owners: Int[Tensor, " some"],
    row_starts: Int[Tensor, " tok1"],
    first: int,
    last: int,
    d_sae: int,
) -> tuple[Int[Tensor, "block d_sae"], Float[Tensor, "block d_sae"]]:
    """Joint counts and sums of products of latents first..last-1 with all, pair by pair."""
    joint = torch.zeros((last - first) * d_sae, dtype=torch.int64)
    product = torch.zeros((last - first) * d_sae, dtype=torch.float64)
    counts = (row_starts[1:] - row_starts[:-1])[rows[owners]]
    upto = counts.cumsum(0)
    at = 0
    while at < len(owners):
        done = int(upto[at - 1]) if at else 0
        end = max(at + 1, int(torch.searchsorted(upto, done + CELLS, right=True)))
        some, many = owners[at:end], counts[at:end]
        mine = some.repeat_interleave(many)
        steps = torch.arange(len(mine)) - (many.cumsum(0) - many).repeat_interleave(many)
        other = row_starts[rows[mine]] + steps
        keys = (latents[mine] - first) * d_sae + latents[other]
        joint += torch.bincount(keys, minlength=len(joint))
        product += torch.bincount(keys, weights=z[mine] * z[other], minlength=len(product))
        at = end
    return joint.view(-1, d_sae), product.view(-1, d_sae)


def _by_matrix(
    rows: Int[Tensor, " nnz"],
    latents: Int[Tensor, " nnz"],
    z: Float[Tensor, " nnz"],
    row_starts: Int[Tensor, " tok1"],
    first: int,
    last: int,
    d_sae: int,
) -> tuple[Int[Tensor, "block d_sae"], Float[Tensor, "block d_sae"]]:
    """The same as products of matrices, for codes that are hardly sparse."""
    joint = torch.zeros(last - first, d_sae, dtype=torch.float64)
    product = torch.zeros(last - first, d_sae, dtype=torch.float64)
    n = len(row_starts) - 1
    step = max(1, CELLS // d_sae)
    for begin in range(0, n, step):
        end = min(begin + step, n)
        part = slice(int(row_starts[begin]), int(row_starts[end]))
        codes = torch.zeros(end - begin, d_sae, dtype=torch.float64)
        codes[rows[part] - begin, latents[part]] = z[part]
        on = (codes != 0).double()
        joint += on[:, first:last].T @ on
        product += codes[:, first:last].T @ codes
    return joint.round().long(), product
