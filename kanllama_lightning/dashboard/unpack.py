"""Reads a dashboard back from its file, in Python."""

import json
import re
import zlib
from base64 import b64decode
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kanllama_lightning.dashboard.contents import Latent, Window

BLOCK = re.compile(r'<script type="text/plain" id="([\w-]+)">([A-Za-z0-9+/=]*)</script>')


def blocks(html: str) -> dict[str, bytes]:
    """The data of the page, by name, inflated."""
    return {name: zlib.decompress(b64decode(text)) for name, text in BLOCK.findall(html)}


def read_dashboard(path: Path) -> dict[str, Any]:
    """What `write_dashboard` packed: the fields of the index, `texts`, `pool` and `latent(j)`.

    `columns` goes by key; `latent(j)` gives the fields of `Latent` by name, where every window also
    has `tokens`, its texts, and `values` as {place: activation}.
    """
    found = blocks(path.read_text(encoding="utf-8"))
    index = json.loads(found["index"])
    texts = json.loads(found["texts"])
    pool = np.concatenate(
        [np.zeros(0, dtype=np.int64)]
        + [_tokens(found[f"pool-{i}"], index["planes"])
           for i in range(-(-index["pool"] // index["pool_chunk"]))]
    )  # fmt: skip
    if len(pool) != index["pool"]:
        raise ValueError(f"{len(pool)} tokens, but the index says {index['pool']}")

    @cache
    def chunk(i: int) -> list[Any]:
        return json.loads(found[f"latents-{i}"])

    def window(start: int, length: int, peak: int, *flat: float) -> dict[str, Any]:
        fires = dict(zip(map(int, flat[::2]), flat[1::2], strict=True))
        tokens = [texts[i] for i in pool[start : start + length]]
        return Window(start, length, peak, [])._asdict() | {"values": fires, "tokens": tokens}

    def latent(j: int) -> dict[str, Any]:
        packed = chunk(j // index["chunk"])[j % index["chunk"]]
        fields = dict(zip(Latent._fields, packed, strict=True))
        fields["bands"] = [
            {"title": title, "windows": [window(*w) for w in windows]}
            for title, windows in fields["bands"]
        ]
        return fields

    columns = {column["key"]: column for column in index["columns"]}
    return index | {"columns": columns, "texts": texts, "pool": pool, "latent": latent}


def _tokens(raw: bytes, planes: int) -> np.ndarray:
    parts = np.frombuffer(raw, dtype=np.uint8).reshape(planes, -1).astype(np.int64)
    return (parts << (8 * np.arange(planes))[:, None]).sum(0)
