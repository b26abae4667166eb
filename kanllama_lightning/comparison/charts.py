"""Pareto views and bars."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from kanllama_lightning.comparison.loading import Evaluated, family_of
from kanllama_lightning.comparison.tables import seeds, table
from kanllama_lightning.measures import cells
from kanllama_lightning.measures.cells import SHARE
from kanllama_lightning.pages.plots import PALETTE, SYMBOLS, styled

Row = Mapping[str, Any]


def figures(runs: Sequence[Evaluated]) -> list[go.Figure]:
    """Pareto views, dead latents, concepts and parameters, on the main set."""
    rows = [row for row in table(runs) if row["set"] == runs[0].sets[0]]
    lines = _lines(runs, rows)
    drawn = [
        _scatter(lines, "l0", "delta_ce", "Loss against sparsity", "delta CE (nats per token)"),
        _scatter(
            lines, "bits_per_token", "delta_ce", "Loss against bits", "delta CE (nats per token)"
        ),
        _scatter(lines, "l0", "fvu", "Reconstruction against sparsity", "FVU"),
        _bars(lines, rows),
        _scatter(lines, "l0", "recovered_frac", "Concepts against sparsity", "concepts recovered"),
        _scatter(lines, "parameters", "fvu", "Reconstruction against size", "FVU", joined=False),
    ]
    return [figure for figure in drawn if figure is not None]


def _lines(runs: Sequence[Evaluated], rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Per head class (and width and training, where it has several): its groups of seeds, by L0."""
    widths: dict[Any, set[Any]] = {}
    for row in rows:
        widths.setdefault(row["head"], set()).add(row["d_sae"])
    by_label = {row["run"]: row for row in rows}
    lines: dict[str, list[list[Row]]] = {}
    families: dict[str, str] = {}
    for group in seeds(runs):
        own = [by_label[run.label] for run in group.runs if run.label in by_label]
        if own:
            head, width = own[0]["head"], own[0]["d_sae"]
            name = f"{head}, {width:,} latents" if len(widths[head]) > 1 else f"{head}"
            family = family_of(group.runs[0])
            if families.setdefault(name, family) != family:
                name = families.setdefault(family, f"{name}, {group.runs[0].label}")
            lines.setdefault(name, []).append(own)
    return lines


def _style(i: int) -> tuple[str, str]:
    """Colour and symbol of the head at place i: no two alike among the first 64."""
    return PALETTE[i % len(PALETTE)], SYMBOLS[(i + i // len(PALETTE)) % len(SYMBOLS)]


def _scatter(
    lines: Mapping[str, Sequence[Sequence[Row]]],
    x: str,
    y: str,
    title: str,
    y_title: str,
    joined: bool = True,
) -> go.Figure | None:
    """One symbol per run, whiskers for its interval, a line through the means over seeds."""
    figure, shown = go.Figure(), []
    for i, (name, groups) in enumerate(lines.items()):
        colour, symbol = _style(i)
        there = [[r for r in g if r[x] is not None and r[y] is not None] for g in groups]
        there = sorted((g for g in there if g), key=lambda g: _mean(g, x))
        own = [row for group in there for row in group]
        if not own:
            continue
        shown += own
        if joined and len(there) > 1:
            figure.add_scatter(
                x=[_mean(g, x) for g in there],
                y=[_mean(g, y) for g in there],
                mode="lines",
                line={"color": colour, "width": 1.5},
                legendgroup=str(i),
                showlegend=False,
                hoverinfo="skip",
            )
        figure.add_scatter(
            x=[row[x] for row in own],
            y=[row[y] for row in own],
            error_y=_whiskers(own, y),
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 9},
            name=escape(name),
            legendgroup=str(i),
            customdata=[[escape(row["run"]), row["l0"], _share(row)] for row in own],
            hovertemplate=f"%{{customdata[0]}}<br>{escape(y_title)} %{{y:.4g}}, "
            f"L0 %{{customdata[1]:.4g}}<br>{SHARE}: %{{customdata[2]}}<extra></extra>",
        )
    if not shown:
        return None
    x_title = {
        "l0": "L0 (latents per token)",
        "bits_per_token": "bits per token of the code",
        "parameters": "trained parameters",
    }[x]
    styled(figure, title, x_title, y_title)
    _logarithmic(figure.update_xaxes, [row[x] for row in shown])
    ends = [row.get(f"{y}{end}") for row in shown for end in ("", "_low", "_high")]
    _logarithmic(figure.update_yaxes, [v for v in ends if v is not None])
    figure.update_yaxes(exponentformat="none")
    if x != "parameters":
        _apart(figure, [row[x] for row in shown])
    if y.endswith("_frac"):
        figure.update_yaxes(tickformat=".0%")
    return figure.update_layout(showlegend=True)


def _share(row: Row) -> str:
    return cells.share(row) or "unknown"


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def _whiskers(rows: Sequence[Row], key: str) -> dict[str, Any] | None:
    if any(row.get(f"{key}_low") is None for row in rows):
        return None
    return {
        "type": "data",
        "array": [max(0.0, row[f"{key}_high"] - row[key]) for row in rows],
        "arrayminus": [max(0.0, row[key] - row[f"{key}_low"]) for row in rows],
        "thickness": 1.5,
        "width": 4,
    }


def _apart(figure: go.Figure, values: Sequence[float]) -> None:
    """An axis of L0 or bits that does not make much of runs at nearly the same L0."""
    low, high = min(values), max(values)
    if high < 1.2 * low:
        figure.update_xaxes(range=[0.9 * low, 1.1 * high])


def _logarithmic(update: Callable[..., Any], values: Sequence[float]) -> None:
    """A logarithmic axis for what is positive and spans more than a decade."""
    if min(values) > 0 and max(values) > 10 * min(values):
        decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))))
        ticks = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
        ticks.append(10.0**decades.stop)
        update(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def _bars(lines: Mapping[str, Sequence[Sequence[Row]]], rows: Sequence[Row]) -> go.Figure | None:
    """Share of dead latents of each run."""
    if all(row["dead_frac"] is None for row in rows):
        return None
    figure = go.Figure()
    for i, (name, groups) in enumerate(lines.items()):
        own = [row for group in groups for row in group if row["dead_frac"] is not None]
        figure.add_bar(
            x=[escape(row["run"]) for row in own],
            y=[row["dead_frac"] for row in own],
            text=[f"{row['dead_frac']:.1%}" for row in own],
            textposition="outside",
            cliponaxis=False,
            name=escape(name),
            marker={"color": _style(i)[0], "pattern": {"shape": ("", "/", ".", "x")[i % 4]}},
            hovertemplate="%{x}: %{y:.2%} dead<extra></extra>",
        )
    styled(figure, "Dead latents", "run", "share that never fired")
    figure.update_xaxes(type="category")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure.update_layout(showlegend=True, bargap=0.3)
