"""Tables of a comparison for text: Markdown and LaTeX."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from kanllama_lightning.lm.token_text import visible

Grid = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Names of the columns and rows of cells; a cell may have several lines."""
SPECIAL = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def markdown(title: str, grid: Grid, words: int = 2) -> str:
    """A table under a heading, as Markdown.

    Args:
        title: The heading.
        grid: What is in it.
        words: Columns on the left that hold words; the others are set right.
    """
    head, rows = grid
    sides = [":--" if i < words else "--:" for i in range(len(head))]
    lines = [_row(head), f"| {' | '.join(sides)} |", *map(_row, rows)]
    return f"## {_marked_down(title)}\n\n" + "\n".join(lines) + "\n"


def points(title: str, lines: Iterable[str]) -> str:
    """A list under a heading, as Markdown; "" for an empty one."""
    said = "\n".join(f"- {_marked_down(line)}" for line in lines)
    return f"## {_marked_down(title)}\n\n{said}\n" if said else ""


def latex(caption: str, grid: Grid, words: int = 2) -> str:
    r"""A table for a paper, in LaTeX; needs `\usepackage{booktabs}`.

    Args:
        caption: What is said above it.
        grid: What is in it; the second line of a cell is set small, in brackets.
        words: Columns on the left that hold words; the others are set right.
    """
    head, rows = grid
    columns = "l" * words + "r" * (len(head) - words)
    lines = [" & ".join(map(_set, row)) + r" \\" for row in (head, *rows)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_set(caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_marked_down, cells))} |"


def _marked_down(text: str) -> str:
    """Taken literally, but for the ends of its lines."""
    lines = (escape(visible(line), quote=False) for line in text.split("\n"))
    return "<br>".join(re.sub(r"([\\`*_\[\]|])", r"\\\1", line) for line in lines)


def _set(text: str) -> str:
    """Taken literally; lines after the first small, in brackets."""
    first, *rest = ("".join(SPECIAL.get(c, c) for c in visible(s)) for s in text.split("\n"))
    return first + "".join(rf" {{\scriptsize [{line}]}}" for line in rest if line)
