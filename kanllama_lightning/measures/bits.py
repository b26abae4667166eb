"""Bits per token: what it takes to write a code down, as coarsely as its reconstruction allows."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.functional.sparse import SparseCodes

Decode = Callable[[Float[Tensor, "tok d_sae"]], Float[Tensor, "tok d_model"]]
"""Dense codes to reconstructions, the LM's units: `SAEHead.decode`."""
ALLOWED = 0.01
"""Share of itself by which rounding the values may raise FVU."""
FINEST, COARSEST, HALVINGS = -10.0, 3.0, 12
"""Steps are searched between 2^FINEST and 2^COARSEST, by halving that range so often."""
DECODED_NUMBERS = 1 << 24
"""Numbers of dense codes that are decoded at once."""


class Sample(NamedTuple):
    """Tokens as a head sees them; all on one device."""

    codes: SparseCodes
    x: Float[Tensor, "tok d_model"]
    """What is to be reconstructed, the LM's units."""
    x_hat: Float[Tensor, "tok d_model"]
    """The head's reconstruction."""


class Bits(NamedTuple):
    """The length of a code, in bits per token, at a step."""

    which: float
    """Which latents fire: the sum of their entropies, each on its own."""
    values: float
    """The values of those that fire, rounded to multiples of `step`."""
    step: float
    """In units of each latent's root mean square over the tokens on which it fires."""
    fvu: float
    """Of the reconstruction from rounded values; NaN if the sample does not vary."""
    fvu_exact: float
    """Of that from the values as they are."""

    @property
    def total(self) -> float:
        """Both together."""
        return self.which + self.values


def joined(parts: Sequence[Sample]) -> Sample:
    """Several samples, one behind the other.

    Args:
        parts: At least one.
    """
    before, rows = 0, []
    for part in parts:
        rows.append(part.codes.rows + before)
        before += part.codes.n_rows
    values, latents = (
        torch.cat([getattr(part.codes, name) for part in parts]) for name in ("values", "latents")
    )
    codes = SparseCodes(values, torch.cat(rows), latents, before, parts[0].codes.d_sae)
    x, x_hat = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "x_hat"))
    return Sample(codes, x, x_hat)


@torch.no_grad()
def bits_per_token(decode: Decode, sample: Sample, allowed: float = ALLOWED) -> Bits:
    """The shortest code whose reconstruction is at most `allowed` worse (docs/methods.md, C).

    Latents are written as if they fired independently of each other, and rounded values by one
    table of frequencies for all latents: an upper bound. A table for each latent would let those
    that hardly ever fire cost nothing. After the description length of Ayonrinde et al. (2024,
    arXiv 2410.11179).

    Args:
        decode: Of the head that made the codes.
        sample: On the head's device.
        allowed: Share of itself by which FVU may rise.
    """
    codes, x = sample.codes, sample.x.double()
    rest = sample.x_hat - _decoded(decode, codes)  # what is not of the latents: a skip
    on, n = codes.values != 0, max(1, codes.n_rows)
    values, latents = codes.values[on].double(), codes.latents[on]
    size = _root_mean_square(values, latents, codes.d_sae)[latents]
    which = float(_entropy_of_shares(codes.fired().double() / n).sum())
    variance = (x - x.mean(0)).square().sum() if len(x) else x.sum()

    def fvu(x_hat: Tensor) -> float:
        if not variance > 0:
            return math.nan
        return float((x - x_hat.double()).square().sum() / variance)

    def written(step: float) -> Bits:
        steps = (values / (step * size)).round()
        _, counts = steps.unique(return_counts=True)
        share = counts.double() / max(1, len(values))
        each = -float((share * share.log2()).sum())
        coarse = (steps * step * size).to(codes.values.dtype)
        rounded = codes._replace(values=coarse, rows=codes.rows[on], latents=latents)
        found = fvu(_decoded(decode, rounded) + rest)
        return Bits(which, each * len(values) / n, step, found, exact)

    exact = fvu(sample.x_hat)
    if not exact > 0:  # nothing may be lost, or nothing varies: no step is fine enough
        return Bits(which, math.inf, 0.0, exact, exact)
    low, high, best = FINEST, COARSEST, None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = written(2.0**middle)
        if found.fvu <= exact * (1 + allowed):
            low, best = middle, found
        else:
            high = middle
    return best or written(2.0**low)


def _decoded(decode: Decode, codes: SparseCodes) -> Float[Tensor, "tok d_model"]:
    """What the head makes of codes, some rows at a time."""
    size = max(1, DECODED_NUMBERS // codes.d_sae)
    made = []
    for start in range(0, codes.n_rows, size):
        here = (codes.rows >= start) & (codes.rows < start + size)
        n = min(size, codes.n_rows - start)
        some = codes._replace(
            values=codes.values[here],
            rows=codes.rows[here] - start,
            latents=codes.latents[here],
            n_rows=n,
        )
        made.append(decode(some.dense()))
    return torch.cat(made) if made else decode(codes.dense())


def _root_mean_square(
    values: Float[Tensor, " nnz"], latents: Int[Tensor, " nnz"], d_sae: int
) -> Float[Tensor, " d_sae"]:
    squares = values.new_zeros(d_sae).index_add_(0, latents, values.square())
    return (squares / torch.bincount(latents, minlength=d_sae).clamp_min(1)).sqrt()


def _entropy_of_shares(p: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Bits per token of events with these probabilities, each on its own."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / math.log(2)
