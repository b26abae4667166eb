"""The dashboard as one file of HTML: data packed small, read by a script beside it."""

import json
import math
import zlib
from base64 import b64encode
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kanllama_lightning.dashboard.contents import Column, Curve, Dashboard, Latent
from kanllama_lightning.lm.token_text import visible
from kanllama_lightning.pages import PAGES, policy
from kanllama_lightning.storage.files import replacing

CHUNK = 64
"""Latents of a block; the script unpacks whole blocks."""
POOL_CHUNK = 1 << 15
"""Tokens of a block."""
LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""Heights in a sparkline, a letter each; 0 only for an empty bin."""
DIGITS, CURVE_DIGITS, INDEX_DIGITS = 3, 5, 6
"""Significant digits kept of activations and the like, of curves, and of the index."""


def write_dashboard(path: Path, data: Dashboard, up: str | None = None) -> None:
    """Write the page, whole or not at all; it opens from disk and fetches nothing.

    Latents are packed and written a block at a time, as they are made.

    Args:
        path: The file.
        data: What it shows; its latents are used up.
        up: The page that leads to it; None for none.

    Raises:
        ValueError: There are not as many latents as the index has rows.
    """
    style, script = _beside("page.css"), _beside("page.js")
    by_count = _by_count(data)
    page = PAGES.get_template("dashboard.html.j2").generate(
        policy=policy(style, script),
        title=visible(data.title),
        up=up,
        style=style,
        index=_packed(_index(data)),
        script=script,
        blocks=_blocks(data, by_count),
    )
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page)


def _beside(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _blocks(data: Dashboard, by_count: np.ndarray) -> Iterator[tuple[str, str]]:
    """Names of the blocks, and what is packed in them."""
    yield "texts", _packed([data.texts[i] for i in by_count])
    renamed = np.empty(len(by_count), dtype=np.uint32)
    renamed[by_count] = np.arange(len(by_count), dtype=np.uint32)
    for i, first in enumerate(range(0, len(data.pool), POOL_CHUNK)):
        tokens = renamed[data.pool[first : first + POOL_CHUNK]]
        # the bytes of like weight together: the upper ones are mostly zero
        planes = tokens.astype("<u4").view(np.uint8).reshape(-1, 4).T[: _n_planes(data)]
        yield f"pool-{i}", _deflated(planes.tobytes())
    latents, n = iter(data.latents), 0
    while chunk := list(islice(latents, CHUNK)):
        yield f"latents-{n // CHUNK}", _packed([_latent(latent) for latent in chunk])
        n += len(chunk)
    if n != len(data.labels):
        raise ValueError(f"{n} latents, but the index has {len(data.labels)} rows")


def _packed(value: Any) -> str:
    return _deflated(json.dumps(value, separators=(",", ":"), allow_nan=False).encode())


def _deflated(raw: bytes) -> str:
    return b64encode(zlib.compress(raw, 9)).decode()


def _by_count(data: Dashboard) -> np.ndarray:
    """The pieces of text from the most frequent to the rarest, so that frequent ids are small."""
    counts = np.bincount(data.pool, minlength=len(data.texts))
    return np.argsort(-counts, kind="stable")


def _n_planes(data: Dashboard) -> int:
    """Bytes that the number of any piece of text fits into."""
    return max(1, (max(len(data.texts), 1) - 1).bit_length() + 7 >> 3)


def _index(data: Dashboard) -> dict[str, Any]:
    return {
        "title": data.title,
        "about": data.about,
        "n": len(data.labels),
        "chunk": CHUNK,
        "pool_chunk": POOL_CHUNK,
        "pool": len(data.pool),
        "planes": _n_planes(data),
        "edges": [_number(e, INDEX_DIGITS) for e in data.density_edges],
        "labels": data.labels,
        "sparklines": [_sparkline(bins) for bins in data.sparklines],
        "columns": [_column(column) for column in data.columns],
        "order": data.order,
        "start": list(data.start),
    }


def _column(column: Column) -> dict[str, Any]:
    values = [
        v if v is None or isinstance(v, str) else _number(v, INDEX_DIGITS) for v in column.values
    ]
    return column._asdict() | {"values": values}


def _sparkline(bins: Sequence[int]) -> str:
    most, top = max(bins, default=0), len(LEVELS) - 1
    return "".join(LEVELS[math.ceil(top * n / most) if n > 0 else 0] for n in bins)


def _latent(latent: Latent) -> list[Any]:
    """Its fields in order, windows as flat lists, numbers short."""
    return [
        [[band.title, [_window(*w) for w in band.windows]] for band in latent.bands],
        *(_short(v, CURVE_DIGITS if isinstance(v, Curve) else DIGITS) for v in latent[1:]),
    ]


def _window(start: int, length: int, peak: int, values: list[tuple[int, float]]) -> list[Any]:
    flat = (v for place, value in values for v in (int(place), _number(value, DIGITS)))
    return [int(start), int(length), int(peak), *flat]


def _short(value: Any, digits: int) -> Any:
    """The same with fewer digits, and lists for tuples."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list | tuple):
        return [_short(v, digits) for v in value]
    return _number(value, digits)


def _number(value: float | np.integer | np.floating, digits: int) -> float | int | None:
    """Rounded, as the shortest JSON there is; None for what is no finite number."""
    if not math.isfinite(value):
        return None
    if isinstance(value, int | np.integer):
        return int(value)
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
