"""The latents: how often each one fires, how strongly, and what it says in words of the LM."""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.token_text import token_text, visible
from kanllama_lightning.measures.contexts import Contexts
from kanllama_lightning.measures.directions import (
    END,
    OPERATING_POINT,
    RANDOM,
    STRAIGHT,
    DirectionStats,
    read_directions,
)
from kanllama_lightning.measures.metrics import Activations
from kanllama_lightning.pages.plots import PALETTE, SYMBOLS, styled
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.reports.labels import COLUMN, PEAKS, READS, Known, firing_tokens
from kanllama_lightning.reports.report import EvalRun, Figures, Report, Seen
from kanllama_lightning.types import InputError

ROWS = 4096
"""Activations over which latents that mix in the decoder are judged."""
DENSE = 0.1
"""Share of tokens above which a latent is dense."""
SHOWN = 5
"""Tokens of a latent in `latents.csv` and in the page."""
LONGEST = 24
"""Characters of a token that the page shows."""
BINS = np.linspace(-7, 0, 71)
"""Edges of log10 firing frequency (METHODS C)."""
KINDS = ("alive", "dense", "dead")
LEGEND = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.01, "yanchor": "bottom"}
LOG_TICKS = [a * 10**b for b in range(6) for a in (1, 1.5, 2, 3, 4, 5, 7)]


class LatentsReport(Report):
    """Every latent: frequency, size, direction, and its logit lens; over the first token set.

    `latents.csv` has a row per latent, with its label (explanation by a language model, else the
    known fact it tells with an F1 of at least 0.5, else the tokens it fires on);
    `logit_lens.csv` the tokens that it raises and lowers most, `latents.html` the distributions.
    Sizes are in the head's units (raw activations times the head's `scale`; raw ones for PCA), of
    signed codes those of |z|. Dead latents fired on none of the tokens, dense ones on more than a
    tenth. The lens is T = (w g) W_U with the final norm's gain g: at block 0 only the direct path.
    Kurtosis is mean(z^4), 3 for a normal distribution.

    A KAN decoder has curves: a latent's direction is the secant at its median activation, or its
    mean Jacobian where latents mix; a latent is called curved if its straightness up to the 0.99
    quantile is below 0.95, and its tokens are those of that one direction then.

    Args:
        top: Tokens listed per latent at either end of the lens.
        block: Latents whose logits over the whole vocabulary exist at once.
        tokens: Tokens looked at, at most, of the set (default: all).
    """

    name = "latents"
    files = ("latents.csv", "logit_lens.csv", "latents.html")
    reads = READS

    def __init__(self, top: int = 10, block: int = 256, tokens: int | None = None) -> None:
        for argument, value in {"top": top, "block": block, "tokens": tokens}.items():
            if value is not None and value < 1:
                raise InputError(f"Latents.{argument}={value}: must be at least 1")
        self.top, self.block, self.tokens = top, block, tokens
        self._meter: Activations | None = None
        self._contexts: Contexts | None = None
        self._x: list[Tensor] = []

    def work(self, lm: FrozenLM, heads: Sequence[SAEHead], tokens: int, ctx_len: int) -> Work:
        """The logit lens of every latent, and of random directions."""
        return Work(directions=sum(head.d_sae + RANDOM for head in heads))

    def begin(self, run: EvalRun) -> None:
        """Without counts and rows."""
        self._meter, self._x = Activations(run.head.d_sae).to(run.lm.device), []
        self._contexts = Contexts(run.head.d_sae, width=1, top=PEAKS, sampled=0, silent=0)

    def observe(self, run: EvalRun, seen: Seen) -> None:
        """Count a batch of the first set; take its rows, until there are enough."""
        if self._meter is None or self._contexts is None or seen.batch.set_name != run.sets[0]:
            return
        self._meter.update(seen.batch.out.codes)
        self._contexts.update(seen.batch)
        room = ROWS - sum(len(x) for x in self._x)
        if room > 0:
            self._x.append(seen.batch.rows[:room])

    def finish(self, run: EvalRun) -> Figures:
        """Look at the latents; tables, page and figures."""
        meter = self._meter
        if meter is None or self._contexts is None or not int(meter.n):
            raise InputError(f"report latents: set {run.sets[0]!r} has no token to look at")
        found = read_directions(run.head, run.lm, meter, torch.cat(self._x), self.top, self.block)
        self._x = []
        tops = _tokens(run.lm.tokenizer, found.lens.top_ids, found.lens.top_values)
        bottoms = _tokens(run.lm.tokenizer, found.lens.bottom_ids, found.lens.bottom_values)
        table = _table(meter, found, tops)
        known, tokenizer = Known.read(run), run.lm.tokenizer
        fires = [firing_tokens(self._contexts, j, tokenizer) for j in range(run.head.d_sae)]
        table.insert(1, COLUMN, [known.label(j, tokens) for j, tokens in enumerate(fires)])
        table["fires_on"] = [_json(tokens) for tokens in fires]
        run.write_table("latents.csv", table)
        run.write_table("logit_lens.csv", _lens_table(found, tops, bottoms))
        lens = {f"lens_{name}": value for name, value in found.figures.items()}
        figures = meter.compute() | lens
        run.write_page(
            "latents.html", "Latents", _text(run, figures), _drawn(table, found, figures)
        )
        return {k: v if math.isfinite(v) else None for k, v in figures.items()}


def _tokens(
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "d_sae top"],
    values: Float[Tensor, "d_sae top"],
) -> list[list[str]]:
    """Texts of the tokens of each latent; none where it has no direction."""
    text = {i: token_text(tokenizer, i) for i in ids.unique().tolist()}
    defined = values.isfinite().all(1).tolist()
    return [
        [text[i] for i in row] if known else []
        for row, known in zip(ids.tolist(), defined, strict=True)
    ]


def _table(meter: Activations, found: DirectionStats, tops: list[list[str]]) -> pd.DataFrame:
    """`latents.csv`."""
    frequency, fired = meter.frequency(), meter.fired > 0
    dense = frequency > DENSE
    columns = {
        "frequency": frequency,
        "n_fired": meter.fired,
        "mean_activation": meter.mean(),
        "median_activation": meter.quantile(OPERATING_POINT),
        "q99_activation": meter.quantile(END),
        "max_activation": torch.where(fired, meter.largest, torch.nan),
        "decoder_norm": found.norm,
        "max_cosine": found.max_cosine,
        "straightness": found.straightness,
        "curved": found.straightness < STRAIGHT,
        "lens_mean": found.lens.mean,
        "lens_std": found.lens.std,
        "skewness": found.lens.skewness,
        "kurtosis": found.lens.kurtosis,
    }
    table = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    kinds = np.where(dense.cpu(), "dense", np.where(fired.cpu(), "alive", "dead"))
    table.insert(0, "latent", np.arange(len(table)))
    table.insert(1, "kind", kinds)
    table["top_tokens"] = [_json(row[:SHOWN]) for row in tops]
    return table


def _lens_table(
    found: DirectionStats, tops: list[list[str]], bottoms: list[list[str]]
) -> pd.DataFrame:
    """`logit_lens.csv`."""
    lens = found.lens
    table = pd.DataFrame(
        {
            "latent": np.arange(len(tops)),
            "mean": lens.mean.cpu().numpy(),
            "std": lens.std.cpu().numpy(),
            "skewness": lens.skewness.cpu().numpy(),
            "kurtosis": lens.kurtosis.cpu().numpy(),
        }
    )
    ends = {"top": (tops, lens.top_values), "bottom": (bottoms, lens.bottom_values)}
    for end, (texts, values) in ends.items():
        table[f"{end}_tokens"] = [_json(row) for row in texts]
        table[f"{end}_values"] = [
            _json([float(f"{v:.6g}") for v in row[: len(text)]])
            for row, text in zip(values.tolist(), texts, strict=True)
        ]
    return table


def _json(values: Sequence[str] | Sequence[float]) -> str:
    return json.dumps(values, ensure_ascii=False)


def _text(run: EvalRun, figures: dict[str, float]) -> str:
    n = figures["n_tokens"]
    curved = figures["lens_curved_frac"]
    return (
        f"Over {n:,.0f} tokens of {run.sets[0]}: {figures['lens_n_alive']:,.0f} of "
        f"{run.head.d_sae:,} latents fired ({figures['dead_frac']:.1%} are dead), "
        f"{figures['dense_frac']:.1%} on more than a tenth of the tokens. The logit lens is what a "
        "latent's direction, times the gain of the final norm and the unembedding, says of each "
        "token of the vocabulary; it is the direct path only, and leaves out what the blocks after "
        "the hook point make of it. Skewness is mean(z³) and kurtosis mean(z⁴) of those logits: "
        "0 and 3 for a normal distribution. Dashed: random unit directions. Latents that raise a "
        "few tokens by much lie to the right, and high. "
        + (f"{curved:.1%} of the latents judged are curved: no one direction. " if curved else "")
        + "All latents are in latents.csv, their tokens in logit_lens.csv."
    )


def _drawn(
    table: pd.DataFrame, found: DirectionStats, figures: dict[str, float]
) -> list[go.Figure]:
    """The four figures of the page."""
    counted = table[found.counted.cpu().numpy()]
    random = found.random
    return [
        _histogram(
            counted["kurtosis"].to_numpy(), random.kurtosis.cpu().numpy(), "kurtosis", log=True
        ),
        _histogram(
            counted["skewness"].to_numpy(), random.skewness.cpu().numpy(), "skewness", log=False
        ),
        _scatter(table[table["kurtosis"].notna()], figures["lens_kurtosis_random_p99"]),
        _frequencies(table["frequency"].to_numpy(), int(figures["n_tokens"])),
    ]


def _histogram(latents: np.ndarray, random: np.ndarray, name: str, log: bool) -> go.Figure:
    """Shares of the latents, filled, and of random directions, a dashed outline."""
    both = np.concatenate([latents, random])
    both = np.log10(both) if log else both
    edges = np.histogram_bin_edges(both, 60)
    at = 10**edges if log else edges
    figure = go.Figure()
    series: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        f"alive latents ({len(latents):,})": (
            latents,
            {"fill": "tozeroy", "line": {"color": PALETTE[0], "width": 1.5}},
        ),
        f"random directions ({len(random):,})": (
            random,
            {"line": {"color": PALETTE[1], "width": 2, "dash": "dash"}},
        ),
    }
    for label, (values, style) in series.items():
        counts, _ = np.histogram(np.log10(values) if log else values, edges)
        share = counts / max(1, len(values))
        figure.add_scatter(
            x=np.repeat(at, 2),
            y=np.concatenate([[0], np.repeat(share, 2), [0]]),
            mode="lines",
            name=label,
            hovertemplate="%{x:.3g}: %{y:.2%}<extra></extra>",
            **style,
        )
    power, normal = ("z⁴", "3") if log else ("z³", "0")
    figure.update_yaxes(tickformat=".1%", rangemode="tozero")
    styled(
        figure,
        f"{name.capitalize()} of the latents' logits over the vocabulary",
        f"{name}, mean({power}); {normal} for a normal distribution" + ("; log scale" * log),
        "share of the directions, per bin",
    )
    if log:
        figure.update_xaxes(type="log", tickvals=LOG_TICKS)
    return figure.update_layout(legend=LEGEND)


def _scatter(table: pd.DataFrame, unusual: float) -> go.Figure:
    """Skewness against kurtosis, a point per latent that has a direction."""
    figure = go.Figure()
    for i, kind in enumerate(KINDS):
        some = table[table["kind"] == kind]
        if some.empty:
            continue
        figure.add_scatter(
            x=some["skewness"].to_numpy(),
            y=some["kurtosis"].to_numpy(),
            mode="markers",
            name=f"{kind} ({len(some):,})",
            marker={
                "color": PALETTE[6] if kind == "dead" else PALETTE[i],
                "symbol": "x-thin-open" if kind == "dead" else SYMBOLS[i],
                "size": 7 if kind == "dead" else 5 + 3 * i,
                "line": {"width": 1.5 if kind == "dead" else 0},
                "opacity": 0.7,
            },
            text=[
                _hover(*row)
                for row in zip(
                    *(some[c] for c in ("latent", COLUMN, "frequency", "top_tokens")), strict=True
                )
            ],
            hovertemplate="%{text}<br>skewness %{x:.2f}, kurtosis %{y:.2f}<extra></extra>",
        )
    figure.add_hline(y=unusual, line={"dash": "dash", "color": PALETTE[1], "width": 1.5})
    figure.add_annotation(
        text="99 % of random directions are below",
        **{"x": 1, "xref": "paper", "xanchor": "right"},
        **{"y": math.log10(unusual), "yanchor": "bottom", "showarrow": False},
    )
    styled(
        figure,
        "Skewness against kurtosis of every latent",
        "skewness, mean(z³)",
        "kurtosis, mean(z⁴), log scale",
    )
    figure.update_yaxes(type="log", tickvals=LOG_TICKS)
    return figure.update_layout(showlegend=True, height=560, hovermode="closest", legend=LEGEND)


def _hover(latent: int, label: str, frequency: float, tokens: str) -> str:
    """What pointing at a latent shows; token text may be anything."""
    shown = ", ".join(_json(t[:LONGEST]) for t in json.loads(tokens))
    name = escape(visible(label[: 3 * LONGEST]), quote=False)
    return (
        f"latent {latent}: {name}<br>fires on {frequency:.3%}<br>"
        f"raises {escape(shown, quote=False)}"
    )


def _frequencies(frequency: np.ndarray, n_tokens: int) -> go.Figure:
    """Firing frequencies, the dead ones as a bar of their own."""
    fires = frequency[frequency > 0]
    counts, _ = np.histogram(np.log10(fires).clip(BINS[0], BINS[-1]), BINS)
    dead = int((frequency == 0).sum())
    figure = go.Figure()
    figure.add_bar(
        x=(BINS[:-1] + BINS[1:]) / 2,
        y=counts,
        width=0.09,
        name=f"fired ({len(fires):,})",
        marker={"color": PALETTE[0]},
        hovertemplate="10^%{x:.2f}: %{y:,} latents<extra></extra>",
    )
    figure.add_bar(
        x=[-7.5],
        y=[dead],
        width=0.3,
        name=f"dead ({dead:,})",
        marker={"color": PALETTE[1], "pattern": {"shape": "/"}},
        hovertemplate="dead: %{y:,} latents<extra></extra>",
    )
    lines = {
        math.log10(1 / n_tokens): (f"one of {n_tokens:,} tokens", "top left"),
        math.log10(DENSE): ("dense", "top right"),
    }
    for x, (label, position) in lines.items():
        figure.add_vline(
            x=x,
            line={"dash": "dot", "color": "#444444", "width": 1.5},
            annotation_text=label,
            annotation_position=position,
        )
    styled(figure, "How often latents fire", "share of tokens, log scale", "latents")
    powers = [f"10<sup>{e}</sup>" for e in range(-7, 0)]
    figure.update_xaxes(
        tickvals=[-7.5, *range(-7, 1)], ticktext=["dead", *powers, "1"], range=[-7.8, 0.15]
    )
    return figure.update_layout(showlegend=True, legend=LEGEND)
