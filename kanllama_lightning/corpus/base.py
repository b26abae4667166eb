"""What a corpus is: numbered documents, read from any number on without tokenising."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from kanllama_lightning.named import ship
from kanllama_lightning.types import InputError


class Document(NamedTuple):
    """One document: its text, or the token ids somebody made of it."""

    number: int
    """Place in the corpus, from 0. A record that cannot be used leaves its number out."""
    text: str | None = None
    ids: list[int] | None = None
    """Token ids of a pre-tokenised document; None where there is text."""

    def share(self) -> float:
        """A number in [0, 1) that depends on the contents alone, evenly spread over documents."""
        if self.text is not None:
            content = self.text.encode("utf-8", "surrogatepass")
        else:
            content = np.asarray(self.ids, dtype="<i8").tobytes()
        # the upper 53 bits: all 64 would round up to 1.0 for the last few hashes
        head = int.from_bytes(blake2b(content, digest_size=8).digest(), "big") >> 11
        return head / 2**53


class Vocabulary(NamedTuple):
    """Which vocabulary the ids of a pre-tokenised corpus are said to come from."""

    corpus: str
    tokenizer: str | None
    vocab_hash: str | None


class Corpus(ABC):
    """A source of documents, always in the same order."""

    n_documents: int | None = None
    """Document numbers in use, known after `open()`; None if the source does not say."""
    vocabularies: tuple[Vocabulary, ...] = ()
    """The vocabularies of its pre-tokenised parts, known after `open()`; empty for text."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ship(cls)

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for logs and metrics."""

    @abstractmethod
    def open(self) -> None:
        """Check that the source can be read and has documents; raises `InputError` if not."""

    @abstractmethod
    def documents(self, start: int = 0) -> Iterator[Document]:
        """The documents with numbers from `start` on, ascending."""

    def once(self) -> Iterator[Document]:
        """Every document of the source once, even where `documents` never ends."""
        return self.documents()

    def description(self) -> dict[str, Any]:
        """What tells it from another corpus, as plain values; known after `open()`."""
        arguments = {name: value for name, value in vars(self).items() if name[0] != "_"}
        arguments.pop("vocabularies", None)
        return {"class": type(self).__name__, **arguments}


def document(number: int, value: object) -> Document | None:
    """The document in a field of a record: a string, or a list of token ids; None if neither."""
    if isinstance(value, str) and value.strip():
        return Document(number, text=value)
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return Document(number, ids=value)
    return None


def require_vocabulary(
    corpus: str, tokenizer: str | None, vocab_hash: str | None
) -> tuple[Vocabulary, ...]:
    """The vocabulary of a corpus of ids, which must be named: ids alone mean nothing."""
    if tokenizer is None and vocab_hash is None:
        raise InputError(
            f"corpus {corpus!r} holds token ids, but tokenizer=None does not say whose. "
            "Ids of another vocabulary are other words, and nothing would fail: give "
            "`tokenizer` (the name of the tokenizer that made them) or `vocab_hash`, or use "
            "a column of text."
        )
    return (Vocabulary(corpus, tokenizer, vocab_hash),)
