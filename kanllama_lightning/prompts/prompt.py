"""What a prompt is."""

from typing import NamedTuple


class Prompt(NamedTuple):
    """A text and how it goes on."""

    category: str
    prompt: str
    answer: str
    """Directly after the prompt: with the blank before it, where there is one."""
