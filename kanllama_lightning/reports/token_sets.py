"""The token sets of an evaluation: text that no head was trained on."""

import hashlib
import logging
from collections.abc import Iterator
from itertools import islice

from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerBase

from kanllama_lightning.corpus import Document, resolve
from kanllama_lightning.data.packing import Rows
from kanllama_lightning.data.token_data import TokenData, collate
from kanllama_lightning.data.vocabulary import TextEncoder, check_vocabulary
from kanllama_lightning.types import InputError, TokenBatch

log = logging.getLogger(__name__)

DOCUMENTS = 2000
"""Documents per set, unless another number is asked for (METHODS F)."""


def run_sets(data: TokenData, documents: int | None) -> dict[str, Rows]:
    """The validation sets of a run: the share held out of its training text, and its `val`."""
    found = data.held_back(documents or DOCUMENTS)
    return {name: _packed(name, data.encoder, some, documents) for name, some in found.items()}


def text_sets(
    names: list[str],
    tokenizer: PreTrainedTokenizerBase,
    ctx_len: int,
    append_eos: bool,
    documents: int | None,
) -> dict[str, Rows]:
    """Sets of the user's own: files, folders, or names of hub datasets."""
    encoder = TextEncoder(tokenizer, ctx_len, append_eos)
    sets: dict[str, Rows] = {}
    for name in names:
        corpus = resolve(name)
        corpus.open()
        check_vocabulary(corpus, encoder)
        label = corpus.name if corpus.name not in sets else f"{corpus.name}_{len(sets)}"
        some = list(islice(corpus.once(), documents or DOCUMENTS))
        sets[label] = _packed(label, encoder, some, documents)
    return sets


def _packed(name: str, encoder: TextEncoder, found: list[Document], asked: int | None) -> Rows:
    """The documents as rows; as many as were asked for, by name, or an error."""
    if asked is not None and len(found) < asked:
        raise InputError(
            f"--documents={asked}: set {name!r} has only {len(found)}; ask for as many or fewer, "
            "or give a longer text with --text"
        )
    rows = encoder.pack(found)
    if not rows.keep.any():
        raise InputError(f"set {name!r}: has no text; give another with --text")
    log.info("%s: %d documents, %s tokens", name, len(found), f"{rows.ids.numel():,}")
    return rows


def n_documents(rows: Rows) -> int:
    """Number of documents with a token in the rows."""
    return len(rows.doc[rows.doc >= 0].unique())


def digest(rows: Rows) -> str:
    """Hash of the token ids: equal for the same text, cut the same way."""
    return hashlib.sha256(rows.ids.numpy().tobytes()).hexdigest()


def batches(rows: Rows, seqs: int) -> Iterator[TokenBatch]:
    """The rows in order, `seqs` at a time."""
    yield from DataLoader(TensorDataset(*rows), seqs, collate_fn=collate)
