"""Figures as SVG: drawings that need no script, no browser and no network."""

import math
import re
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape, unescape
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

WIDTH, HEIGHT = 480, 300
"""Size of a drawing with one pair of axes, pixels."""
PANEL = (250, 180)
"""Size of one of several panels, pixels."""
LEFT, RIGHT, TOP, BOTTOM, LINE = 64, 14, 34, 52, 15
"""Room around the axes, and of a line of text, pixels."""
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#222}.soft{fill:#555}.grid{stroke:#e5e5e5}"
    ".axis{stroke:#888;fill:none}@media(prefers-color-scheme:dark){text{fill:#e6e6e6}"
    ".soft{fill:#a3abb3}.grid{stroke:#3b4148}}"
)
DARK = re.compile(r"#(444444|444|333|888)$")
"""Greys that only light paper shows; a middle one takes their place."""
DASHES = {"dash": "6 4", "dot": "2 3"}
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SHAPES = {
    "square": "m{0},{0}h{2}v{2}h{1}z",
    "diamond": "m0,{1}l{3},{3}l{0},{3}l{0},{0}z",
    "cross": "m{0},0h{2}m{0},{0}v{2}",
    "x": "m{0},{0}l{2},{2}m0,{1}l{1},{2}",
    "triangle": "m0,{0}l{3},{2}h{1}z",
    "circle": "m{0},0a{3},{3} 0 1,0 {2},0a{3},{3} 0 1,0 {1},0",
}
"""Relative paths of markers: {3} is the radius, {2} the diameter, {0} and {1} less than nothing."""
Point = tuple[float, float]


class Axis(NamedTuple):
    """Where values lie along one direction."""

    low: float
    high: float
    log: bool
    names: list[str]
    """Of the categories; empty for numbers."""
    pixels: Point
    """Where its ends are."""

    def at(self, value: Any) -> float:
        """The pixel of a value; NaN for one that has no place."""
        number = float(self.names.index(str(value))) if self.names else _float(value)
        if self.log:
            number = math.log10(number) if number > 0 else math.nan
        start, end = self.pixels
        return start + (number - self.low) / (self.high - self.low) * (end - start)


def svg(figure: go.Figure, alone: bool = True) -> str:
    """A drawing of a figure of bars, lines and markers, on one or several pairs of axes.

    Args:
        figure: With its title and axis titles, which are escaped already.
        alone: Whether it is a file of its own; in a page it needs neither title nor namespace.
    """
    made = _unpacked(figure.to_dict())
    traces, layout = made["data"], made["layout"]
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for trace in traces:
        panels.setdefault(trace.get("xaxis") or "x", []).append(trace)
    columns = len({tuple(_axis(layout, x).get("domain", (0, 1))) for x in panels})
    rows = -(-len(panels) // max(1, columns))
    shown = [t for t in traces if t.get("name") and t.get("showlegend") is not False]
    legend = shown if len(shown) > 1 or layout.get("showlegend") else []
    width, inner = (
        (WIDTH, HEIGHT - TOP - BOTTOM)
        if len(panels) == 1
        else (PANEL[0] * columns, PANEL[1] * rows)
    )
    title = _wrapped(_plain(layout.get("title", {}).get("text", "")), width // 7)
    top = TOP + LINE * (len(title) - 1) if alone else LINE
    top += 24 * (len(panels) > 1)  # their own titles
    slanted = _slanted(panels)
    bottom = BOTTOM + slanted
    keys, lines = _legend(legend, width, top + inner + bottom + 4)
    height = top + inner + bottom + lines * LINE
    box = (LEFT, top, width - RIGHT, top + inner)
    heads = enumerate(title if alone else [])
    parts = [_text(8, 16 + LINE * i, line, "start", bold=True) for i, line in heads]
    for name, own in panels.items():
        parts += _panel(layout, name, own, box, bool(slanted))
    parts += _notes(layout, box, panels) + keys
    space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    return (
        f'<svg{space} viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(" ".join(title))}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _unpacked(value: Any) -> Any:
    """The same with lists for arrays, which plotly packs."""
    if isinstance(value, dict) and "bdata" in value:
        return np.frombuffer(b64decode(value["bdata"]), value["dtype"]).tolist()
    if isinstance(value, dict):
        return {key: _unpacked(own) for key, own in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_unpacked(own) for own in value]
    return value.item() if isinstance(value, np.generic) else value


def _panel(
    layout: Mapping[str, Any],
    name: str,
    traces: Sequence[Mapping[str, Any]],
    box: tuple[float, float, float, float],
    slanted: bool,
) -> list[str]:
    """Grid, ticks and everything drawn on one x-axis; a second y-axis lies over the first."""
    left, top, right, bottom = box
    own = _axis(layout, name)
    by_y: dict[str, list[Mapping[str, Any]]] = {}
    for trace in traces:
        by_y.setdefault(trace.get("yaxis") or "y", []).append(trace)
    over = {y: _axis(layout, y) for y in by_y}
    first = next((y for y in by_y if not over[y].get("overlaying")), next(iter(by_y)))
    x0, x1 = own.get("domain", (0, 1))
    y0, y1 = over[first].get("domain", (0, 1))
    at = [left + x0 * (right - left), left + x1 * (right - left)]
    up = [bottom - y0 * (bottom - top), bottom - y1 * (bottom - top)]
    gap = 28 if (x1 - x0) < 1 else 0  # room for the labels of the panel on the right
    at[1] -= gap
    lines = _lines(layout, name)
    marks = [s["x0"] for s in lines if s["x0"] == s["x1"]]
    x = _scale(own, [v for t in traces for v in t["x"]] + marks, _bars(traces), (at[0], at[1]))
    parts, drawn = [], []
    for key, of_y in by_y.items():
        heights = [v for t in of_y for v in _ends(t)]
        heights += [s["y0"] for s in lines if s["y0"] == s["y1"] and key == first]
        stacked = _stacked(layout, of_y)
        y = _scale(over[key], heights + stacked, [], (up[0], up[1]), zero=bool(_bars(of_y)))
        if key == first:
            parts += _ticks(own, x, over[key], y, slanted, multiple=gap > 0)
            drawn += [_line(s, x, y) for s in lines]
        shapes = _series(layout, of_y, x, y)
        drawn = drawn + shapes if key == first else shapes + drawn
    return parts + drawn


def _axis(layout: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = layout.get(f"{name[0]}axis{name[1:]}", {})
    return found


def _bars(traces: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [t for t in traces if t["type"] == "bar"]


def _ends(trace: Mapping[str, Any]) -> list[float]:
    """Heights of a trace with its whiskers."""
    whiskers = trace.get("error_y") or {}
    up, down = whiskers.get("array") or [], whiskers.get("arrayminus") or []
    heights = [_float(v) for v in trace["y"]]
    heights += [_float(v) + e for v, e in zip(trace["y"], up, strict=False)]
    return heights + [_float(v) - e for v, e in zip(trace["y"], down, strict=False)]


def _stacked(layout: Mapping[str, Any], traces: Iterable[Mapping[str, Any]]) -> list[float]:
    """Heights of stacks of bars."""
    if layout.get("barmode") != "stack":
        return []
    heights: dict[Any, float] = {}
    for trace in _bars(traces):
        for place, value in zip(trace["x"], trace["y"], strict=True):
            heights[place] = heights.get(place, 0.0) + _float(value)
    return list(heights.values())


def _scale(
    axis: Mapping[str, Any],
    values: Sequence[Any],
    bars: Sequence[Mapping[str, Any]],
    pixels: Point,
    zero: bool = False,
) -> Axis:
    """The axis of given values; what is asked for in the figure comes first."""
    if axis.get("type") == "category" or any(isinstance(v, str) for v in values):
        names = list(dict.fromkeys(str(v) for v in values))
        return Axis(-0.5, len(names) - 0.5, False, names, pixels)
    log = axis.get("type") == "log"
    numbers = [n for v in values if math.isfinite(n := _float(v)) and (n > 0 or not log)]
    numbers = [math.log10(n) for n in numbers] if log else numbers
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    if bars:
        half = max(_width(bar) for bar in bars) / 2
        low, high = low - half, high + half
    if zero or axis.get("rangemode") == "tozero":
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.04 * (high - low) or 0.5
    low, high = low - room * (low != 0 or not zero), high + room
    if axis.get("range") is not None:
        low, high = (float(end) for end in axis["range"])
    return Axis(low, high, log, [], pixels)


def _width(bar: Mapping[str, Any]) -> float:
    """Width of the bars of a trace and the gap beside them, in units of the axis."""
    if bar.get("width") is not None:
        return float(bar["width"])
    places = sorted({_float(v) for v in bar["x"]})
    return min((b - a for a, b in zip(places, places[1:], strict=False)), default=1.0)


def _series(
    layout: Mapping[str, Any], traces: Sequence[Mapping[str, Any]], x: Axis, y: Axis
) -> list[str]:
    bars = _bars(traces)
    stack = layout.get("barmode") == "stack"
    heights: dict[Any, float] = {}
    parts = []
    for trace in traces:
        if trace["type"] == "bar":
            place = 0 if stack or layout.get("barmode") == "overlay" else bars.index(trace)
            beside = 1 if stack or any(b.get("width") for b in bars) else len(bars)
            place = place if beside > 1 else 0
            parts += _drawn_bars(trace, x, y, place, beside, heights if stack else {}, stack)
        else:
            parts += _drawn_points(trace, x, y)
    return parts


def _drawn_bars(
    trace: Mapping[str, Any],
    x: Axis,
    y: Axis,
    place: int,
    beside: int,
    heights: dict[Any, float],
    stack: bool,
) -> list[str]:
    full = (1.0 if x.names else _width(trace)) * (
        1 if trace.get("width") else 0.8 if x.names else 0.95
    )
    unit = (x.pixels[1] - x.pixels[0]) / (x.high - x.low)
    width = full * unit / beside
    paths = []
    for at, value in zip(trace["x"], trace["y"], strict=True):
        base = heights.get(at, 0.0)
        height = base + _float(value)
        if stack:
            heights[at] = height
        left = x.at(at) - full * unit / 2 + place * width
        top, bottom = y.at(height), y.at(max(base, y.low) if y.log is False else 10**y.low)
        if math.isfinite(left) and math.isfinite(top):
            paths.append(f"M{left:.1f},{bottom:.1f}V{top:.1f}h{width:.1f}V{bottom:.1f}z")
    colour = _colour((trace.get("marker") or {}).get("color"))
    parts = [f'<path fill="{colour}" d="{"".join(paths)}"/>']
    middle = [x.at(at) - full * unit / 2 + (place + 0.5) * width for at in trace["x"]]
    return parts + _whiskers(trace, middle, y) + _labels(trace, middle, y, width)


def _labels(trace: Mapping[str, Any], at: Sequence[float], y: Axis, width: float) -> list[str]:
    """What stands above bars, where it has room."""
    texts = trace.get("text")
    if texts is None or isinstance(texts, str) or width < 30:
        return []
    tops = [_float(v) + e for v, e in zip(trace["y"], _up(trace), strict=True)]
    return [
        _text(left, y.at(top) - 4, _plain(str(text)), "middle")
        for left, top, text in zip(at, tops, texts, strict=True)
        if math.isfinite(top)
    ]


def _up(trace: Mapping[str, Any]) -> Sequence[float]:
    up = (trace.get("error_y") or {}).get("array")
    return [0.0] * len(trace["y"]) if up is None else up


def _whiskers(trace: Mapping[str, Any], at: Sequence[float], y: Axis) -> list[str]:
    whiskers = trace.get("error_y") or {}
    if whiskers.get("array") is None:
        return []
    down = whiskers.get("arrayminus")
    down = whiskers["array"] if down is None else down
    colour = _colour(whiskers.get("color") or (trace.get("marker") or {}).get("color"))
    d = "".join(
        f"M{left:.1f},{y.at(v - b):.1f}V{y.at(v + a):.1f}m-3,0h6M{left - 3:.1f},{y.at(v - b):.1f}h6"
        for left, v, a, b in zip(at, trace["y"], whiskers["array"], down, strict=True)
        if math.isfinite(left + y.at(v - b) + y.at(v + a)) and (a or b)
    )
    return [f'<path fill="none" stroke="{colour}" stroke-width="1.3" d="{d}"/>'] if d else []


def _drawn_points(trace: Mapping[str, Any], x: Axis, y: Axis) -> list[str]:
    mode = trace.get("mode") or "lines"
    line, marker = trace.get("line") or {}, trace.get("marker") or {}
    colour = _colour(line.get("color") or marker.get("color"))
    points = [(x.at(a), y.at(b)) for a, b in zip(trace["x"], trace["y"], strict=True)]
    there = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    parts = []
    d = "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in there)
    if there and trace.get("fill") == "tozeroy":
        base = y.at(max(0.0, y.low)) if not y.log else y.pixels[0]
        area = f"{d}L{there[-1][0]:.1f},{base:.1f}L{there[0][0]:.1f},{base:.1f}z"
        fill = _colour(trace.get("fillcolor") or colour)
        parts.append(f'<path fill="{fill}" fill-opacity=".45" d="{area}"/>')
    width = line.get("width", 2)
    if there and "lines" in mode and width:
        dash = DASHES.get(line.get("dash", ""), "")
        more = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(
            f'<path fill="none" stroke="{colour}" stroke-width="{width}"{more} '
            f'stroke-linejoin="round" d="{d}"/>'
        )
    if "markers" in mode:
        parts += _whiskers(trace, [p[0] for p in points], y)
        parts.append(_markers(there, {"color": line.get("color")} | marker))
    return parts


def _markers(points: Sequence[Point], marker: Mapping[str, Any]) -> str:
    """All markers as one path; those that fall on the same pixel once."""
    colour, symbol = _colour(marker.get("color")), marker.get("symbol") or "circle"
    size = marker.get("size") or 6
    size = [float(size)] * len(points) if isinstance(size, int | float) else list(size)
    shape = next((SHAPES[s] for s in SHAPES if str(symbol).startswith(s)), SHAPES["circle"])
    seen: dict[tuple[int, int], str] = {}
    for (a, b), diameter in zip(points, size, strict=False):
        r = max(1.0, 0.38 * diameter)
        numbers = (f"{v:.3g}" for v in (-r, -2 * r, 2 * r, r))
        seen[round(a), round(b)] = f"M{a:.1f},{b:.1f}" + shape.format(*numbers)
    open_ = str(symbol).startswith(("cross", "x"))
    look = f'fill="none" stroke="{colour}" stroke-width="1.6"' if open_ else f'fill="{colour}"'
    return f'<path {look} opacity="{marker.get("opacity") or 1}" d="{"".join(seen.values())}"/>'


def _ticks(
    x_axis: Mapping[str, Any],
    x: Axis,
    y_axis: Mapping[str, Any],
    y: Axis,
    slanted: bool,
    multiple: bool,
) -> list[str]:
    """Grid, numbers, the axes and what they are called."""
    (left, right), (bottom, top) = x.pixels, y.pixels
    parts = []
    for value, label in _marks(y_axis, y, 3 if multiple else 5):
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{left:.1f},{at:.1f}H{right:.1f}"/>')
        parts.append(_text(left - 5, at + 4, label, "end"))
    last = -math.inf
    for value, label in _marks(x_axis, x, 3 if multiple else 6):
        at = x.at(value)
        if slanted and x.names:
            if at - last >= 9:
                parts.append(
                    _text(at + 4, bottom + 13, label, "end", small=at - last < 13, turn=-35)
                )
                last = at
        elif at - 3.2 * len(label) >= last:
            parts.append(_text(at, bottom + 15, label, "middle"))
            last = at + 3.2 * len(label) + 4
    parts.append(f'<path class="axis" d="M{left:.1f},{top:.1f}V{bottom:.1f}H{right:.1f}"/>')
    for axis, place in ((x_axis, "x"), (y_axis, "y")):
        title = _plain((axis.get("title") or {}).get("text") or "")
        if title and place == "x":
            below = bottom + 34 + _slant(x.names) * slanted
            parts.append(_text((left + right) / 2, below, title, "middle", soft=True))
        elif title:
            parts.append(_text(13, (top + bottom) / 2, title, "middle", soft=True, turn=-90))
    return parts


def _marks(axis: Mapping[str, Any], scale: Axis, n: int) -> list[tuple[Any, str]]:
    """Values along an axis that have a label, and the labels."""
    if scale.names:
        return [(name, _plain(name)) for name in scale.names]
    form = _form(axis.get("tickformat"))
    if axis.get("tickvals") is not None:
        values = [float(v) for v in axis["tickvals"]]
        texts = axis.get("ticktext")
        labels = [form(v) for v in values] if texts is None else [_plain(str(t)) for t in texts]
    elif scale.log:
        powers = range(math.ceil(scale.low), math.floor(scale.high) + 1)
        values = [10.0**p for p in powers]
        labels = ["10" + str(p).translate(SUPERSCRIPT) for p in powers]
    else:
        step = _step((scale.high - scale.low) / n)
        first = math.ceil(scale.low / step - 1e-9)
        count = math.floor(scale.high / step + 1e-9) - first
        values = [round((first + i) * step, 12) for i in range(count + 1)]
        labels = [form(v) for v in values]
    ends = sorted(scale.pixels)
    marks = zip(values, labels, strict=True)
    return [(v, label) for v, label in marks if ends[0] - 1 <= scale.at(v) <= ends[1] + 1]


def _form(wanted: str | None) -> Callable[[float], str]:
    if wanted and wanted.endswith("%"):
        return ("{:" + wanted.lstrip(",") + "}").format
    return lambda v: f"{v:,.0f}" if abs(v) >= 1000 else f"{v:g}"


def _step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def _lines(layout: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Straight lines across the panel of an axis."""
    return [
        s
        for s in layout.get("shapes") or ()
        if s.get("type") == "line" and (s.get("xref") or "x").split()[0] == name
    ]


def _line(shape: Mapping[str, Any], x: Axis, y: Axis) -> str:
    look = shape.get("line") or {}
    if shape["x0"] == shape["x1"]:
        at = x.at(shape["x0"])
        d = f"M{at:.1f},{y.pixels[0]:.1f}V{y.pixels[1]:.1f}"
    else:
        at = y.at(shape["y0"])
        d = f"M{x.pixels[0]:.1f},{at:.1f}H{x.pixels[1]:.1f}"
    dash = DASHES.get(look.get("dash", ""), "none")
    colour = _colour(look.get("color"))
    return f'<path stroke="{colour}" stroke-width="1.4" stroke-dasharray="{dash}" d="{d}"/>'


def _notes(
    layout: Mapping[str, Any],
    box: tuple[float, float, float, float],
    panels: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[str]:
    """Annotations placed by shares of the drawing: titles of panels, and of shared axes."""
    left, top, right, bottom = box
    parts = []
    for note in layout.get("annotations") or ():
        if note.get("xref") != "paper" or note.get("yref") != "paper":
            continue
        lines = re.split(r"<br>", note.get("text") or "")
        x = left + note["x"] * (right - left) - (14 if len(panels) > 1 and note["x"] < 1 else 0)
        y = bottom - note["y"] * (bottom - top)
        if note.get("textangle"):
            parts.append(_text(13, y, _plain(lines[0]), "middle", soft=True, turn=-90))
        elif note["y"] == 0:
            parts.append(_text(x, y + 34, _plain(lines[0]), "middle", soft=True))
        else:
            for i, line in enumerate(lines):
                up = y - 6 - LINE * 0.8 * (len(lines) - 1 - i)
                parts.append(_text(x, up, _plain(line), "middle", small=len(panels) > 1))
    return parts


def _legend(traces: Sequence[Mapping[str, Any]], width: int, top: float) -> tuple[list[str], int]:
    """Keys below the drawing, and the lines that they take."""
    parts, left, row = [], 8.0, 0
    for trace in traces:
        name = _plain(str(trace["name"]))
        needed = 20 + 6.3 * len(name)
        if left > 8 and left + needed > width - 8:
            left, row = 8.0, row + 1
        look = (trace.get("marker") or {}).get("color") or (trace.get("line") or {}).get("color")
        colour = _colour(look or trace.get("fillcolor"))
        y = top + row * LINE
        parts.append(f'<path fill="{colour}" d="M{left:.1f},{y:.1f}h10v-9h-10z"/>')
        parts.append(_text(left + 14, y, name, "start"))
        left += needed + 10
    return parts, row + 1 if parts else 0


def _slanted(panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """Room that slanted names of categories need; 0 where they fit side by side."""
    names = list(
        dict.fromkeys(
            v for own in panels.values() for t in own for v in t["x"] if isinstance(v, str)
        )
    )
    fits = sum(6.5 * len(name) + 10 for name in names) < WIDTH - LEFT - RIGHT
    return 0 if fits else _slant(names)


def _slant(names: Sequence[str]) -> int:
    return int(3.6 * max((len(_plain(n)) for n in names), default=0))


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str,
    bold: bool = False,
    soft: bool = False,
    small: bool = False,
    turn: int = 0,
) -> str:
    more = ' class="soft"' if soft else ""
    more += ' font-weight="600"' if bold else ""
    more += ' style="font-size:9px"' if small else ""
    more += f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{anchored}{more}>{escape(text)}</text>'


def _plain(text: str) -> str:
    """Words of a figure without their mark-up."""
    text = re.sub(r"<sup>(.*?)</sup>", lambda m: m[1].translate(SUPERSCRIPT), text)
    return unescape(re.sub(r"</?[a-z]+/?>", " ", text)).strip()


def _wrapped(text: str, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _colour(colour: Any) -> str:
    return "#888" if not isinstance(colour, str) or DARK.match(colour) else escape(colour)


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
