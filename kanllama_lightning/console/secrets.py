"""What is nobody else's business: keys, and what an address holds beside its place.

They are found in the environment, on the command line and in the files that it names, and looked
for, in every form in which they are usually written, in all that this program writes or says.
"""

import base64
import contextlib
import html
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

import markupsafe

SHORTEST = 4
"""Letters from which on a secret is looked for by itself."""
LONG = 8
"""Letters from which on it is looked for inside of words too."""
WORDS = {"true", "false", "none", "null", "auto", "main", "user", "json", "http", "https"}
"""Too common to be looked for, whatever they are the value of."""
MARK = "[secret]"
NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
"""Names of environment variables that hold secrets."""
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>\\]+")


class Secrets:
    """Secrets that are known, and texts without them."""

    def __init__(self) -> None:
        self._patterns: dict[str, str] = {}
        """Regular expressions of what is looked for, and what is put in its place."""
        self._compiled: re.Pattern[str] | None = None
        self._known: list[str] = []

    def add(self, secret: str) -> None:
        """Look for a secret from now on, and for its encoded forms."""
        if len(secret) < SHORTEST or secret.lower() in WORDS:
            return
        for form in _forms(secret):
            edge = "" if len(form) >= LONG else r"(?<![A-Za-z0-9]){}(?![A-Za-z0-9])"
            pattern = re.escape(form)
            self._patterns[edge.format(pattern) if edge else pattern] = MARK
        self._compiled = None

    def add_address(self, address: str) -> None:
        """Look for user, password and query of an address, if it has any."""
        try:
            parts = urlsplit(address)
        except ValueError:
            return
        if not parts.scheme or not parts.netloc:
            return
        user, password = parts.username, parts.password
        if user is not None:
            userinfo = parts.netloc.rpartition("@")[0]
            plain = f"{unquote(user)}:{unquote(password or '')}"
            for joint in (userinfo, plain):
                self._joint(joint)
            if password:
                self.add(password)
                self.add(unquote(password))
            if not password or len(unquote(user)) >= LONG:
                self.add(user)
                self.add(unquote(user))
        if parts.query:
            self._joint(parts.query)
            for piece in re.split("[&;]", parts.query):
                self.add(piece.partition("=")[2] or piece)
            for _, value in parse_qsl(parts.query):
                self.add(value)

    def _joint(self, text: str) -> None:
        """What is one in an address, however short its parts are."""
        if len(text) >= SHORTEST:
            for form in _forms(text):
                self._patterns[re.escape(form)] = MARK
            self._compiled = None

    def add_all_in(self, text: str) -> None:
        """Look for what the addresses hold that a text has."""
        for address in ADDRESS.findall(text):
            self.add_address(address)

    def scrubbed(self, text: str) -> str:
        """The text, with a mark in the place of every secret."""
        if not self._patterns:
            return text
        if self._compiled is None:
            longest_first = sorted(self._patterns, key=len, reverse=True)
            self._compiled = re.compile("|".join(longest_first))
        return self._compiled.sub(MARK, text)

    def scrubbed_tree(self, values: Any) -> Any:
        """Plain values, lists and mappings, with all texts in them scrubbed, keys too."""
        if isinstance(values, str):
            return self.scrubbed(values)
        if isinstance(values, Mapping):
            return {self.scrubbed_tree(k): self.scrubbed_tree(v) for k, v in values.items()}
        if isinstance(values, list | tuple):
            return [self.scrubbed_tree(value) for value in values]
        return values


def _forms(secret: str) -> set[str]:
    """A secret as it may be written: plain, in an address, in JSON, in HTML, in base64."""
    raw = secret.encode("utf-8", "surrogatepass")
    in_json = json.dumps(secret)[1:-1]
    forms = {
        secret,
        quote(raw, safe=""),
        quote(raw),
        quote_plus(raw),
        in_json,
        json.dumps(in_json)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        html.escape(secret),
        html.escape(secret, quote=False),
        str(markupsafe.escape(secret)),
        repr(secret)[1:-1],
    }
    forms |= {re.sub("%[0-9A-F]{2}", lambda m: m[0].lower(), form) for form in forms}
    if len(raw) >= SHORTEST:
        forms |= {encode(raw).decode().rstrip("=") for encode in _BASE64}
    return forms


_BASE64 = (base64.b64encode, base64.urlsafe_b64encode)

known = Secrets()
"""The secrets of this process."""


def learn(arguments: Sequence[str]) -> None:
    """Take in the secrets of the environment, the command line, and the files that it names.

    Those of an earlier command of this process are forgotten.
    """
    known.__init__()  # type: ignore[misc]
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value.strip()) >= LONG:
            known.add(value.strip())
        elif "://" in value:
            known.add_all_in(value)
    for argument in arguments:
        known.add_all_in(argument)
        file = Path(argument.partition("=")[2] if argument.startswith("--") else argument)
        if file.suffix in (".yaml", ".yml") and file.is_file():
            with contextlib.suppress(OSError, UnicodeDecodeError, ValueError):
                known.add_all_in(file.read_text())


def scrubbed(text: str) -> str:
    """The text without the secrets that this process knows."""
    return known.scrubbed(text)


@contextlib.contextmanager
def discreet_arguments() -> Iterator[None]:
    """The command line without secrets, while a library records it."""
    own = sys.argv
    sys.argv = [scrubbed(argument) for argument in own]
    try:
        yield
    finally:
        sys.argv = own


class Discreet(logging.Filter):
    """Takes secrets out of log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record passes, scrubbed."""
        said = record.getMessage()
        clean = scrubbed(said)
        if clean != said:
            record.msg, record.args = clean, ()
        if record.exc_info:
            trace = record.exc_text or logging.Formatter().formatException(record.exc_info)
            record.exc_text = scrubbed(trace)
        return True


def show_discreetly(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A traceback without secrets: for `sys.excepthook`."""
    sys.stderr.write(scrubbed("".join(traceback.format_exception(kind, error, trace))))
