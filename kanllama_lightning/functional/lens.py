"""The logit lens of directions: what each one, written to the residual stream, says of each token.

T_j = w_j (diag(g) W_U) over the whole vocabulary, g the gain of the final RMSNorm. What is left
out, 1 / rms(h), is one positive factor per token: it changes neither skewness nor kurtosis,
nor the order of the tokens. RMSNorm does not centre, so no mean is taken off (METHODS C).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LensStatistics(NamedTuple):
    """Over the vocabulary, per direction; NaN where a direction is undefined (zero or NaN)."""

    mean: Float[Tensor, " n"]
    """In logits per unit of activation, before the final norm's 1 / rms."""
    std: Float[Tensor, " n"]
    """Standard deviation over all tokens (no n - 1); the unit of the mean."""
    skewness: Float[Tensor, " n"]
    """mean(z^3) of standardised logits z; 0 for a normal distribution."""
    kurtosis: Float[Tensor, " n"]
    """mean(z^4); 3 for a normal distribution (the excess kurtosis is 3 less)."""
    top_ids: Int[Tensor, "n top"]
    """Tokens raised most, largest first; they mean nothing where the direction is undefined."""
    top_values: Float[Tensor, "n top"]
    """Their T, in the unit of the mean."""
    bottom_ids: Int[Tensor, "n top"]
    """Tokens lowered most, lowest first."""
    bottom_values: Float[Tensor, "n top"]
    """Their T."""
    low: Float[Tensor, " n"]
    """Smallest and largest T: the ends of the histogram."""
    high: Float[Tensor, " n"]
    counts: Int[Tensor, "n bins"]
    """Tokens in each of equally wide bins between them."""


def logit_lens(
    directions: Float[Tensor, "n d_model"],
    gain: Float[Tensor, " d_model"],
    unembedding: Float[Tensor, "d_model vocab"],
    top: int = 10,
    block: int = 256,
    bins: int = 0,
    done: Callable[[int], None] | None = None,
) -> LensStatistics:
    """Moments and extreme tokens of T = (w g) W_U.

    [n, vocab] never exists whole: three blocks of [block, vocab] in fp32 do, and W_U in fp32; for
    a histogram the size of two more.

    Args:
        directions: One per row, of any norm.
        gain: g; folded into the directions, so W_U is not written to.
        unembedding: W_U, of any floating type.
        top: Tokens listed at either end; all of them if the vocabulary has fewer; 0 lists none.
        block: Directions worked on at once.
        bins: Bins of the histogram of T; 0 makes none.
        done: Told after each block how many directions it was.
    """
    if top < 0 or block < 1 or bins < 0:
        raise ValueError(f"top={top}, block={block}, bins={bins}: must be at least 0, 1 and 0")
    weights = unembedding.float()  # once: at 128,256 tokens of width 2048, 1 GiB at most
    gain = gain.float()
    k = min(top, weights.shape[1])
    # one block even where there is no direction: its empty tensors have the right shapes
    found = []
    for w in directions.split(block):
        found.append(_block(w.float() * gain, weights, k, bins))
        if done is not None:
            done(len(w))
    return LensStatistics(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _block(
    folded: Float[Tensor, "n d_model"],
    weights: Float[Tensor, "d_model vocab"],
    top: int,
    bins: int,
) -> LensStatistics:
    logits = folded @ weights
    ends = logits.aminmax(dim=1)
    counts = _histogram(logits, ends.min, ends.max, bins)
    high, low = logits.topk(top, dim=1), logits.topk(top, dim=1, largest=False)
    mean = logits.mean(1, keepdim=True)
    z = logits.sub_(mean)
    std = z.square().mean(1, keepdim=True).sqrt()
    defined = std > 0  # False for NaN, too
    z.div_(std)
    power = z.square()
    kurtosis = power.square().mean(1, keepdim=True)
    skewness = power.mul_(z).mean(1, keepdim=True)
    mean, std, skewness, kurtosis = (
        torch.where(defined, a, torch.nan).squeeze(1) for a in (mean, std, skewness, kurtosis)
    )
    above, below = (torch.where(defined, a.values, torch.nan) for a in (high, low))
    extremes = (high.indices, above, low.indices, below)
    return LensStatistics(mean, std, skewness, kurtosis, *extremes, ends.min, ends.max, counts)


def _histogram(
    logits: Float[Tensor, "n vocab"], low: Float[Tensor, " n"], high: Float[Tensor, " n"], bins: int
) -> Int[Tensor, "n bins"]:
    """Counts between the ends of each row, which belong to the outermost bins."""
    if not bins:
        return torch.zeros(len(logits), 0, dtype=torch.int64, device=logits.device)
    width = ((high - low) / bins).unsqueeze(1)
    at = ((logits - low.unsqueeze(1)) / width).nan_to_num(0.0).clamp_(0, bins - 1).long()
    at += bins * torch.arange(len(at), device=at.device).unsqueeze(1)
    return torch.bincount(at.flatten(), minlength=len(at) * bins).view(len(at), bins)


def random_unit(
    gain: Float[Tensor, " d_model"],
    unembedding: Float[Tensor, "d_model vocab"],
    n: int = 1024,
    seed: int = 0,
    block: int = 256,
    done: Callable[[int], None] | None = None,
) -> LensStatistics:
    """The baseline: the moments of n random unit directions, from a generator of their own.

    Args:
        gain: As in `logit_lens`.
        unembedding: As in `logit_lens`.
        n: How many.
        seed: The same seed gives the same directions, on every device.
        block: Directions worked on at once.
        done: As in `logit_lens`.
    """
    drawn = torch.randn(n, len(gain), generator=torch.Generator().manual_seed(seed))
    unit = drawn / drawn.norm(dim=1, keepdim=True)
    return logit_lens(unit.to(gain.device), gain, unembedding, top=0, block=block, done=done)


def largest_cosine(directions: Float[Tensor, "n d_model"], block: int = 256) -> Float[Tensor, " n"]:
    """Largest cosine of each direction with any other, -1 to 1.

    A zero or NaN direction gives NaN and is nobody's neighbour; NaN, too, where there is no other.

    Args:
        directions: One per row, of any norm.
        block: Rows of the matrix of cosines that exist at once.
    """
    norms = directions.float().norm(dim=1)
    defined = ((norms > 0) & norms.isfinite()).nonzero().squeeze(1)
    found = norms.new_full(norms.shape, torch.nan)
    if len(defined) < 2:
        return found
    unit = directions[defined].float() / norms[defined, None]
    start = 0
    for rows in unit.split(block):
        cosines = rows @ unit.T
        own = torch.arange(len(rows), device=rows.device)
        cosines[own, start + own] = -torch.inf
        found[defined[start : start + len(rows)]] = cosines.amax(1).clamp(-1, 1)
        start += len(rows)
    return found


def pearson(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Correlation over the pairs of which both are finite; NaN if there is none to speak of.

    That is for fewer than two pairs, or when one of the two is constant.
    """
    x, y = _paired(x, y)
    if not len(x):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    size = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / size if size > 0 else math.nan


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Correlation of the ranks, tied values sharing their mean rank; otherwise as `pearson`."""
    x, y = _paired(x, y)
    return pearson(_ranks(x), _ranks(y))


def _paired(
    x: Float[Tensor, " n"], y: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " some"], Float[Tensor, " some"]]:
    both = x.isfinite() & y.isfinite()
    return x[both].double(), y[both].double()


def _ranks(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    _, place, count = torch.unique(x, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]
