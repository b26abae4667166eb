"""What is printed for people: names and texts of others, as they are."""

import re
from pathlib import Path

import pytest
from rich.table import Table

from kanllama_lightning.console.terminal import terminal

ROOT = Path(__file__).resolve().parents[1]


def test_names_and_texts_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder may be called `[/x]`, which ends a command where it is taken for markup."""
    shown = Table("run [/x]", title="of [bold]")
    shown.add_row(":cat: [red]")
    terminal(80).print(shown)
    terminal().print("Written: [/x]")
    said = capsys.readouterr().out
    for text in ("run [/x]", "of [bold]", ":cat: [red]", "Written: [/x]"):
        assert text in said


def test_nothing_else_prints_tables() -> None:
    sources = [*(ROOT / "kanllama_lightning").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]
    own = [path.name for path in sources if re.search(r"\bConsole\(", path.read_text())]
    assert set(own) == {"terminal.py"}
