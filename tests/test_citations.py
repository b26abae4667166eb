"""What comments and documents refer to is there: sections of docs/methods.md, entries, files."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"runs", "wandb", "build", "dist", "__pycache__"}
"""Folders of what was made here; those that begin with a dot are skipped too."""
CITING = (".py", ".yaml", ".toml", ".md", ".txt")
SOURCES = (".py", ".md", ".toml", ".txt", ".svg", ".png")
"""Endings of names that can only be of the project's own files; a run leaves others."""
DOCUMENTS = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

SECTION = r"(?:0(?:\.\d)?|[A-F](?:\d[a-d]?(?: (?:0|i{1,3}))?)?)(?![\w.]*\w)"
"""Name of a section: 0, 0.4, A, A3, B3c, B5 iii."""
CITED = re.compile(rf"\bMETHODS\b(?:\s+({SECTION}(?:(?:,| and)\s+{SECTION})*))?")
HEADING = re.compile(rf"^#{{2,4}} ({SECTION})\. \S", re.MULTILINE)
ELSEWHERE = re.compile(r"\b(?!METHODS\b)[A-Z]{4,}(?:\.md\b|\s+[A-H] ?\d+[a-d]?\b)")
"""A document in capitals, by its file or by a section like ours."""
ENTRY = re.compile(r'LOG\.md,\s+"([^"]+)"')


def files() -> Iterator[Path]:
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in SKIPPED and not f.startswith(".")]
        folders[:] = [f for f in folders if not f.endswith(".egg-info")]
        yield from (Path(folder, name) for name in names)


FILES = sorted(files())
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in FILES
    if path.suffix in CITING and path != Path(__file__)
}
PATHS = [f"/{path.relative_to(ROOT).as_posix()}" for path in FILES]
METHODS = TEXTS["docs/methods.md"]


def citations(text: str) -> list[str | None]:
    """Sections that a text cites; None for a mention that names none."""
    found: list[str | None] = []
    for match in CITED.finditer(text):
        found += re.split(r"(?:,| and)\s+", match[1]) if match[1] else [None]
    return found


def headings(text: str) -> list[str]:
    return HEADING.findall(text)


def elsewhere(text: str) -> list[str]:
    """References to documents in capitals that are not in the repository."""
    found = [match[0] for match in ELSEWHERE.finditer(text)]
    return [name for name in found if not (ROOT / name).is_file()]


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def named(text: str) -> list[str]:
    """Files and folders of the project that a document names in backticks or in code."""
    words = re.sub(r"[`\"',;()]", " ", " ".join(code(text))).split()
    return [word.split("#")[0].rstrip(":") for word in words if looks_ours(word)]


def code(text: str) -> list[str]:
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return blocks + re.findall(r"`([^`]+)`", rest)


def looks_ours(word: str) -> bool:
    if re.search(r"[<>*={}$|\\]|://|^[-/~.]|[A-Z]{3,}/", word) or word.startswith("runs/"):
        return False
    first, *more = word.split("/")
    if more and (ROOT / first).is_dir():
        return True
    return word.endswith(SOURCES)


def exists(name: str) -> bool:
    """Whether a file, or folder, is there by this name or by the end of its path."""
    end = f"/{name.rstrip('/')}"
    return any(path.endswith(end) or f"{end}/" in path for path in PATHS)


def links(text: str) -> list[str]:
    """Relative targets of links and images, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


def test_there_is_something_to_check() -> None:
    cited = [section for text in TEXTS.values() for section in citations(text)]
    assert len(cited) > 50
    assert len(headings(METHODS)) > 20
    assert sum(len(named(doc.read_text())) for doc in DOCUMENTS) > 50
    assert len(ENTRY.findall(METHODS)) > 5


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if "METHODS" in text])
def test_cited_sections_exist(name: str) -> None:
    known = set(headings(METHODS))
    missing = [section for section in citations(TEXTS[name]) if section not in known]
    assert not missing, f"{name}: no such section in docs/methods.md (None: none is named)"


def test_sections_have_one_name_each() -> None:
    names = headings(METHODS)
    assert len(names) == len(set(names))
    assert len(names) == len(re.findall(r"^#{2,} ", METHODS, re.MULTILINE)), "an unnamed one"


def test_sections_name_only_sections() -> None:
    """In docs/methods.md itself, where their names stand in parentheses."""
    known = set(headings(METHODS))
    for inside in re.findall(rf"\(({SECTION}(?:, {SECTION})*)\)", METHODS):
        assert set(inside.split(", ")) <= known, inside


def test_cited_entries_of_the_log_exist() -> None:
    log = TEXTS["LOG.md"]
    titles = {t.strip() for t in re.findall(r"^## \d{4}-\d\d-\d\d (.+)$", log, re.MULTILINE)}
    for name, text in TEXTS.items():
        for title in ENTRY.findall(text):
            assert unwrapped(title) in titles, name


def test_no_document_is_cited_that_is_not_here() -> None:
    found = {name: elsewhere(text) for name, text in TEXTS.items()}
    assert not {name: some for name, some in found.items() if some}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    broken = [t for t in links(text) if not (document.parent / t).exists()]
    assert not broken
    missing = [name for name in named(text) if not exists(name)]
    assert not missing


def test_the_finder_finds() -> None:
    """On made-up text, so that the tests above can fail."""
    made_up = """(METHODS B3c, B5 iii) METHODS A0, rule; METHODS 0.5; METHODS
    A1, A2 and A5. METHODS writes. METHODS A12, METHODS 0. METHODS H5"""
    wanted = ["B3c", "B5 iii", "A0", "0.5", "A1", "A2", "A5", None, None, "0", None]
    assert citations(made_up) == wanted
    assert headings("# A1. No\n## A1. Yes\n#### B5 iii. Yes, too\n## Words\n") == ["A1", "B5 iii"]
    assert elsewhere("see FIELD.md, STYLE B2, README.md, METHODS A1") == ["FIELD.md", "STYLE B2"]
    text = "`nowhere.py`, [here](README.md#a), [web](https://a.b), `python train.py fit --run x`"
    assert links(text) == ["README.md"]
    assert named(text) == ["nowhere.py", "train.py"]
    assert [exists(n) for n in ("nowhere.py", "train.py", "heads/kan.py", "docs/", "cs/")] == [
        *(False, True, True, True, False)
    ]
    assert ENTRY.findall('LOG.md,\n"A b?"') == ["A b?"]
