"""Pages of figures, and their drawings: right without a script, a browser or a network."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from kanllama_lightning.comparison.print_tables import latex, markdown
from kanllama_lightning.pages.plots import LIBRARY, styled, write_page
from kanllama_lightning.pages.svg import svg

NUMBER = r"(-?[\d.]+)"


def paths(drawing: str, start: str) -> list[str]:
    """The shapes that begin with some attributes."""
    root = ET.fromstring(drawing)
    made = [e for e in root.iter("{http://www.w3.org/2000/svg}path")]
    return [e.get("d", "") for e in made if start in (e.get("fill"), e.get("stroke"))]


def texts(drawing: str) -> list[str]:
    root = ET.fromstring(drawing)
    return [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text")]


def test_bars_are_as_high_as_what_they_show() -> None:
    figure = go.Figure()
    figure.add_bar(x=["a", "b"], y=np.array([1.0, 4.0]), marker={"color": "#0072B2"}, name="one")
    figure.add_bar(x=["a", "b"], y=[2.0, 3.0], marker={"color": "#D55E00"}, name="two")
    drawing = svg(styled(figure, "Title", "which", "how many"))
    heights = []
    for colour in ("#0072B2", "#D55E00"):
        d = next(d for d in paths(drawing, colour) if "V" in d)
        for left, bottom, top in re.findall(rf"M{NUMBER},{NUMBER}V{NUMBER}h", d):
            heights.append((float(left), float(bottom) - float(top)))
    unit = heights[0][1]
    # of 0.1 pixels at most, by which places are rounded
    assert [h for _, h in heights] == pytest.approx([unit, 4 * unit, 2 * unit, 3 * unit], abs=0.5)
    (a1, _), (b1, _), (a2, _), (b2, _) = heights
    assert a1 < a2 < b1 < b2, "side by side, by category"
    assert {"Title", "which", "how many", "a", "b", "one", "two"} <= set(texts(drawing))


def test_points_on_a_logarithmic_axis() -> None:
    figure = go.Figure()
    figure.add_scatter(x=[1, 2, 3, 4], y=[1.0, 10.0, 1000.0, 0.0], mode="markers",
                       marker={"color": "#009E73"}, name="points")  # fmt: skip
    figure.update_yaxes(type="log")
    (d,) = (d for d in paths(svg(styled(figure, "t", "x", "y")), "#009E73") if "a" in d)
    at = [(float(x), float(y)) for x, y in re.findall(rf"M{NUMBER},{NUMBER}m", d)]
    assert len(at) == 3, "zero has no place"
    assert at[1][0] - at[0][0] == pytest.approx(at[2][0] - at[1][0], abs=0.2)
    assert at[1][1] - at[2][1] == pytest.approx(2 * (at[0][1] - at[1][1]), abs=0.3)


def test_what_is_no_number_is_left_out() -> None:
    figure = go.Figure()
    figure.add_scatter(x=[0, 1, 2], y=[float("nan"), None, 1.0], mode="lines+markers")
    figure.add_bar(x=[0, 1], y=[float("nan"), 2.0])
    assert "nan" not in svg(styled(figure, "t", "x", "y"))
    assert "nan" not in svg(styled(go.Figure(), "nothing", "x", "y"))


def test_drawings_escape_what_they_show() -> None:
    bad = '</text><script>alert("1")</script>&'
    figure = go.Figure()
    figure.add_bar(x=[bad], y=[1], name=bad)
    drawing = svg(styled(figure, bad, bad, bad).update_layout(showlegend=True))
    root = ET.fromstring(drawing)
    assert not [e for e in root.iter() if e.tag.endswith("script")]


def test_one_library_for_all_pages_of_a_folder(tmp_path: Path) -> None:
    figure = styled(go.Figure(go.Bar(x=["<a>"], y=[1])), "</script><b>", "x", "y")
    (tmp_path / "inner").mkdir()
    write_page(tmp_path / "a.html", "A", "text", [figure], up="index.html")
    before = (tmp_path / LIBRARY).stat().st_mtime_ns
    write_page(tmp_path / "inner" / "b.html", "B", "text", [figure], tmp_path)
    assert [p.name for p in tmp_path.rglob("*.js")] == [LIBRARY]
    assert (tmp_path / LIBRARY).stat().st_mtime_ns == before
    assert (tmp_path / LIBRARY).stat().st_size < 2.2e6
    outer, inner = (tmp_path / "a.html").read_text(), (tmp_path / "inner" / "b.html").read_text()
    assert f'<script src="{LIBRARY}">' in outer
    assert f'<script src="../{LIBRARY}">' in inner
    assert 'href="index.html"' in outer
    for html in (outer, inner):
        assert html.count("<svg") == 1, "readable without the library"
        assert len(html) < 50_000
        assert 'name="viewport"' in html
        assert "Content-Security-Policy" in html
        assert html.count("</script>") == 3
        assert "<h2>&lt;/script&gt;&lt;b&gt;</h2>" in html


def test_tables_for_text() -> None:
    grid = (["run", "head", "FVU"], [["a|b_1", "<b>", "0.02\n0.01 to 0.03"]])
    assert markdown("T", grid).splitlines() == [
        "## T",
        "",
        "| run | head | FVU |",
        "| :-- | :-- | --: |",
        r"| a\|b\_1 | &lt;b&gt; | 0.02<br>0.01 to 0.03 |",
    ]
    lines = latex("5 % of $", grid).splitlines()
    assert r"\caption{5 \% of \$}" in lines
    assert r"a|b\_1 & \textless{}b\textgreater{} & 0.02 {\scriptsize [0.01 to 0.03]} \\" in lines
    assert r"\begin{tabular}{llr}" in lines
