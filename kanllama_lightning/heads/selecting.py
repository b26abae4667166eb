"""Heads that keep some activations and drop the rest: what TopK and its kin share."""

from abc import abstractmethod
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.functional.sparse import Pattern, kept_products, sparse_decode
from kanllama_lightning.heads.dictionary import Branch, Dictionary, products
from kanllama_lightning.types import SAEOutput, SparseCodes


class Selecting(Dictionary):
    """z is the kept part of ReLU(p); a subclass says which part (`select`).

    After the selection nothing of shape [tok d_sae] is held: decoding and all gradients touch
    kept activations only. L = ||e||^2 / V + alpha_aux * AuxK, V the variance of the start sample
    (Gao et al. 2024, arXiv 2406.04093).

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token: the k of TopK.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    @abstractmethod
    def select(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Int[Tensor, " nnz"]:
        """Flat positions, ascending, of the activations to keep; all of them positive."""

    def reconstruct(self, pre_acts: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """The kept pre-activations times their directions."""
        pattern = Pattern(self.select(pre_acts), *pre_acts.shape)
        return self.decode_kept(pre_acts.reshape(-1).index_select(0, pattern.flat), pattern)

    def decode_kept(
        self, values: Float[Tensor, " nnz"], pattern: Pattern
    ) -> Float[Tensor, "tok d_model"]:
        """What kept latents add up to, without b_dec, in the head's units."""
        return sparse_decode(values, pattern, self.W_dec)

    def kept(self, x: Float[Tensor, "tok d_model"]) -> tuple[Float[Tensor, " nnz"], Pattern]:
        """The pre-activations that are kept, and where they are."""
        return self._kept(self.branches(x), self.bias())

    def _kept(
        self, branches: list[Branch], bias: Float[Tensor, " d_sae"]
    ) -> tuple[Float[Tensor, " nnz"], Pattern]:
        with torch.no_grad():
            pre = products(branches, bias)
            pattern = Pattern(self.select(pre), *pre.shape)
            values = pre.reshape(-1).index_select(0, pattern.flat)
            del pre
        return kept_products(values, pattern, bias, branches), pattern

    def activate(self, values: Float[Tensor, " nnz"], pattern: Pattern) -> Float[Tensor, " nnz"]:
        """Latents from kept (positive) pre-activations: themselves, unless a subclass differs."""
        return values

    def forward(self, x: Float[Tensor, "tok d_model"]) -> SAEOutput:
        """Reconstruction and codes of raw activations."""
        branches, bias = self.branches(x), self.bias()
        values, pattern = self._kept(branches, bias)
        with torch.autocast(x.device.type, enabled=False):
            values = self.activate(values, pattern)
            x_hat = (self.decode_kept(values, pattern) + self.b_dec) / self.scale
        codes = SparseCodes(values, pattern.rows, pattern.latents, len(x), self.d_sae)
        return SAEOutput(x_hat, codes, partial(products, branches, bias))
