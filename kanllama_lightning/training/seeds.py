"""The number from which everything random of a run follows."""

import argparse
from typing import Any


class NoSeed(argparse.ArgumentTypeError, ValueError):
    """No seed; said in full on the command line, where argparse hides another ValueError's text."""


def seed_number(value: Any) -> int:
    """`--seed_everything`: a number, from which everything random of a run follows."""
    text = str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or int(text) >= 1 << 32:
        raise NoSeed(f"seed_everything={value!r}: must be a whole number from 0 to {(1 << 32) - 1}")
    return int(text)
