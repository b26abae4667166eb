"""What a prompt is."""

from typing import NamedTuple


class Prompt(NamedTuple):
    """A text and how it goes on."""

    category: str
    prompt: str
    answers: tuple[str, ...]
    """Each directly after the prompt: with the blank before it, where there is one. Any of them is
    right; ranks and probabilities are of the first."""
