"""How many latents fire per token."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from kanllama_lightning.measures import metrics
from kanllama_lightning.pages.plots import PALETTE, styled
from kanllama_lightning.reports.report import EvalRun, Figures, Report, Seen

MOST_BARS = 100
"""Bars of the histogram of L0; from there on several values share one."""


class SparsityReport(Report):
    """L0 per batch to `l0.csv`, its distribution over tokens to `l0.html`; dead and dense shares.

    L0 counts non-zero latents of a token, at inference (one threshold). Dead latents fired on none
    of the tokens, dense ones on more than a tenth.

    Args:
        tokens: Tokens looked at, at most, of each set (default: all).
    """

    name = "sparsity"
    files = ("l0.csv", "l0.html")

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens
        self._rows: list[dict[str, Any]] = []
        self._meters: dict[str, metrics.SparsityMetric] = {}

    def begin(self, run: EvalRun) -> None:
        """One meter per set."""
        device = run.lm.device
        self._meters = {s: metrics.SparsityMetric(run.head.d_sae).to(device) for s in run.sets}

    def observe(self, run: EvalRun, seen: Seen) -> None:
        """Count a batch."""
        batch = seen.batch
        self._meters[batch.set_name].update(batch.out.codes)
        own = {"n_tokens": len(batch.x), "l0": batch.l0()}
        self._rows.append({"set": batch.set_name, "batch": seen.number} | own)

    def finish(self, run: EvalRun) -> Figures:
        """Table, histogram, figures."""
        run.write_table("l0.csv", self._rows)
        figures = {
            f"{name}/{key}": value
            for name, meter in self._meters.items()
            for key, value in meter.compute().items()
        }
        n = ", ".join(f"{figures[f'{s}/sparsity_tokens']:,.0f} of {s}" for s in self._meters)
        run.write_page(
            "l0.html",
            "Latents per token",
            f"Number of non-zero latents of each token (L0), over {n}; at inference.",
            [_histogram(self._meters, figures)],
        )
        return figures


def _histogram(meters: dict[str, metrics.SparsityMetric], figures: dict[str, float]) -> go.Figure:
    figure = go.Figure()
    counts = {name: meter.l0_counts.cpu().numpy() for name, meter in meters.items()}
    last = max(int(c.nonzero()[0].max(initial=0)) for c in counts.values()) + 1
    width = -(-last // MOST_BARS)
    for i, (name, count) in enumerate(counts.items()):
        padded = np.zeros(-(-last // width) * width)
        padded[:last] = count[:last]
        share = padded.reshape(-1, width).sum(1) / max(1, count.sum())
        figure.add_bar(
            x=np.arange(len(share)) * width + (width - 1) / 2,
            y=share,
            name=f"{name}: mean {figures[f'{name}/l0']:.2f}",
            marker={"color": PALETTE[i], "pattern": {"shape": ["", "/", ".", "x"][i % 4]}},
            hovertemplate="L0 %{x}: %{y:.2%} of tokens<extra></extra>",
        )
    if len(counts) == 1:
        name = next(iter(counts))
        figure.add_vline(
            x=figures[f"{name}/l0"], line_dash="dash", annotation_text="mean", line_color="#444"
        )
    figure.update_layout(showlegend=True)
    figure.update_yaxes(tickformat=".0%")
    return styled(
        figure, "Latents that fire on a token", "L0 (latents per token)", "share of tokens"
    )
