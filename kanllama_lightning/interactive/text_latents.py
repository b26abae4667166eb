"""What a head makes of a text: tokens, and the latents that fire on them."""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.lm.token_text import quoted
from kanllama_lightning.prompts.try_text import label, strongest
from kanllama_lightning.types import InputError


class TextLatents:
    """A text under a head; BOS, other special tokens and attention sinks are left out.

    Args:
        text: What was read.
        tokens: Its tokens that count, as text; part of a character goes by its bytes, `<0xF0>`.
        positions: Where each of them is in what the LM read: 0 is BOS.
        codes: The latents on them, a row per token.
        labels: What is known about latents.
    """

    def __init__(
        self,
        text: str,
        tokens: list[str],
        positions: list[int],
        codes: SparseCodes,
        labels: dict[int, str],
    ) -> None:
        self.text, self.tokens, self.positions = text, tokens, positions
        self._codes, self._labels = codes, labels

    @property
    def latents(self) -> Float[Tensor, "tok d_sae"]:
        """Activations as a sparse tensor (COO), a row per token; head's units, without a graph."""
        c = self._codes
        fired = c.values != 0
        at = torch.stack([c.rows, c.latents])[:, fired]
        made = torch.sparse_coo_tensor(
            at, c.values[fired], (c.n_rows, c.d_sae), check_invariants=True
        )
        return made.coalesce()

    def top(self, n: int = 5) -> pd.DataFrame:
        """The latents that fire most on each token, the strongest first.

        Args:
            n: Latents of a token, at most.

        Returns:
            A row per firing: position, token, latent, activation (head's units), label ("" where
            nothing is known).

        Raises:
            InputError: `n` is no whole number from 1 up.
        """
        if not (type(n) is int and n >= 1):
            raise InputError(f"n={n!r}: whole numbers from 1 up")
        rows = [
            (position, token, latent, value, self._labels.get(latent, ""))
            for row, (position, token) in enumerate(zip(self.positions, self.tokens, strict=True))
            for latent, value in strongest(self._codes, row, n)
        ]
        return pd.DataFrame(rows, columns=["position", "token", "latent", "activation", "label"])

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        lines = [f"{quoted(self.text)}: {len(self)} tokens, {self.latents.shape[1]} latents"]
        for row, token in enumerate(self.tokens):
            fires = [
                f"{latent}{label(latent, self._labels)} {value:.2f}"
                for latent, value in strongest(self._codes, row, 3)
            ]
            lines.append(f"  {quoted(token):<14} {', '.join(fires)}")
        return "\n".join(lines)
