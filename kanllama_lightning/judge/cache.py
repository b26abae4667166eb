"""What a judge said, on the disk: a file per reply, and what the server cannot be asked for."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kanllama_lightning.files import write_text

log = logging.getLogger(__name__)

REFUSED = "refused_parameters.json"


class Cache:
    """Replies by question; written whole, so that a stopped run goes on where it was.

    Args:
        folder: Made when the first reply is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def key(about: Mapping[str, Any]) -> str:
        """SHA-256 of everything a reply depends on."""
        text = json.dumps(about, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, key: str) -> dict[str, Any] | None:
        """A reply; None if it is not there, or its file is damaged."""
        path = self.folder / f"{key}.json"
        if not path.is_file():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            reply: dict[str, Any] = kept["reply"]
            if kept["key"] != key or not isinstance(reply, dict):
                raise ValueError("is of another question")
        except (ValueError, KeyError, TypeError, RecursionError, OSError) as e:
            log.warning("%s: is damaged (%s); asking again", path, type(e).__name__)
            return None
        return reply

    def write(self, key: str, request: Mapping[str, Any], reply: Mapping[str, Any]) -> None:
        """Keep a reply."""
        self._put(f"{key}.json", {"key": key, "request": request, "reply": reply})

    def refused(self, server: str, model: str) -> set[str]:
        """What a server does not take for a model."""
        return set(self._refused().get(f"{server} {model}", []))

    def refuse(self, server: str, model: str, names: Iterable[str]) -> None:
        """Remember it."""
        self._put(REFUSED, self._refused() | {f"{server} {model}": sorted(names)})

    def _refused(self) -> dict[str, list[str]]:
        path = self.folder / REFUSED
        if not path.is_file():
            return {}
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            return {}
        return known if isinstance(known, dict) else {}

    def _put(self, name: str, values: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / name, json.dumps(values, indent=1))
