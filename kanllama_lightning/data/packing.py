"""From documents of token ids to rows of one length."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Rows(NamedTuple):
    """Packed rows, on the CPU."""

    ids: Int[Tensor, "batch pos"]
    """int64; position 0 of every row is BOS."""
    keep: Bool[Tensor, "batch pos"]
    """True for real text, False for special tokens and padding."""
    doc: Int[Tensor, "batch pos"]
    """int64 number of the document a token belongs to; -1 for padding."""

    def pick(self, index: slice | Int[Tensor, " chosen"]) -> "Rows":
        """The rows chosen by a slice or by their numbers."""
        return Rows(self.ids[index], self.keep[index], self.doc[index])


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in order."""
    return Rows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def pack(
    docs: Sequence[Sequence[int] | np.ndarray],
    numbers: Sequence[int],
    ctx_len: int,
    bos: int,
    eos: int | None,
    special: Sequence[int],
) -> Rows:
    """Documents end to end, cut into rows of `ctx_len` tokens that all begin with BOS.

    Each document becomes BOS, its ids, EOS. A row that starts inside a document gets a BOS of its
    own in front, which belongs to that document; a row that starts with a document does not get a
    second one. What fills no row at the end is dropped, except that documents too few to fill one
    row make one, padded on the right (the LM is causal, so that the padding changes nothing).

    Args:
        docs: Token ids of each document, without BOS and EOS.
        numbers: Number of each document.
        ctx_len: Tokens per row, at least 2.
        bos: The id every row and document starts with.
        eos: The id every document ends with; None for none.
        special: Ids that are no text: their `keep` is False.
    """
    if not docs:
        empty = torch.zeros(0, ctx_len, dtype=torch.int64)
        return Rows(empty, empty.bool(), empty)
    head = np.asarray([bos])
    tail = np.asarray([] if eos is None else [eos], dtype=np.int64)
    own = [np.asarray(doc, dtype=np.int64) for doc in docs]
    ids = np.concatenate([part for doc in own for part in (head, doc, tail)])
    lengths = np.asarray([1 + len(doc) + len(tail) for doc in own])
    doc_of = np.repeat(np.asarray(numbers, dtype=np.int64), lengths)
    starts_document = np.zeros(len(ids), dtype=bool)
    starts_document[np.cumsum(lengths)[:-1]] = True
    starts_document[0] = True

    begins = []  # where in `ids` each row begins, without the BOS put before it
    at = 0
    while at < len(ids) and (end := at + ctx_len - int(not starts_document[at])) <= len(ids):
        begins.append(at)
        at = end
    if not begins:
        return _padded(ids, doc_of, ctx_len, bos, special)
    first = np.asarray(begins)[:, None]
    inserted = (~starts_document[first]).astype(np.int64)
    source = np.maximum(first, first + np.arange(ctx_len) - inserted)
    row_ids = ids[source]
    row_ids[:, 0] = bos
    return _rows(row_ids, doc_of[source], special)


def _padded(
    ids: np.ndarray, doc_of: np.ndarray, ctx_len: int, bos: int, special: Sequence[int]
) -> Rows:
    """One row of fewer tokens than fit, filled up with BOS."""
    row_ids = np.full((1, ctx_len), bos, dtype=np.int64)
    row_doc = np.full((1, ctx_len), -1, dtype=np.int64)
    row_ids[0, : len(ids)] = ids
    row_doc[0, : len(ids)] = doc_of
    return _rows(row_ids, row_doc, special)


def _rows(ids: np.ndarray, doc: np.ndarray, special: Sequence[int]) -> Rows:
    keep = ~np.isin(ids, np.asarray(special, dtype=np.int64)) & (doc >= 0)
    return Rows(torch.from_numpy(ids), torch.from_numpy(keep), torch.from_numpy(doc))
