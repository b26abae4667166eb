"""How much of the activations comes back, and where the error sits."""

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.measures import metrics
from kanllama_lightning.pages.plots import PALETTE, SYMBOLS, styled
from kanllama_lightning.reports.report import EvalRun, Figures, Report, Seen

BINS = 24
"""Bands of token frequency: the first holds the commonest tokens, then those half as common."""


class Groups:
    """Squared errors of groups of tokens against their distance from the mean of all; fp64.

    Args:
        n: Number of groups.
        d_model: Width of the activations.
        device: Where the sums are.
    """

    def __init__(self, n: int, d_model: int, device: torch.device) -> None:
        self.n, self.e2, self.x2 = (
            torch.zeros(n, dtype=torch.float64, device=device) for _ in range(3)
        )
        self.x = torch.zeros(n, d_model, dtype=torch.float64, device=device)

    def update(
        self,
        group: Int[Tensor, " tok"],
        x: Float[Tensor, "tok d_model"],
        x_hat: Float[Tensor, "tok d_model"],
    ) -> None:
        """Add a batch, in the LM's units."""
        x, x_hat = x.double(), x_hat.double()
        self.n.index_add_(0, group, torch.ones_like(group, dtype=torch.float64))
        self.e2.index_add_(0, group, (x - x_hat).square().sum(1))
        self.x2.index_add_(0, group, x.square().sum(1))
        self.x.index_add_(0, group, x)

    def fvu(self) -> Float[Tensor, " groups"]:
        """Squared error over squared distance from the mean of all tokens; NaN if empty."""
        mean = self.x.sum(0) / self.n.sum().clamp_min(1)
        spread = self.x2 - 2 * self.x @ mean + self.n * mean.square().sum()
        return torch.where(self.n > 0, self.e2 / spread, torch.nan)


class ReconstructionReport(Report):
    """FVU, EV, cosine, norm ratio and bias; by position and by token frequency.

    FVU is about the mean of all tokens of the set. `reconstruction.csv` has a row per set and
    group: FVU of the tokens at a position of the context, and of the tokens of a band of
    frequency in the main set, with the share of tokens and of all error that each makes up.

    Args:
        tokens: Tokens looked at, at most, of each set (default: all).
    """

    name = "reconstruction"
    files = ("reconstruction.csv", "reconstruction.html")

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens
        self._meters: dict[str, metrics.ReconstructionMetric] = {}
        self._groups: dict[tuple[str, str], Groups] = {}
        self._band = torch.zeros(0, dtype=torch.int64)

    def begin(self, run: EvalRun) -> None:
        """One meter per set, and the band of every token id."""
        width, device = run.head.d_model, run.lm.device
        self._meters = {s: metrics.ReconstructionMetric(width).to(device) for s in run.sets}
        assert run.counts is not None, "an EvalRun of reports that look at text counts its tokens"
        self._band = bands(run.counts).to(device)

    def observe(self, run: EvalRun, seen: Seen) -> None:
        """Add a batch."""
        batch = seen.batch
        self._meters[batch.set_name].update(batch.x, batch.out.x_hat)
        position = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        groups = {
            "position": position.expand_as(batch.mask)[batch.mask],
            "frequency": self._band[batch.tokens.ids[batch.mask]],
        }
        sizes = {"position": batch.mask.shape[1], "frequency": BINS}
        for kind, group in groups.items():
            key = (batch.set_name, kind)
            if key not in self._groups:
                self._groups[key] = Groups(sizes[kind], run.head.d_model, batch.x.device)
            self._groups[key].update(group, batch.x, batch.out.x_hat)

    def finish(self, run: EvalRun) -> Figures:
        """Table, two plots, figures."""
        rows = []
        for (name, kind), groups in self._groups.items():
            fvu, total = groups.fvu(), groups.e2.sum().clamp_min(1e-300)
            for i in groups.n.nonzero().squeeze(1).tolist():
                rows.append(
                    {
                        "set": name,
                        "by": kind,
                        "group": i,
                        "n_tokens": int(groups.n[i]),
                        "fvu": float(fvu[i]),
                        "share_of_error": float(groups.e2[i] / total),
                    }
                )
        run.write_table("reconstruction.csv", rows)
        figures = {
            f"{name}/{key}": value
            for name, meter in self._meters.items()
            for key, value in meter.compute().items()
        }
        figures |= {f"{s}/n_tokens": int(m.n) for s, m in self._meters.items()}
        n = ", ".join(f"{figures[f'{s}/n_tokens']:,} tokens of {s}" for s in self._meters)
        fvus = ", ".join(f"{figures[f'{s}/fvu']:.4f} on {s}" for s in self._meters)
        run.write_page(
            "reconstruction.html",
            "Reconstruction",
            f"FVU is {fvus}, over {n}: squared error over squared distance from the mean of all "
            "tokens of the set.",
            [self._by_position(), self._by_frequency(run)],
        )
        return figures

    def _by_position(self) -> go.Figure:
        figure = go.Figure()
        for i, (name, groups) in enumerate(self._of("position").items()):
            fvu = groups.fvu().cpu().numpy()
            figure.add_scatter(
                x=np.arange(len(fvu)),
                y=fvu,
                mode="lines",
                name=name,
                line={"color": PALETTE[i], "dash": ["solid", "dash", "dot"][i % 3]},
                hovertemplate="position %{x}: FVU %{y:.4f}<extra></extra>",
            )
        figure.update_layout(showlegend=True)
        figure.update_yaxes(rangemode="tozero")
        return styled(figure, "By position", "position in the context (tokens; BOS is 0)", "FVU")

    def _by_frequency(self, run: EvalRun) -> go.Figure:
        assert run.counts is not None
        top = float(run.counts.max()) / max(1.0, float(run.counts.sum()))
        figure = go.Figure()
        for i, (name, groups) in enumerate(self._of("frequency").items()):
            fvu, n = groups.fvu().cpu().numpy(), groups.n.cpu().numpy()
            there = n > 0
            figure.add_scatter(
                x=top * 2.0 ** -(np.arange(BINS)[there] + 0.5),
                y=fvu[there],
                mode="lines+markers",
                name=name,
                line={"color": PALETTE[i], "dash": ["solid", "dash", "dot"][i % 3]},
                marker={"symbol": SYMBOLS[i], "size": 8},
                customdata=n[there] / n.sum(),
                hovertemplate="frequency about %{x:.2g}: FVU %{y:.4f}<br>"
                "%{customdata:.1%} of tokens<extra></extra>",
            )
        figure.update_layout(showlegend=True)
        figure.update_xaxes(type="log", exponentformat="power")
        figure.update_yaxes(rangemode="tozero")
        return styled(
            figure, "By token frequency", f"frequency of the token in {run.sets[0]}", "FVU"
        )

    def _of(self, kind: str) -> dict[str, Groups]:
        return {name: g for (name, k), g in self._groups.items() if k == kind}


def bands(counts: Int[Tensor, " vocab"]) -> Int[Tensor, " vocab"]:
    """Band of every token id: 0 for the commonest and those more than half as common, and so on.

    The last band takes what is rarer still, and what the counts do not hold.
    """
    top = counts.max().clamp_min(1).double()
    halvings = torch.log2(top / counts.double().clamp_min(1e-300)).floor()
    return halvings.clamp(0, BINS - 1).long()
