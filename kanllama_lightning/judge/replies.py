"""What a judge said, on the disk: a file per reply, and what the server cannot be asked for."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from kanllama_lightning.storage.files import write_text
from kanllama_lightning.storage.small_files import plain, read_json, there
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

REFUSED = "refused_parameters.json"


class KeptReply(TypedDict):
    """A file of one reply."""

    key: str
    reply: dict[str, Any]


class ReplyCache:
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
        try:
            if not there(path):
                return None
            kept = read_json(path, KeptReply, "asking again")
        except InputError as e:
            log.warning("%s", e)
            return None
        if kept["key"] != key:
            log.warning("%s: is of another question; asking again", path)
            return None
        reply: dict[str, Any] = kept["reply"]
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
        try:
            found = read_json(path, dict[str, list[str]], "found out anew") if there(path) else {}
        except InputError as e:
            log.warning("%s", e)
            found = {}
        known: dict[str, list[str]] = found
        return known

    def _put(self, name: str, values: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / name, json.dumps(plain(values), indent=1, allow_nan=False))
