"""What the LM loses when it has to make do with the reconstruction."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from kanllama_lightning.functional.bootstrap import interval
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.splice import put, spliced_losses
from kanllama_lightning.measures import cells, metrics
from kanllama_lightning.measures.metrics import (
    ABLATIONS,
    NOT_MEANINGFUL,
    NOT_MEANINGFUL_WHY,
)
from kanllama_lightning.pages.plots import PALETTE, styled
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.reports.documents import ABLATED, LOSSES, RUNS, Documents
from kanllama_lightning.reports.report import EvalRun, Figures, Report, Seen, ablated_every

SCORES = ("delta_ce", "delta_ce_share", "ce_score", "ce_uniform")
"""Columns of `losses.csv` behind the losses."""
CHECKED_LOGITS = 1 << 24
"""Logits that the check of the error term compares."""
LABELS = {
    "clean": "original",
    "recon": "reconstruction",
    "mean": "mean ablation",
    "zero": "zero ablation",
}
PATTERNS = ("", "/", ".", "x")


class LossesReport(Report):
    """Original, reconstruction, zero- and mean-ablation loss on the same tokens.

    `losses.csv` has a row per batch and set, with a last row `all` that is pooled over the set;
    `documents.csv` the sums of every document, from which the intervals (bootstrap over documents)
    are made, here and in `compare`. All in nats per token. Positions that are BOS, EOS, PAD or
    sinks keep their own activation in every run. Of a large set the ablations, which only set the
    scale, are run on every n-th batch: `n_ablated` counts their positions.

    On the first batch of each set the error term is checked: reconstruction and error together
    must give the original's logits (`error_term_max_diff`); `ce_error_only` is the loss with the
    error alone, `ce_everywhere` that with the reconstruction at BOS and sinks as well.

    Args:
        tokens: Tokens looked at, at most, of each set (default: all).
        resamples: Bootstrap resamples of the documents.
    """

    name = "losses"
    files = ("losses.csv", "documents.csv", "losses.html")
    splices = True

    def __init__(self, tokens: int | None = None, resamples: int = 2000) -> None:
        self.tokens, self.resamples = tokens, resamples
        self._rows: list[dict[str, Any]] = []
        self._meters: dict[str, metrics.SplicedLossMetric] = {}
        self._documents: dict[str, Documents] = {}
        self._checks: dict[str, float] = {}

    def work(self, lm: FrozenLM, heads: Sequence[SAEHead], tokens: int, ctx_len: int) -> Work:
        """A run and one of each head, on from the hook point, of every token; ablations of some."""
        own = min(tokens, self.tokens or tokens)
        seen = (1 + len(ABLATIONS) / ablated_every(own) + len(heads)) * own
        return Work(on=seen, logits=seen)

    def begin(self, run: EvalRun) -> None:
        """One meter per set."""
        self._meters = {
            s: metrics.SplicedLossMetric(run.lm.vocab_size).to(run.lm.device) for s in run.sets
        }
        self._documents = {s: Documents(run.head.d_model) for s in run.sets}

    def observe(self, run: EvalRun, seen: Seen) -> None:
        """Add a batch."""
        losses, name = seen.losses, seen.batch.set_name
        assert losses is not None, "the pass was made without losses"
        doc = seen.batch.tokens.doc[losses.where]
        self._meters[name].update(losses.ce, losses.kl, doc)
        self._documents[name].update(seen)
        means = metrics.mean_losses(losses.ce, losses.kl)
        values = metrics.score(means, len(doc)) | {"ce_uniform": math.log(run.lm.vocab_size)}
        self._rows.append(_row(name, seen.number, values))
        if seen.number == 0:
            self._checks |= {f"{name}/{k}": v for k, v in check(run, seen).items()}

    def finish(self, run: EvalRun) -> Figures:
        """Tables, bars, figures."""
        figures: dict[str, float] = {}
        rows, tables = [], []
        for name, meter in self._meters.items():
            values = meter.compute()
            figures |= {f"{name}/{key}": value for key, value in values.items()}
            table = self._documents[name].table()
            figures |= {f"{name}/{k}": v for k, v in self._intervals(table).items()}
            figures[f"{name}/documents"] = len(table)
            figures[f"{name}/ablated_tokens"] = float(table["n_ablated"].sum())
            e2, x2 = float(table["e2"].sum()), float(table["x2"].sum())
            figures[f"{name}/fvu"] = e2 / x2 if x2 > 0 else math.nan
            table.insert(0, "set", name)
            tables.append(table)
            rows += [row for row in self._rows if row["set"] == name]
            rows.append(_row(name, "all", values))
        run.write_table("losses.csv", rows)
        run.write_table("documents.csv", pd.concat(tables))
        size = ", ".join(f"{figures[f'{s}/ce_tokens']:,.0f} tokens of {s}" for s in self._meters)
        some = ", ".join(f"{figures[f'{s}/ablated_tokens']:,.0f} of {s}" for s in self._meters)
        run.write_page(
            "losses.html",
            "Next-token loss",
            f"The same {size}, with the activations untouched and reconstructed; ablated on "
            f"{some}. "
            "Whiskers: 95 % interval of the difference from the original, bootstrap over "
            "documents. " + " ".join(self._said(name, figures) for name in self._meters),
            [_bars(run.sets, figures), _by_batch(self._rows)],
        )
        return figures | self._checks

    @staticmethod
    def _said(name: str, figures: dict[str, float]) -> str:
        """What the reconstruction costs on a set, in a sentence."""
        own = {k.removeprefix(f"{name}/"): v for k, v in figures.items() if k.startswith(name)}
        share = cells.share(own)
        why = f" ({NOT_MEANINGFUL_WHY})" if share == NOT_MEANINGFUL else ""
        return (
            f"On {name} the reconstruction costs {cells.delta_ce(own)} nats per token; as a share "
            f"of what mean ablation costs: {share}{why}. A uniform guess: {own['ce_uniform']:.3f}."
        )

    def _intervals(self, table: pd.DataFrame) -> dict[str, float]:
        """95 % intervals of what is reported most, over documents."""
        targets = torch.tensor(table["n_targets"].to_numpy(), dtype=torch.float64)
        clean = torch.tensor(table["ce_clean"].to_numpy())
        found: dict[str, float] = {}
        ablated, there = (torch.tensor(table[k].to_numpy()).double() for k in ABLATED)
        for run in RUNS[1:]:
            loss = torch.tensor(table[f"ce_{run}"].to_numpy())
            if run in ABLATIONS:
                some = ablated > 0
                low, high = interval((loss - there)[some], ablated[some], self.resamples)
            else:
                low, high = interval(loss - clean, targets, self.resamples)
            found |= {f"delta_{run}_low": low, f"delta_{run}_high": high}
        found = {k.replace("delta_recon", "delta_ce"): v for k, v in found.items()}
        kl = torch.tensor(table["kl_recon"].to_numpy())
        found["kl_recon_low"], found["kl_recon_high"] = interval(kl, targets, self.resamples)
        return found


def check(run: EvalRun, seen: Seen) -> dict[str, float]:
    """Where the loss sits, on one batch: error and reconstruction together, and each alone."""
    batch, lm = seen.batch, run.lm
    acts, x_hat = batch.prefix.acts, batch.out.x_hat
    both = put(acts, batch.mask, x_hat + (batch.x - x_hat))
    everywhere = torch.ones_like(batch.mask)
    rows = batch.prefix.rows[everywhere].float()
    runs = {
        "error_only": put(acts, batch.mask, batch.x - x_hat),
        "everywhere": put(acts, everywhere, run.head(rows).x_hat),
    }
    losses = spliced_losses(lm, batch.prefix, batch.tokens, runs)
    n = max(1, CHECKED_LOGITS // lm.vocab_size)

    def logits(acts: Tensor) -> Tensor:
        return lm.logits(lm.resume(batch.prefix, acts).flatten(0, 1)[:n])

    gap = (logits(both) - logits(acts)).abs().max()
    means = {f"ce_{name}": float(value.double().mean()) for name, value in losses.ce.items()}
    return {"error_term_max_diff": float(gap), "ce_first_batch": means.pop("ce_clean")} | means


def _row(name: str, batch: int | str, values: dict[str, float]) -> dict[str, Any]:
    own = {key: values.get(key, float("nan")) for key in (*LOSSES, *SCORES)}
    return {"set": name, "batch": batch, "n_targets": int(values.get("ce_tokens", 0))} | own


def _bars(sets: list[str], figures: dict[str, float]) -> go.Figure:
    """Loss of the four runs, per set."""
    figure = go.Figure()
    for i, (run, label) in enumerate(LABELS.items()):
        values = [figures.get(f"{s}/ce_{run}", float("nan")) for s in sets]
        bars = {"low": [0.0] * len(sets), "high": [0.0] * len(sets)}
        if run != "clean":
            key = "delta_ce" if run == "recon" else f"delta_{run}"
            for side in bars:
                ends = [figures[f"{s}/ce_clean"] + figures[f"{s}/{key}_{side}"] for s in sets]
                bars[side] = [abs(e - v) for e, v in zip(ends, values, strict=True)]
        figure.add_bar(
            x=sets,
            y=values,
            name=label,
            text=[f"{v:.4f}" for v in values],
            textposition="outside",
            cliponaxis=False,
            error_y={"array": bars["high"], "arrayminus": bars["low"], "color": "#333"},
            marker={"color": PALETTE[i], "pattern": {"shape": PATTERNS[i]}},
            hovertemplate=f"{label}: %{{y:.4f}} nats<extra></extra>",
        )
    figure.update_layout(barmode="group")
    return styled(figure, "Loss of the LM", "token set", "cross-entropy (nats per token)")


def _by_batch(rows: list[dict[str, Any]]) -> go.Figure:
    """Delta CE of every batch against its original loss."""
    figure = go.Figure()
    for i, name in enumerate(dict.fromkeys(row["set"] for row in rows)):
        own = [row for row in rows if row["set"] == name]
        figure.add_scatter(
            x=[row["ce_clean"] for row in own],
            y=[row["delta_ce"] for row in own],
            mode="markers",
            name=name,
            marker={"color": PALETTE[i], "symbol": ["circle", "diamond", "square"][i % 3]},
            customdata=[row["batch"] for row in own],
            hovertemplate="batch %{customdata}: %{x:.4f}, %{y:+.4f}<extra></extra>",
        )
    figure.add_hline(y=0, line_color="#888", line_dash="dash")
    figure.update_layout(showlegend=True)
    return styled(
        figure,
        "What the reconstruction costs, batch by batch",
        "original loss (nats per token)",
        "delta CE (nats per token)",
    )
