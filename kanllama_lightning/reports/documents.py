"""Sums by document: what intervals and paired comparisons are made of."""

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.measures.metrics import ABLATIONS
from kanllama_lightning.reports.report import Seen

RUNS = ("clean", "recon", "zero", "mean")
LOSSES = (*(f"ce_{run}" for run in RUNS), *(f"kl_{run}" for run in RUNS[1:]))
ABLATED = ("n_ablated", "ce_clean_ablated")
"""Of a document's positions those that the ablations were run on, and the untouched loss there."""
SUMS = ("n_tokens", "n_targets", "l0", "e2", *LOSSES, *ABLATED)


class Documents:
    """Summed errors and losses of every document of a set; fp64.

    Args:
        d_model: Width of the activations.
    """

    def __init__(self, d_model: int) -> None:
        self._numbers: dict[int, int] = {}
        self._sums = torch.zeros(0, len(SUMS), dtype=torch.float64)
        # of the activations: their sum, and that of their squares, for the distance from the mean
        self._x = torch.zeros(0, d_model, dtype=torch.float64)
        self._x2 = torch.zeros(0, dtype=torch.float64)

    def update(self, seen: Seen) -> None:
        """Add a batch."""
        batch, losses = seen.batch, seen.losses
        assert losses is not None, "the pass was made without losses"
        x, x_hat = batch.x.double(), batch.out.x_hat.double()
        own = self._places(batch.tokens.doc[batch.mask])
        columns = {
            "n_tokens": torch.ones(len(x), dtype=torch.float64),
            "l0": batch.out.codes.l0().double(),
            "e2": (x - x_hat).square().sum(1),
        }
        for name, value in columns.items():
            self._add(name, own, value)
        self._x.index_add_(0, own, x.cpu())
        self._x2.index_add_(0, own, x.square().sum(1).cpu())
        own = self._places(batch.tokens.doc[losses.where])
        ones = torch.ones(len(own), dtype=torch.float64)
        self._add("n_targets", own, ones)
        if any(name in losses.ce for name in ABLATIONS):
            self._add("n_ablated", own, ones)
            self._add("ce_clean_ablated", own, losses.ce["clean"].double())
        for prefix, values in (("ce", losses.ce), ("kl", losses.kl)):
            for name, value in values.items():
                self._add(f"{prefix}_{name}", own, value.double())

    def table(self) -> pd.DataFrame:
        """One row per document; `x2` is the summed squared distance from the mean of all."""
        table = pd.DataFrame(self._sums.numpy(), columns=list(SUMS))
        n = self._sums[:, SUMS.index("n_tokens")]
        mean = self._x.sum(0) / n.sum().clamp_min(1)
        x2 = self._x2 - 2 * self._x @ mean + n * mean.square().sum()
        table.insert(0, "document", list(self._numbers))
        table.insert(5, "x2", x2.clamp_min(0).numpy())
        for name in ("n_tokens", "n_targets", "l0", "n_ablated"):
            table[name] = table[name].astype("int64")
        return table

    def _places(self, doc: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Row of each document, new ones appended in order."""
        numbers, inverse = doc.cpu().unique(return_inverse=True)
        places = []
        for number in numbers.tolist():
            places.append(self._numbers.setdefault(number, len(self._numbers)))
        new = len(self._numbers) - len(self._sums)
        if new:
            self._sums = torch.cat([self._sums, self._sums.new_zeros(new, len(SUMS))])
            self._x = torch.cat([self._x, self._x.new_zeros(new, self._x.shape[1])])
            self._x2 = torch.cat([self._x2, self._x2.new_zeros(new)])
        return torch.tensor(places, dtype=torch.int64)[inverse]

    def _add(self, name: str, places: Int[Tensor, " n"], value: Float[Tensor, " n"]) -> None:
        self._sums[:, SUMS.index(name)].index_add_(0, places, value.cpu())
