"""Matryoshka BatchTopK: the first latents must do without the later ones."""

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.functional.sparse import Pattern, sparse_decode
from kanllama_lightning.heads.thresholded import Thresholded
from kanllama_lightning.types import InputError, SAEOutput, SparseCodes, StepContext

FRACTIONS = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
"""Where the groups end, as shares of the dictionary; the last one is the whole of it."""


class Matryoshka(Thresholded):
    """BatchTopK whose nested prefixes of latents each reconstruct x.

    L = 1/G sum_g ||x - b_dec - z[:m_g] W_dec[:m_g]||^2 / V + alpha_aux * AuxK (of the last
    residual), V the variance of the start sample.
    Bussmann et al. 2025 (arXiv 2503.17547). One code, selected over the whole dictionary; coarse
    features gather in the inner groups. A lower explained variance than BatchTopK is its price.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        target_l0: Kept latents per token on average.
        groups: Sizes of the nested prefixes, rising, the last one d_sae; left out, 1/32, 3/32,
            7/32, 15/32 and all of the dictionary.
        alpha_aux: Weight of AuxK, which revives dead latents; 0 leaves it out.
        seed: Seed of the initial weights (linked to `seed_everything`).
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        target_l0: int,
        groups: list[int] | None = None,
        alpha_aux: float = 1 / 32,
        seed: int = 0,
    ) -> None:
        super().__init__(d_model, d_sae, target_l0, alpha_aux, seed)
        self.groups = groups
        ends = groups or sorted({max(1, round(f * d_sae)) for f in FRACTIONS} | {d_sae})
        if ends[-1] != d_sae or any(b <= a for a, b in zip([0, *ends], ends, strict=False)):
            raise InputError(
                f"head.groups={groups}: must rise from at least 1 to d_sae={d_sae}, such as "
                f"{[d_sae // 4, d_sae // 2, d_sae]}"
            )
        self.ends = ends

    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """`reconstruction` of the whole, `nested` of the inner groups, each over G; `auxk`."""
        terms = super().losses(x, out, ctx)
        share = 1 / len(self.ends)
        terms["reconstruction"] = share * terms["reconstruction"]
        if len(self.ends) > 1:
            terms["nested"] = share * self._nested(x, out)
        return terms

    def _nested(self, x: Float[Tensor, "tok d_model"], out: SAEOutput) -> Float[Tensor, ""]:
        assert isinstance(out.codes, SparseCodes)
        codes = out.codes
        missing = x.float() * self.scale - self.b_dec
        total = missing.new_zeros(())
        with torch.autocast(x.device.type, enabled=False):
            for start, end in zip([0, *self.ends], self.ends[:-1], strict=False):
                inside = ((codes.latents >= start) & (codes.latents < end)).nonzero().squeeze(1)
                flat = codes.rows[inside] * self.d_sae + codes.latents[inside]
                pattern = Pattern(flat, codes.n_rows, self.d_sae)
                part = sparse_decode(codes.values[inside], pattern, self.W_dec)
                missing = missing - part
                total = total + self.unexplained(missing, torch.zeros_like(missing))
        return total
