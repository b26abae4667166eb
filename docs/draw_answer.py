"""Draws `answer.svg`: loss against parameters, from the table in `answer.md` and nothing else.

python docs/draw_answer.py
"""

import math
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, TOP, PLOT_W, PLOT_H = 760, 440, 66, 44, 660, 330
ROW = re.compile(
    r"\| `(\w+)`(?:, (\w+))? \| ([\d,]+) \| (\d+)k \| [^|]+ \| "
    r"([\d.]+) \(([\d.]+) to ([\d.]+)\) \|"
)
KINDS = {  # of heads by what bends in them: colour (Okabe and Ito), mark
    "nothing bends": ("#000000", "circle"),
    "splines": ("#d55e00", "diamond"),
    "bends without splines": ("#0072b2", "square"),
}
WITHOUT_SPLINES = ("mlp", "bent_dictionary, powers")
LINEAR = ("batch_topk", "wide_batch_topk", "gain_latent", "jump_relu")
JOINED = LINEAR[:2]
LABELS = {  # where they would lie on each other: anchor, right of the mark, below it
    "kan": ("start", 9, -5),
    "mlp": ("start", 9, 12),
    "bent_dictionary, splines": ("end", -9, -5),
    "bent_dictionary, powers": ("end", -9, 12),
    "spline_latent": ("start", 9, 9),
    "gain_latent": ("start", 9, -5),
    "jump_relu": ("end", -9, 5),
    "batch_topk, 512": ("end", -9, 5),
    "batch_topk, 798": ("end", -9, 14),
}


class Point(NamedTuple):
    """One head of the table."""

    head: str
    latents: int
    parameters: float
    loss: float
    low: float
    high: float

    @property
    def kind(self) -> str:
        """What bends in it, one of `KINDS`."""
        if self.head in WITHOUT_SPLINES:
            return "bends without splines"
        return "nothing bends" if self.head in LINEAR else "splines"


def read(page: str) -> list[Point]:
    """The rows of the table of heads on the page.

    Raises:
        ValueError: There is none.
    """
    points = [
        Point(
            head + (f", {shape}" if shape else ""),
            int(latents.replace(",", "")),
            float(thousands) * 1000,
            float(loss),
            float(low),
            float(high),
        )
        for head, shape, latents, thousands, loss, low, high in ROW.findall(page)
    ]
    if not points:
        raise ValueError("answer.md holds no table of heads")
    return points


def mark(shape: str, x: float, y: float, colour: str) -> str:
    """A mark of about ten pixels."""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    corners = {
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
    }[shape]
    places = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{places}" fill="{colour}"/>'


def draw(points: list[Point]) -> str:
    """The drawing, as SVG: parameters to the right (logarithmic), delta CE upwards."""
    left, right = (math.log(f(p.parameters for p in points)) for f in (min, max))
    left, right = left - 0.5, right + 0.3
    least, most = min(p.low for p in points) - 0.01, max(p.high for p in points) + 0.01

    def place(parameters: float, loss: float) -> tuple[float, float]:
        across = (math.log(parameters) - left) / (right - left)
        return LEFT + PLOT_W * across, TOP + PLOT_H * (most - loss) / (most - least)

    bottom = TOP + PLOT_H
    out = [f'<rect x="{LEFT}" y="{TOP}" width="{PLOT_W}" height="{PLOT_H}" class="frame"/>']
    for thousands in (70, 100, 150, 200, 300, 400, 600):
        x, _ = place(thousands * 1000, least)
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 18}" class="mid">{thousands}k</text>')
    for hundredths in range(math.ceil(least * 100), int(most * 100) + 1, 2):
        _, y = place(points[0].parameters, hundredths / 100)
        out.append(
            f'<line x1="{LEFT}" x2="{LEFT + PLOT_W}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        )
        out.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">{hundredths / 100:.2f}</text>'
        )
    wider = sorted((p for p in points if p.head in JOINED), key=lambda p: p.parameters)
    line = " ".join("{:.1f},{:.1f}".format(*place(p.parameters, p.loss)) for p in wider)
    out.append(f'<polyline points="{line}" class="joined"/>')
    for p in points:
        colour, shape = KINDS[p.kind]
        x, y = place(p.parameters, p.loss)
        (_, low), (_, high) = place(p.parameters, p.low), place(p.parameters, p.high)
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>'
        )
        out.append(mark(shape, x, y, colour))
        name = f"{p.head}, {p.latents:,}" if p.head in JOINED else p.head
        anchor, dx, dy = LABELS.get(name, ("start", 9, -5))
        out.append(
            f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" style="text-anchor:{anchor};fill:{colour}">'
            f"{escape(name)}</text>"
        )
    for i, (kind, (colour, shape)) in enumerate(KINDS.items()):
        x, y = LEFT + PLOT_W - 165, TOP + 20 + 20 * i
        out.append(f'{mark(shape, x, y, colour)}<text x="{x + 12}" y="{y + 4}">{kind}</text>')
    body = "\n".join(out)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"
 aria-label="delta CE against parameters, by head">
<style>text {{ font: 12px sans-serif; fill: #222; paint-order: stroke; stroke: #fff }}
text {{ stroke-width: 3px }}
.title {{ font-weight: bold; text-anchor: middle }} .mid {{ text-anchor: middle }}
.end {{ text-anchor: end }} .grid {{ stroke: #ddd; stroke-width: .7 }}
.frame {{ fill: none; stroke: #888 }} .joined {{ fill: none; stroke: #000; stroke-dasharray: 6 3 }}
</style>
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
<text x="{LEFT + PLOT_W / 2}" y="{TOP - 16}" class="title">delta CE at L0 8, nats per token (lower
 is better), and the latents of the linear heads</text>
{body}
<text x="{LEFT + PLOT_W / 2}" y="{bottom + 42}" class="mid">parameters</text>
</svg>
"""


def main() -> None:
    """Draw it beside the page."""
    drawing = draw(read((HERE / "answer.md").read_text()))
    (HERE / "answer.svg").write_text(drawing)


if __name__ == "__main__":
    main()
