"""Tables and lines for the person at the terminal."""

from rich.console import Console


def terminal(width: int | None = None, highlight: bool = True) -> Console:
    """Where they are printed: names and texts are shown as they are, `[/x]` and `:cat:` too.

    Args:
        width: In letters; None for that of the window.
        highlight: Whether numbers and paths have colours.
    """
    return Console(width=width, highlight=highlight, markup=False, emoji=False)
