"""The text of many windows, each token once: pieces of text, and stretches of them."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from kanllama_lightning.lm.token_text import pieces
from kanllama_lightning.measures.contexts import Contexts

LEAD = 4
"""Tokens read before a stretch, so that a character it begins inside of is told as one."""


class Pool:
    """Stretches of the rows that any window lies in, one behind the other.

    Args:
        tokenizer: That made the ids.
        contexts: Where the windows are from.
        rows: Row of every window, [n].
        starts: Position at which each begins.
        lengths: Tokens of each.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Contexts,
        rows: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        self._span = contexts.row_length
        first = rows.astype(np.int64) * self._span + starts
        self._begins, ends = _joined(first, first + lengths)
        self._offsets = np.concatenate([[0], np.cumsum(ends - self._begins)])
        table: dict[str, int] = {}
        pool = []
        for begin, end in zip(self._begins.tolist(), ends.tolist(), strict=True):
            row, at = divmod(begin, self._span)
            lead = min(LEAD, at)
            ids = contexts.row_ids(row, at + end - begin)[at - lead :].tolist()
            pool += [table.setdefault(text, len(table)) for text in pieces(tokenizer, ids)[lead:]]
        self.texts = list(table)
        """Every piece of text, once."""
        self.tokens = np.asarray(pool, dtype=np.int32)
        """Which of them each token of the pool is."""

    def at(self, row: int, start: int) -> int:
        """Where the token at a position of a row is in the pool."""
        place = row * self._span + start
        stretch = int(np.searchsorted(self._begins, place, side="right")) - 1
        return int(self._offsets[stretch]) + place - int(self._begins[stretch])


def _joined(begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stretches that overlap or touch, as one; ascending."""
    if not len(begins):
        return begins, ends
    order = np.argsort(begins, kind="stable")
    begins, ends = begins[order], np.maximum.accumulate(ends[order])
    new = np.concatenate([[True], begins[1:] > ends[:-1]])
    last = np.concatenate([new[1:], [True]])
    return begins[new], ends[last]
