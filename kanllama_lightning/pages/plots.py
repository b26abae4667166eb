"""Figures of reports, and pages that hold them and open without a network."""

import functools
import importlib.util
import os
import shutil
import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from plotly.offline import get_plotlyjs, get_plotlyjs_version
from plotly.subplots import make_subplots
from torch import Tensor

from kanllama_lightning.functional.curves import reading
from kanllama_lightning.pages import PAGES, beside, policy
from kanllama_lightning.pages.svg import svg
from kanllama_lightning.storage.files import write_text
from kanllama_lightning.types import Curves, InputError

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "rgba(153,153,153,0.5)"
"""Colours of Okabe and Ito's palette, for the colour-blind; lines differ in dash too."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C6D00")
"""Colours in order of use; series also differ in symbol, dash or place, so that print does too."""
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "hexagon")
LIBRARY = "plotly.packed.js"
"""One file for all pages of a folder, by which its figures answer to the pointer."""
HEIGHT = 420
"""Height of a plain figure, in pixels."""
COLUMNS = 4
"""Panels side by side."""
PANEL, MARGIN = 230, 130
"""Height of a row of panels, and of everything around them, in pixels."""


def curves_figure(curves: Curves, shown: int = 12) -> go.Figure:
    """Small multiples: each curve, its best straight line, and below it what it sees.

    Args:
        curves: Most bent first.
        shown: How many to show at most.
    """
    shown = min(shown, len(curves.names))
    drawn = [tuple(a[i].double().cpu() for a in curves[3:6]) for i in range(shown)]
    rows = -(-shown // COLUMNS)
    figure = make_subplots(
        rows,
        COLUMNS,
        specs=[[{"secondary_y": True}] * COLUMNS for _ in range(rows)],
        subplot_titles=[_title(curves, i, *curve) for i, curve in enumerate(drawn)],
        x_title=escape(curves.axes[0]),
        y_title=escape(curves.axes[1]),
        horizontal_spacing=0.06,
        vertical_spacing=(70 / (PANEL * rows)) if rows > 1 else 0,
    )
    for i, (x, y, density) in enumerate(drawn):
        row, column = divmod(i, COLUMNS)
        at = {"row": row + 1, "col": column + 1}
        lines = {
            "where its inputs lie": (density, {"width": 0}),
            "best straight line": (
                _best_line(x, y, density),
                {"color": ORANGE, "dash": "dash", "width": 1.5},
            ),
            "learned curve": (y, {"color": BLUE, "width": 2.5}),
        }
        sees, line, curve = (
            go.Scatter(x=x.numpy(), y=height.numpy(), name=name, mode="lines", line=style)
            for name, (height, style) in lines.items()
        )
        sees.update(fill="tozeroy", fillcolor=GREY, hoverinfo="skip")
        line.update(hoverinfo="skip")
        curve.update(hovertemplate="%{x:.3g}, %{y:.3g}<extra></extra>")
        figure.add_trace(sees, secondary_y=True, **at)
        figure.add_trace(line, secondary_y=False, **at)
        figure.add_trace(curve, secondary_y=False, **at)
        # the shading keeps to the lowest quarter of a panel
        figure.update_yaxes(range=[0, 4 * density.max().item()], secondary_y=True, **at)
    figure.for_each_trace(lambda trace: trace.update(legendgroup=trace.name, showlegend=False))
    figure.update_traces(showlegend=True, row=1, col=1)
    figure.update_xaxes(nticks=5, gridcolor="#e5e5e5", zerolinecolor="#b0b0b0")
    figure.update_yaxes(nticks=5, gridcolor="#e5e5e5", zerolinecolor="#b0b0b0", secondary_y=False)
    figure.update_yaxes(visible=False, secondary_y=True)
    figure.update_annotations(font_size=12)
    plural = curves.kind if shown == 1 else f"{curves.kind}s"
    figure.update_layout(
        title=f"Most bent {escape(plural)}; all together: {curves.mean_bend:.2%} of the variance "
        f"bent, {curves.mean_out_of_grid:.2%} of the inputs out of grid",
        title_font_size=17,
        template="plotly_white",
        height=PANEL * rows + MARGIN,
        margin={"t": 90, "b": 60, "l": 80, "r": 20},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": -60 / (PANEL * rows)},
    )
    return figure


def styled(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    """The figure in the house's look, with a title and axis titles; returns itself.

    Args:
        figure: Any with one pair of axes.
        title: What is shown; escaped, as are the axis titles.
        x: What lies along the first axis, with its unit.
        y: What lies along the second, with its unit.
    """
    axis = {"gridcolor": "#e5e5e5", "zerolinecolor": "#b0b0b0", "showline": True}
    figure.update_xaxes(title=escape(x), linecolor="#888", **axis)
    figure.update_yaxes(title=escape(y), linecolor="#888", **axis)
    return figure.update_layout(
        title=escape(title),
        title_font_size=17,
        template="plotly_white",
        height=HEIGHT,
        margin={"t": 60, "b": 60, "l": 80, "r": 20},
        colorway=PALETTE,
        bargap=0.05,
    )


def check_png() -> None:
    """See that PNG can be made.

    Raises:
        InputError: kaleido or a browser for it is missing.
    """
    remedy = (
        "leave --png out, or install `.venv/bin/pip install -e '.[png]'` and Chrome or Chromium"
    )
    if importlib.util.find_spec("kaleido") is None:
        raise InputError(f"--png=true: needs the package kaleido; {remedy}")
    browsers = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
    if not any(shutil.which(name) for name in browsers):
        raise InputError(f"--png=true: finds none of {', '.join(browsers)}; {remedy}")


def write_png(folder: Path, figures: Mapping[str, go.Figure], width: int = 900) -> None:
    """Write figures as PNG at twice their size, for print and for pages without scripts.

    Args:
        folder: Made if it is missing.
        figures: By file name without suffix.
        width: In pixels; figures keep their height.
    """
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.write_image(folder / f"{name}.png", width=width, scale=2)


def page(
    title: str,
    text: str,
    figures: Sequence[go.Figure],
    template: str = "figures.html.j2",
    library: str = LIBRARY,
    up: str | None = None,
    **values: object,
) -> str:
    """A page of HTML with drawings of the figures, which a script beside it lets one point at.

    Args:
        title: Heading; escaped, as is the text.
        text: A paragraph below it.
        figures: In order; what they show is escaped by whoever made them.
        template: One that extends `figures.html.j2`, with `values`, which are escaped too.
        library: Where plotly.js is, seen from the page.
        up: The page that leads to it; None for none.
    """
    script = beside("figures.js")
    shown = [
        {
            "title": unescape(figure.layout.title.text or ""),
            "columns": len({panel.domain for panel in figure.select_xaxes()}) or 1,
            "drawing": svg(figure, alone=False),
        }
        for figure in figures
    ]
    data = ",".join(str(figure.to_json()).replace("<", "\\u003c") for figure in figures)
    return PAGES.get_template(template).render(
        title=title,
        text=text,
        policy=policy(None, script),
        style=beside("plain.css"),
        script=script,
        library=library,
        up=up,
        figures=shown,
        data=f"[{data}]",
        **values,
    )


def write_page(
    path: Path,
    title: str,
    text: str,
    figures: Sequence[go.Figure],
    folder: Path | None = None,
    **more: Any,
) -> Path:
    """Write a page (`page`), and plotly.js once for all pages of a folder.

    Args:
        path: The page.
        title: Heading.
        text: A paragraph below it.
        figures: In order.
        folder: Where plotly.js goes (default: the page's own folder).
        more: Passed to `page`.
    """
    shared, packed = (folder or path.parent) / LIBRARY, _packed_plotly()
    if not shared.is_file() or shared.stat().st_size != len(packed):
        write_text(shared, packed)
    library = Path(os.path.relpath(shared, path.parent)).as_posix()
    return write_text(path, page(title, text, figures, library=library, **more))


@functools.cache
def _packed_plotly() -> str:
    """plotly.js at two fifths of its size, for `figures.js` to unpack."""
    packed = b64encode(zlib.compress(get_plotlyjs().encode(), 9)).decode()
    return f'// plotly.js {get_plotlyjs_version()}, deflated\nvar plotlyPacked = "{packed}";\n'


def write_svg(folder: Path, figures: Mapping[str, go.Figure]) -> list[Path]:
    """Write drawings of figures; returns the files.

    Args:
        folder: Made if it is missing.
        figures: By file name without suffix.
    """
    folder.mkdir(exist_ok=True)
    return [write_text(folder / f"{name}.svg", svg(figure)) for name, figure in figures.items()]


def _title(
    curves: Curves,
    i: int,
    x: Float[Tensor, " points"],
    y: Float[Tensor, " points"],
    density: Float[Tensor, " points"],
) -> str:
    family, r2 = reading(x, y, density)
    fit = f"{family}, R² {r2:.3f}" if family != "none" else f"no family, R² {r2:.3f} at best"
    return f"<b>{escape(curves.names[i])}</b><br>{fit}; {curves.bend[i].item():.1%} bent"


def _best_line(
    x: Float[Tensor, " points"], y: Float[Tensor, " points"], density: Float[Tensor, " points"]
) -> Float[Tensor, " points"]:
    """Least squares, weighted by the density."""
    off_x, off_y = x - density @ x, y - density @ y
    spread = density @ off_x.square()
    slope = density @ (off_x * off_y) / spread if spread > 0 else 0.0
    return density @ y + slope * off_x
