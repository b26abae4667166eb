"""Says at the end how the cases of every area ended."""

from typing import Any

from tests.fuzz.harness import COUNTS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not COUNTS:
        return
    terminalreporter.write_sep("-", "fuzz: cases by area and how they ended")
    for name, counts in COUNTS.items():
        said = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
        terminalreporter.write_line(f"{name:24} {counts.total():5}: {said}")
    total = sum(counts.total() for counts in COUNTS.values())
    terminalreporter.write_line(f"{'all':24} {total:5}")
