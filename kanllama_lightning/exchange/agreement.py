"""Whether two heads make the same of activations, rounding apart."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.types import InputError

TOLERANCE = 1e-5
"""Largest difference of latents and reconstructions, over the largest number of their row."""
NUDGE = 2.0**-20
"""Share by which every coordinate is moved to find latents whose firing is a matter of rounding."""
NUDGES = 4
ROWS = 1024
"""Rows that are compared at once."""
SIZES = (0.0, 1e-3, 0.1, 10.0, 100.0, 1000.0)
"""Of the extreme rows, over that of ordinary ones."""


class Agreement(NamedTuple):
    """How far two heads differ over a sample."""

    tokens: int
    l0: float
    """Latents per token of the first."""
    flips: int
    """(token, latent) that fires in one and not in the other."""
    rounding: int
    """Those among them whose firing turns when an activation is moved by a millionth."""
    latents: float
    """Largest difference of an activation where both fire, over the largest of its token."""
    reconstruction: float
    """Largest difference of a coordinate, over the largest of its token; rows without a flip."""

    @property
    def holds(self) -> bool:
        """Whether they are the same but for rounding."""
        real = self.flips - self.rounding
        return real == 0 and self.latents <= TOLERANCE and self.reconstruction <= TOLERANCE

    def __str__(self) -> str:
        by = f" ({self.rounding} of them a matter of rounding)" if self.flips else ""
        return (
            f"{self.tokens:,} tokens, L0 {self.l0:.2f}: {self.flips} latents flipped{by}, "
            f"largest difference of latents {self.latents:.1e}, of reconstructions "
            f"{self.reconstruction:.1e} (relative to the largest of a token)"
        )


@torch.no_grad()
def agreement(
    ours: SAEHead,
    encode: Callable[[Float[Tensor, "tok d_model"]], Float[Tensor, "tok d_sae"]],
    decode: Callable[[Float[Tensor, "tok d_sae"]], Float[Tensor, "tok d_model"]],
    x: Float[Tensor, "tok d_row"],
    theirs_base: Callable[[Float[Tensor, "tok d_row"]], Tensor] | None = None,
) -> Agreement:
    """Compare a head with another encoder and decoder of the same latents.

    Args:
        ours: The head.
        encode: The other's latents, dense.
        decode: The other's reconstructions of them.
        x: Raw activations.
        theirs_base: What the other adds to a reconstruction that depends on the activations and
            not on latents: what `base` is of ours.

    Raises:
        InputError: There are none.
    """
    if not len(x):
        raise InputError("there are no activations to compare on")
    flips = rounding = fired = 0
    latents = reconstruction = 0.0
    for some in x.split(ROWS):
        z, theirs = ours.encode(some), encode(some)
        both, differs = (z != 0) & (theirs != 0), (z != 0) != (theirs != 0)
        if bool(differs.any()):
            rows = differs.any(1)
            flips += int(differs.sum())
            rounding += int((differs[rows] & on_the_edge(ours, some[rows], z[rows])).sum())
        fired += int((z != 0).sum())
        latents = max(latents, _apart(z * both, theirs * both))
        same = ~differs.any(1)
        own, other = ours.decode(z) + base(ours, some), decode(theirs)
        other = other if theirs_base is None else other + theirs_base(some)
        reconstruction = max(reconstruction, _apart(own[same], other[same]))
    return Agreement(len(x), fired / len(x), flips, rounding, latents, reconstruction)


def base(head: SAEHead, x: Float[Tensor, "tok d_row"]) -> Float[Tensor, "*tok d_model"]:
    """What a head adds to a reconstruction that latents do not write: a transcoder's skip."""
    if not isinstance(head, SAE) or head.W_skip is None:
        return head.x_mean.new_zeros(head.d_model)
    return (head.base(x) - head.b_dec) / head.scale


def on_the_edge(
    head: SAEHead, x: Float[Tensor, "tok d_model"], z: Float[Tensor, "tok d_sae"]
) -> Bool[Tensor, "tok d_sae"]:
    """Latents whose firing turns when the activations are moved by a millionth."""
    generator = torch.Generator().manual_seed(0)
    by = NUDGE * x.abs().clamp_min(1 / float(head.scale))  # a coordinate of ordinary size at least
    found = torch.zeros_like(z, dtype=torch.bool)
    for _ in range(NUDGES):
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        for way in (1, -1):
            found |= (head.encode(x + way * by * signs) != 0) != (z != 0)
    return found


def _apart(one: Float[Tensor, "tok n"], other: Float[Tensor, "tok n"]) -> float:
    """The largest difference, over the largest number of its row or of the median row; NaN counts
    as infinite."""
    if not len(one):
        return 0.0
    largest = one.abs().amax(1)
    size = largest.maximum(largest.median()).clamp_min(1e-30)
    apart = ((one - other).abs().amax(1) / size).nan_to_num(nan=torch.inf)
    return float(apart.max())


@torch.no_grad()
def made_rows(
    head: SAEHead, n: int, seed: int = 0, extreme: bool = True
) -> Float[Tensor, "n d_model"]:
    """Activations for a head of which there is no text: about its mean, of the size it is used to.

    Args:
        head: Any.
        n: How many.
        seed: Of the draw.
        extreme: Whether a tenth of them are zeros, tiny or up to a thousand times as large.
    """
    generator = torch.Generator().manual_seed(seed)
    size = 1 / float(head.scale)  # a coordinate of a row of mean norm
    if head.transcoder:
        return _made_pairs(head, n, generator, extreme)
    mean = head.x_mean.cpu()
    if not mean.any() and isinstance(head, SAE):  # an imported one: b_dec is near the mean
        mean = head.b_dec.detach().cpu() * size
    rows = mean + size * torch.randn(n, head.d_model, generator=generator)
    return with_extremes(rows) if extreme else rows


def _made_pairs(
    head: SAEHead, n: int, generator: torch.Generator, extreme: bool
) -> Float[Tensor, "n d_row"]:
    """What a transcoder reads, and as what it writes its mean: nothing is compared with that."""
    assert isinstance(head, SAE)
    noise = torch.randn(n, head.d_model, generator=generator)
    read = (head.input_centre.cpu() + noise) / head.input_scale.cpu()
    read = with_extremes(read) if extreme else read
    return torch.cat([read, head.x_mean.cpu().expand(n, -1)], 1)


def with_extremes(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """The rows, a tenth of them zeros, tiny or up to a thousand times as large."""
    every = torch.arange(0, len(rows), 10)
    by = torch.tensor(SIZES).to(rows)[torch.arange(len(every)) % len(SIZES)]
    rows = rows.clone()
    rows[every] *= by.unsqueeze(1)
    return rows
