"""A line of text under the LM: its ids, what a head makes of it, and tokens fit for people."""

import re
from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.heads.base import SAEHead
from kanllama_lightning.lm import FrozenLM
from kanllama_lightning.types import InputError, TokenBatch, ValidationBatch
from kanllama_lightning.view import view


def text_ids(lm: FrozenLM, text: str, argument: str) -> list[int]:
    """Token ids of a text, without BOS.

    Args:
        lm: Its tokenizer and vocabulary count.
        text: Anything.
        argument: What to call the text in an error.

    Raises:
        InputError: There is nothing in it, or something the model cannot be given.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{argument}={visible(text)!r}: is no valid Unicode ({e.reason})") from e
    made: list[int] = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not made:
        raise InputError(f"{argument}={visible(text)!r}: has no tokens; give some text")
    if max(made) >= lm.vocab_size:
        raise InputError(
            f"{argument}={visible(text)!r}: token id {max(made)}, but model {lm.name!r} knows "
            f"{lm.vocab_size} ids; use the tokenizer the model was trained with"
        )
    return made


def bos(lm: FrozenLM) -> int:
    """The id every text starts with.

    Raises:
        InputError: The tokenizer has none.
    """
    if lm.tokenizer.bos_token_id is None:
        raise InputError(
            f"lm.name={lm.name!r}: its tokenizer has no BOS token (bos_token), with which every "
            "text must start; set it in its tokenizer_config.json"
        )
    return int(lm.tokenizer.bos_token_id)


def check_length(lm: FrozenLM, text: str, n_ids: int, argument: str) -> None:
    """Refuse what does not fit.

    Raises:
        InputError: `n_ids`, BOS included, is more than the model's context.
    """
    start = visible(text[:40]) + ("..." if len(text) > 40 else "")
    lm.check_length(n_ids, f"{argument}={start!r}", "give a shorter text")


@torch.no_grad()
def seen_by(head: SAEHead, lm: FrozenLM, ids: list[int]) -> ValidationBatch:
    """One text, BOS first, as a head in evaluation mode sees it; special tokens do not count."""
    row = torch.tensor([ids], dtype=torch.int64)
    keep = ~torch.isin(row, torch.tensor(sorted(lm.tokenizer.all_special_ids)))
    tokens = TokenBatch(row, keep, torch.zeros_like(row), torch.zeros(3, dtype=torch.int64))
    tokens = tokens.to(lm.device)
    return view(lm.prefix(tokens.ids), tokens, "prompt", head)


def log_probs(logits: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n vocab"]:
    """Log-probabilities in fp64.

    Raises:
        InputError: They are not finite: a head that has diverged.
    """
    if not logits.isfinite().all():
        raise InputError(
            "head: with its reconstruction spliced in the LM's logits are not finite; the head "
            "has diverged or is damaged, evaluate an earlier checkpoint"
        )
    return logits.double().log_softmax(-1)


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
