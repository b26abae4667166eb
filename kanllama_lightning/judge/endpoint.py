"""Where a judge is asked, and with what right; neither key nor password is ever shown."""

import base64
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit, urlunsplit

import openai

from kanllama_lightning.console.secrets import Secrets, known
from kanllama_lightning.types import InputError

OFFICIAL = "https://api.openai.com/v1"
CHATTY = ("httpx2", "httpx", "httpcore2", "httpcore", "openai")
"""Loggers of the libraries below, which write whole addresses."""


class Endpoint:
    """The server that answers, its key taken from the environment.

    Args:
        base_url: Address, such as http://localhost:8000/v1; None for OPENAI_BASE_URL, and without
            that OpenAI. User, password and query are used and never shown.
        argument: What to call it in an error.

    Raises:
        InputError: It is no address, or OpenAI is meant and there is no OPENAI_API_KEY.
    """

    def __init__(self, base_url: str | None, argument: str) -> None:
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        parts = _parts(base_url, argument)
        self.shown = _shown(parts)
        """Scheme, host and path: all of the address that is ever written down."""
        self._query = dict(parse_qsl(parts.query))
        self._user = None
        if parts.username is not None:
            self._user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        if parts.hostname == urlsplit(OFFICIAL).hostname and not self._key:
            raise InputError(
                f"{argument}={self.shown!r}: needs a key, but OPENAI_API_KEY is not set; set it in "
                "the environment, give the address of a local server, or see the prompts with "
                "--interpretability.dry_run true"
            )
        self._secrets = Secrets()
        for secrets in (self._secrets, known):  # of this server; and of all that is written or said
            secrets.add(self._key)
            secrets.add_address(parts.geturl())

    def client(
        self, timeout: float, retries: int, before: Callable[..., Any], after: Callable[..., Any]
    ) -> openai.AsyncOpenAI:
        """A client that waits before each repetition, as long as the server asks.

        A server that says nothing may still be at work: such a call is not repeated here.

        Args:
            timeout: Seconds without a byte.
            retries: Repetitions of a call.
            before: Called with each request before it goes out.
            after: Called with each response, before its body is read.
        """
        headers = {}
        if self._user is not None:
            word = base64.b64encode(self._user.encode()).decode()
            headers["Authorization"] = f"Basic {word}"
        return openai.AsyncOpenAI(
            base_url=self.shown,
            api_key=self._key or "none",
            max_retries=retries,
            timeout=timeout,
            default_query=self._query or None,
            default_headers=headers or None,
            http_client=_Client(event_hooks={"request": [before], "response": [after]}),
        )

    def scrubbed(self, reply: Any) -> Any:
        """What a server says, text or plain values, without secrets that it repeats."""
        return known.scrubbed_tree(self._secrets.scrubbed_tree(reply))


class _Client(openai.DefaultAsyncHttpxClient):
    """Tells of silence in a way that the client above it hands on at once."""

    async def send(self, request: Any, **how: Any) -> Any:
        try:
            return await super().send(request, **how)
        except Exception as e:
            if type(e).__name__ == "ReadTimeout":
                raise openai.APITimeoutError(request) from e
            raise


def shown_address(base_url: str | None) -> str:
    """The server that is meant, without user, password and query."""
    return _shown(_parts(base_url, "base_url"))


def _parts(base_url: str | None, argument: str) -> SplitResult:
    given = base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL
    try:
        parts = urlsplit(given.strip())
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise InputError(
            f"{argument}: is no address (not shown, as it may hold a password); must be like "
            "http://localhost:8000/v1"
        ) from None
    return parts


def _shown(parts: SplitResult) -> str:
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else str(parts.hostname)
    place = host if parts.port is None else f"{host}:{parts.port}"
    return urlunsplit((parts.scheme, place, parts.path, "", ""))


@contextmanager
def discreet() -> Iterator[None]:
    """Keeps the libraries below from logging addresses and headers."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
