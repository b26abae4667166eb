"""Matryoshka BatchTopK: the first latents must do without the later ones."""

from typing import Any

from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.encoders import LinearEncoder
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Nested
from kanllama_lightning.types import InputError

FRACTIONS = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
"""Where the groups end, as shares of the dictionary; the last one is the whole of it."""


class Matryoshka(SAE):
    """BatchTopK whose nested prefixes of latents each reconstruct x.

    L = 1/G sum_g ||x - b_dec - z[:m_g] W_dec[:m_g]||^2 / V + alpha_aux * AuxK (of the last
    residual), V the variance of the start sample.
    Bussmann et al. 2025 (arXiv 2503.17547). One code, selected over the whole dictionary; coarse
    features gather in the inner groups. A lower explained variance than BatchTopK is its price.

    Args:
        groups: Sizes of the nested prefixes, rising, the last one d_sae (default: 1/32, 3/32,
            7/32, 15/32 and all of the dictionary).
    """

    def __init__(self, groups: list[int] | None = None, **shared: Any) -> None:
        super().__init__(**shared)
        self.groups, d_sae = groups, self.d_sae
        ends = groups or sorted({max(1, round(f * d_sae)) for f in FRACTIONS} | {d_sae})
        if ends[-1] != d_sae or any(b <= a for a, b in zip([0, *ends], ends, strict=False)):
            raise InputError(
                f"head.groups={groups}: must rise from at least 1 to d_sae={d_sae}, such as "
                f"{[d_sae // 4, d_sae // 2, d_sae]}"
            )
        W = self.drawn()
        self.compose(LinearEncoder(W), Nested(self.target_l0, ends), UnitDirections(W))
