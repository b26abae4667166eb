"""Tokens as text fit for people, on a terminal and on a page."""

import re
from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import cache
from typing import Any


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token, raw; part of a character goes by its bytes, such as `<0xF0>`."""
    if token >= len(tokenizer):
        return f"<id {token}>"
    name: str = tokenizer.convert_ids_to_tokens(token) or ""
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "�" in text and set(name) <= set(_byte_of()) and not name.startswith("<0x"):
        return "".join(f"<0x{_byte_of()[c]:02X}>" for c in name)
    if not text or "�" in text:
        return name.replace("▁", " ") or f"<id {token}>"
    # SentencePiece drops the blank before the first word of what it decodes
    blanks = len(name) - len(name.lstrip("▁"))
    return " " * blanks + text.lstrip(" ") if blanks else text


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    r"""The text that each token adds, raw; together the text of all of them.

    A character of several tokens belongs to the last of them, the others add "". Bytes that are
    no text, such as half a character at the start of the ids, are written as `\x9f`.
    """
    decoder = getincrementaldecoder("utf-8")("backslashreplace")
    last = len(ids) - 1
    return [decoder.decode(_token_bytes(tokenizer, i), n == last) for n, i in enumerate(ids)]


def _token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token writes, alone perhaps no valid text."""
    text = token_text(tokenizer, token)
    if re.fullmatch(r"(<0x[0-9A-F]{2}>)+", text):
        return bytes(int(byte, 16) for byte in re.findall(r"<0x(..)>", text))
    return text.encode("utf-8", "backslashreplace")


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's convention)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in own]
    return {chr(b): b for b in own} | {chr(0x100 + i): b for i, b in enumerate(others)}


def visible(text: str) -> str:
    r"""The text on one line, with what a terminal or a reader would stumble over as `\n`, `\x1b`.

    Control characters, marks of direction, and blanks other than the common one.
    """
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def quoted(text: str) -> str:
    """`visible`, in quotation marks, so that blanks at its ends show."""
    return '"' + visible(text).replace('"', '\\"') + '"'
