"""A histogram of each latent's activations in equally wide bins, whose range need not be known."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.functional.sparse import SparseCodes


class LinearBins:
    """Counts the activations of every latent in bins from 0 on, as wide as they have to be.

    The width of a latent's bins is a power of two; when an activation lies beyond the last bin,
    bins are put together in pairs. So the largest activation lies in the upper half of the bins.
    Lives on the CPU.

    Args:
        d_sae: Number of latents.
    """

    BINS = 64

    def __init__(self, d_sae: int) -> None:
        self.counts: Int[Tensor, "d_sae bins"] = torch.zeros(d_sae, self.BINS, dtype=torch.int64)
        self._exponent = torch.full((d_sae,), -1000, dtype=torch.int64)

    def update(self, codes: SparseCodes) -> None:
        """Add a batch's codes, on the CPU; none of them below 0."""
        fires = codes.values > 0
        values, latents = codes.values[fires].double(), codes.latents[fires]
        largest = torch.zeros(len(self.counts), dtype=torch.float64)
        largest.scatter_reduce_(0, latents, values, "amax")
        # largest < 2^e: so wide that this is the end of the last bin
        wanted = largest.frexp().exponent.long() - int(math.log2(self.BINS))
        wanted = torch.where(largest > 0, wanted.maximum(self._exponent), self._exponent)
        self._widen(wanted - self._exponent)
        self._exponent = wanted
        bins = torch.ldexp(values, -wanted[latents].double()).floor().long()
        self.counts.view(-1).index_add_(0, latents * self.BINS + bins, torch.ones_like(bins))

    def _widen(self, doublings: Int[Tensor, " d_sae"]) -> None:
        some = doublings.nonzero().squeeze(1)
        # so many doublings put all into the first bin, and more make no difference
        shift = doublings[some].clamp_max(int(math.log2(self.BINS))).unsqueeze(1)
        at = torch.arange(self.BINS) >> shift
        old = self.counts[some]
        self.counts[some] = torch.zeros_like(old).scatter_add_(1, at, old)

    def width(self, latent: int) -> float:
        """How wide the bins of a latent are, in the unit of its activations; of one that fired."""
        return math.ldexp(1.0, int(self._exponent[latent]))

    def bars(self, latent: int) -> tuple[Float[Tensor, " bars"], Int[Tensor, " bars"]]:
        """Middles of a latent's bins and what is in them, up to its largest activation.

        33 to 64 of them; none for a latent that never fired.
        """
        used = self.counts[latent].nonzero().squeeze(1)
        n = int(used[-1]) + 1 if len(used) else 0
        middles = (torch.arange(n, dtype=torch.float64) + 0.5) * (self.width(latent) if n else 1)
        return middles, self.counts[latent, :n]
