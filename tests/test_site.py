"""The site of docs/ (`make docs`): it builds without a warning or network, its links lead on."""

import ast
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

ROOT = Path(__file__).resolve().parents[1]
MESSAGES = ROOT / "docs" / "messages.md"
SOURCES = [*(ROOT / "kanllama_lightning").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]


class Page(HTMLParser):
    """What a page of HTML names itself, links to, and loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.names |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a":
            self.links += [given["href"]] if "href" in given else []
        elif given.get("rel") != "canonical":
            self.loads += [given[name] for name in ("src", "href") if name in given]


def elsewhere(target: str) -> bool:
    return re.match(r"(?:[a-z]+:)?//|mailto:", target) is not None


def broken(site: Path) -> list[str]:
    """What is wrong with pages: links to nowhere, loads from elsewhere, Markdown that is left."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        prose = re.sub("<pre>.*?</pre>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        raw = re.findall(r"^(?:- |\d\. |\|).*", prose, re.MULTILINE)  # no list, no table after all
        found += [f"{path.name} shows {line}" for line in raw]
        found += [f"{path.name} loads {t}" for t in page.loads if elsewhere(t)]
        for target in page.links + page.loads:
            if elsewhere(target) or target.startswith("data:"):
                continue
            file, anchor = urldefrag(unquote(target))
            there = (path.parent / file).resolve() if file else path
            if there.is_dir():
                there /= "index.html"
            known = pages[there].names if there in pages else None
            if not there.exists() or (anchor and known is not None and anchor not in known):
                found.append(f"{path.name}: {target}")
    return found


def test_the_site_builds_and_its_links_lead_on(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    shown = {path.name for path in site.glob("*.html")}
    own = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert shown == own | {"index.html", "log.html", "changelog.html", "contributing.html"}
    assert broken(site) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    """On made-up pages, so that the test above can fail."""
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="#x"><a href="b.html#y"><a href="#z"><a href="c.html">'
        '<a href="https://a.b"><img src="d.png"><script src="//e.f/g.js"></script>\n- a list'
    )
    (tmp_path / "b.html").write_text('<a name="y"></a><a href="a.html#q">')
    assert sorted(broken(tmp_path)) == [
        "a.html loads //e.f/g.js",
        "a.html shows - a list",
        *("a.html: #z", "a.html: c.html", "a.html: d.png", "b.html: a.html#q"),
    ]


def said(tree: ast.AST) -> list[str]:
    """All texts of a module; what is put into them is an ellipsis."""
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
            texts.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(re.sub(r"%[.\d]*[a-z]", "…", node.value).replace("%%", "%"))
    return texts


def test_messages_are_those_of_the_code() -> None:
    texts = [text for path in SOURCES for text in said(ast.parse(path.read_text()))]
    quoted = re.findall(r"^\| `([^`]+)` \|", MESSAGES.read_text(), re.MULTILINE)
    assert len(quoted) > 30
    for message in quoted:
        wanted = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
        assert any(wanted.search(text) for text in texts), message


def test_the_figure_of_the_answer_is_drawn_from_its_table() -> None:
    draw = runpy.run_path(str(ROOT / "docs/draw_answer.py"))
    page = (ROOT / "docs/answer.md").read_text()
    points = draw["read"](page)
    heads = page.split("## The figures")[1].split("\n## ")[0]
    assert len(points) == heads.count("\n| `")  # no row is left out
    drawn = (ROOT / "docs/answer.svg").read_text()
    assert draw["draw"](points) == drawn, "python docs/draw_answer.py draws it anew"
