"""Figures as people read them in a table: short, with their interval, or said to mean nothing."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from kanllama_lightning.measures.metrics import NOT_MEANINGFUL, NOT_MEANINGFUL_WHY, meaningful

SHARE = "delta CE / mean ablation"
"""Heading of `delta_ce_share`."""


def fine(value: float, sign: str = "") -> str:
    """Four decimals, six for what is small."""
    return f"{value:{sign}.{4 if abs(value) >= 0.01 else 6}f}"


def plain(values: Mapping[str, Any], key: str, form: str) -> str:
    """A figure; "" if unknown."""
    value = values.get(key)
    return "" if value is None else form.format(value)


def delta_ce(values: Mapping[str, Any]) -> str:
    """`delta_ce` in nats per token with its 95 % interval, where there is one; "" if unknown."""
    if values.get("delta_ce") is None:
        return ""
    ends = [values.get(f"delta_ce_{end}") for end in ("low", "high")]
    known = [fine(end) for end in ends if end is not None and math.isfinite(end)]
    return fine(values["delta_ce"]) + (f" ({' to '.join(known)})" if len(known) == 2 else "")


def share(values: Mapping[str, Any], key: str = "delta_ce_share", form: str = "{:.2%}") -> str:
    """A share of what an ablation costs; said to mean nothing where it does; "" if unknown.

    Args:
        values: With `key`, `fvu` and `delta_ce` of one head on one set.
        key: Which share.
        form: How it is written.
    """
    if values.get("delta_ce") is None:
        return ""
    value = values.get(key)
    return form.format(value) if meaningful(value, values.get("fvu")) else NOT_MEANINGFUL


def footnote(cells: Iterable[str]) -> str:
    """Why a cell says that it means nothing; "" if none does."""
    return NOT_MEANINGFUL_WHY + "." if NOT_MEANINGFUL in set(cells) else ""
