"""What becomes of the next token when one latent is set to zero where it fires."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.dashboard.contents import Ablation
from kanllama_lightning.functional.losses import kl_divergence
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.token_text import token_text

LISTED = 5
"""Tokens named at either end."""


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
    ordered = sorted(places, key=lambda place: len(place.ids))
    for first in range(0, len(ordered), batch_seqs):
        some = ordered[first : first + batch_seqs]
        changes, kl = _changes(head, lm, some)
        for place, change, far in zip(some, changes, kl.tolist(), strict=True):
            totals.setdefault(place.latent, _Total()).add(change, far, place.follows)
    return {latent: total.mean(lm) for latent, total in totals.items()}


def _changes(
    head: SAEHead, lm: FrozenLM, places: Sequence[AblatedPlace]
) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, " n"]]:
    """Change of every log-probability at the last token of each row, and its KL; fp64."""
    lengths = torch.tensor([len(p.ids) for p in places])
    ids = torch.zeros(len(places), int(lengths.max()), dtype=torch.int64)
    for row, place in zip(ids, places, strict=True):
        row[: len(place.ids)] = place.ids  # what is behind it, a causal LM does not see
    device = lm.device
    line, last = torch.arange(len(places), device=device), (lengths - 1).to(device)
    prefix = lm.prefix(ids.to(device))
    x = prefix.acts[line, last].float()
    codes = head.encode(x)
    without = codes.clone()
    without[line, torch.tensor([p.latent for p in places], device=device)] = 0
    acts = prefix.acts.clone()
    acts[line, last] = (x + head.decode(without) - head.decode(codes)).to(acts.dtype)
    was, now = (
        lm.logits(lm.resume(prefix, a)[line, last]).double().log_softmax(-1)
        for a in (prefix.acts, acts)
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
