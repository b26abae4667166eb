"""What becomes of the next token when one latent is set to zero where it fires."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.console.phase import Phase
from kanllama_lightning.dashboard.contents import Ablation
from kanllama_lightning.functional.losses import kl_divergence
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.token_text import token_text
from kanllama_lightning.types import Prefix

LISTED = 5
"""Tokens named at either end."""
AT_ONCE = 64
"""Places whose logits exist at once."""


class AblatedPlace(NamedTuple):
    """A token on which a latent fires."""

    latent: int
    ids: Int[Tensor, " pos"]
    """The row up to it, BOS first."""
    follows: int | None
    """The id that follows in the text; None where the text ends."""


@torch.no_grad()
def ablate(
    head: SAEHead, lm: FrozenLM, places: Sequence[AblatedPlace], batch_seqs: int = 16
) -> dict[int, Ablation]:
    """The effect of each latent on the prediction at its places.

    There, and nowhere else, the activation x becomes x + f(z with z_j = 0) - f(z): the error of
    the reconstruction stays in place.

    Args:
        head: In evaluation mode, on the LM's device.
        lm: Loaded.
        places: Several per latent, in any order.
        batch_seqs: Rows the LM runs at once.
    """
    totals: dict[int, _Total] = {}
    rows = _rows(places)
    with Phase("ablating latents", len(places), "places") as progress:
        for first in range(0, len(rows), batch_seqs):
            some = rows[first : first + batch_seqs]
            prefix = lm.prefix(_ids(some).to(lm.device))
            flat = [(row, place) for row, mine in enumerate(some) for place in mine]
            for part in range(0, len(flat), AT_ONCE):
                those = flat[part : part + AT_ONCE]
                changes, kl = _changes(head, lm, prefix, those)
                for (_, place), change, far in zip(those, changes, kl.tolist(), strict=True):
                    totals.setdefault(place.latent, _Total()).add(change, far, place.follows)
                progress.add(len(those))
    return {latent: total.mean(lm) for latent, total in totals.items()}


def _rows(places: Sequence[AblatedPlace]) -> list[list[AblatedPlace]]:
    """Places of the same row of text together, the longest last; short rows first."""
    rows: list[list[AblatedPlace]] = []
    for place in sorted(places, key=lambda place: (place.ids.tolist(), place.latent)):
        before = rows[-1][-1].ids if rows else place.ids[:0]
        if len(before) and place.ids[: len(before)].equal(before):
            rows[-1].append(place)
        else:
            rows.append([place])
    return sorted(rows, key=lambda row: len(row[-1].ids))


def _ids(rows: Sequence[list[AblatedPlace]]) -> Int[Tensor, "row pos"]:
    """Each row up to its last place; what is behind that, a causal LM does not see."""
    ids = torch.zeros(len(rows), max(len(row[-1].ids) for row in rows), dtype=torch.int64)
    for filled, row in zip(ids, rows, strict=True):
        filled[: len(row[-1].ids)] = row[-1].ids
    return ids


def _changes(
    head: SAEHead, lm: FrozenLM, prefix: Prefix, places: Sequence[tuple[int, AblatedPlace]]
) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, " n"]]:
    """Change of every log-probability at each place, and its KL; fp64."""
    device = lm.device
    row = torch.tensor([row for row, _ in places], device=device)
    pos = torch.tensor([len(place.ids) - 1 for _, place in places], device=device)
    latent = torch.tensor([place.latent for _, place in places], device=device)
    codes = head.encode(prefix.rows[row, pos].float())
    without = codes.clone()
    without[torch.arange(len(places), device=device), latent] = 0
    acts = prefix.acts[row, pos].float() + head.decode(without) - head.decode(codes)
    was, now = (
        lm.logits(hidden).double().log_softmax(-1)
        for hidden in lm.resume_at(prefix, row, pos, acts)
    )
    return now - was, kl_divergence(was, now)


class _Total:
    """Sums over the places of a latent."""

    def __init__(self) -> None:
        self.change: Tensor | None = None
        self.n, self.kl, self.n_follow, self.ce = 0, 0.0, 0, 0.0

    def add(self, change: Float[Tensor, " vocab"], kl: float, follows: int | None) -> None:
        """A place."""
        self.change = change.clone() if self.change is None else self.change + change
        self.n, self.kl = self.n + 1, self.kl + kl
        if follows is not None:
            self.n_follow, self.ce = self.n_follow + 1, self.ce - float(change[follows])

    def mean(self, lm: FrozenLM) -> Ablation:
        """Over all places."""
        assert self.change is not None
        change = self.change / self.n
        listed = min(LISTED, len(change))

        def named(largest: bool) -> list[tuple[str, float]]:
            best = change.topk(listed, largest=largest)
            return [
                (token_text(lm.tokenizer, i), v)
                for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]

        ce = self.ce / self.n_follow if self.n_follow else 0.0
        return Ablation(self.n, self.kl / self.n, ce, named(True), named(False))
