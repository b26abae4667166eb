"""Draws `heads.svg`: delta CE and FVU against L0, from the table of `benchmarks/compare_heads.py`.

python docs/draw_heads.py runs/compare/stories/table.csv
"""

import argparse
import csv
import math
from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, TOP, PLOT_W, PLOT_H = 1070, 430, 64, 40, 340, 310
GAP = 110
STYLES = {  # head: colour (Okabe and Ito), dash, marker
    "batch_topk": ("#000000", "", "circle"),
    "wide_batch_topk": ("#555555", "6 3", "circle"),
    "mlp": ("#e69f00", "", "square"),
    "kan": ("#d55e00", "", "diamond"),
    "spline_hidden": ("#0072b2", "", "triangle"),
    "curved_dictionary": ("#cc79a7", "", "square"),
    "only_kan": ("#56b4e9", "", "diamond"),
    "batch_topk@2544": ("#888888", "6 3", "circle"),
}


class Point(NamedTuple):
    """One head at one sparsity."""

    head: str
    parameters: int
    l0: float
    value: float
    low: float
    high: float


def read(path: Path, column: str) -> list[Point]:
    """Points of the heads that were trained at several sparsities."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    points = [
        Point(
            r["head"],
            int(r["parameters"]),
            float(r["l0"]),
            *(float(r[column + end]) for end in ("", "_low", "_high")),
        )
        for r in rows
        if r["head"] in STYLES
    ]
    many = {p.head for p in points if sum(q.head == p.head for q in points) > 1}
    return [p for p in points if p.head in many]


def marker(kind: str, x: float, y: float, colour: str) -> str:
    """A mark of about nine pixels."""
    shapes = {
        "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
        "diamond": [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)],
        "triangle": [(0, -5.5), (5, 4), (-5, 4)],
    }
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[kind])
    return f'<polygon points="{corners}" fill="{colour}"/>'


def panel(points: list[Point], left: float, title: str) -> str:
    """One plot, both axes logarithmic."""
    l0s = sorted({round(p.l0) for p in points})
    x_low, x_high = math.log(min(l0s) * 0.85), math.log(max(l0s) * 1.18)
    y_low = math.log(min(p.low for p in points) * 0.9)
    y_high = math.log(max(p.high for p in points) * 1.1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - x_low) / (x_high - x_low)
        up = (math.log(y) - y_low) / (y_high - y_low)
        return left + PLOT_W * across, TOP + PLOT_H * (1 - up)

    out = [
        f'<rect x="{left}" y="{TOP}" width="{PLOT_W}" height="{PLOT_H}" class="frame"/>',
        f'<text x="{left + PLOT_W / 2}" y="{TOP - 14}" class="title">{escape(title)}</text>',
        f'<text x="{left + PLOT_W / 2}" y="{TOP + PLOT_H + 38}" class="mid">'
        "L0, latents per token</text>",
    ]
    for l0 in l0s:
        x, _ = place(l0, math.exp(y_low))
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + PLOT_H}" class="grid"/>')
        out.append(f'<text x="{x:.1f}" y="{TOP + PLOT_H + 18}" class="mid">{l0}</text>')
    for digit in (1, 1.5, 2, 3, 4, 5, 7):
        for power in range(-4, 2):
            value = digit * 10**power
            if y_low <= math.log(value) <= y_high:
                _, y = place(l0s[0], value)
                out.append(
                    f'<line x1="{left}" x2="{left + PLOT_W}" y1="{y:.1f}" y2="{y:.1f}" '
                    f'class="grid"/>'
                    f'<text x="{left - 7}" y="{y + 4:.1f}" class="end">{value:g}</text>'
                )
    for head, (colour, dash, kind) in STYLES.items():
        own = sorted((p for p in points if p.head == head), key=lambda p: p.l0)
        places = [place(p.l0, p.value) for p in own]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6" '
            f'stroke-dasharray="{dash}"/>'
        )
        for p, (x, y) in zip(own, places, strict=True):
            ends = [place(p.l0, v)[1] for v in (p.low, p.high)]
            out.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" '
                f'stroke="{colour}"/>' + marker(kind, x, y, colour)
            )
    return "\n".join(out)


def main() -> None:
    """Draw both figures, with one legend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    table = parser.parse_args().table
    loss, fvu = (read(table, column) for column in ("delta_ce", "fvu"))
    if not loss:
        raise SystemExit(f"{table}: holds no head at several sparsities")
    second = LEFT + PLOT_W + GAP - 30
    drawn = [h for h in STYLES if any(p.head == h for p in loss)]
    legend = []
    for i, head in enumerate(drawn):
        colour, _, kind = STYLES[head]
        x, y = second + PLOT_W + 20, TOP + 14 + 22 * i
        size = next(p.parameters for p in loss if p.head == head)
        name = escape(f"{head} ({size / 1000:,.0f}k parameters)")
        legend.append(f'{marker(kind, x, y, colour)}<text x="{x + 12}" y="{y + 4}">{name}</text>')
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"
 aria-label="delta CE and FVU against L0, by head">
<style>text {{ font: 12px sans-serif; fill: #222 }}
.title {{ font-weight: bold; text-anchor: middle }} .mid {{ text-anchor: middle }}
.end {{ text-anchor: end }} .grid {{ stroke: #ddd; stroke-width: .7 }}
.frame {{ fill: none; stroke: #888 }}</style>
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
{panel(loss, LEFT, "delta CE, nats per token (lower is better)")}
{panel(fvu, second, "FVU (lower is better)")}
{chr(10).join(legend)}
</svg>
"""
    (Path(__file__).parent / "heads.svg").write_text(svg)


if __name__ == "__main__":
    main()
