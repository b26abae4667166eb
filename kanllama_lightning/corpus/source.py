"""What a corpus is: numbered documents, read from any number on without tokenising."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from kanllama_lightning.storage.named import ship
from kanllama_lightning.types import InputError

logger = logging.getLogger(__name__)

LARGEST_ID = 2**31
MALFORMED_SHARE = 0.01


class Document(NamedTuple):
    """One document: its text, or the token ids somebody made of it."""

    number: int
    """Place in the corpus, from 0. A record that cannot be used leaves its number out."""
    text: str | None = None
    ids: list[int] | None = None
    """Token ids of a pre-tokenised document; None where there is text."""

    def share(self) -> float:
        """A number in [0, 1) that depends on the contents alone, evenly spread over documents."""
        return _share(self.ids if self.text is None else self.text)

    def likeness(self) -> float:
        """`share()` of the same text without blanks around it, and with line feeds as line ends."""
        if self.text is None:
            return self.share()
        return _share(self.text.replace("\r\n", "\n").replace("\r", "\n").strip())


def _share(contents: str | list[int] | None) -> float:
    if isinstance(contents, str):
        content = contents.encode("utf-8", "surrogatepass")
    else:
        content = np.asarray(contents, dtype="<i8").tobytes()
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

    @property
    def counted(self) -> str:
        """What is one document, for the log; empty where that goes without saying."""
        return ""

    def description(self) -> dict[str, Any]:
        """What tells it from another corpus, as plain values; known after `open()`."""
        arguments = {name: value for name, value in vars(self).items() if name[0] != "_"}
        arguments.pop("vocabularies", None)
        return {"class": type(self).__name__, **arguments}


class Unusable(Exception):  # noqa: N818
    """Why a record is no document; stands in the place of its value where it cannot be read."""


def document(number: int, value: object) -> Document | None:
    """The document in a field of a record: a string, or a list of token ids.

    Returns:
        None for a record without one: null, a blank text, an empty list.

    Raises:
        Unusable: The field holds something else, or text that no tokenizer can be given.
    """
    if isinstance(value, Unusable):
        raise value
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        if "\0" in value:
            raise Unusable("has a NUL character: no text, or not in UTF-8")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Unusable(
                f"has half a character (a lone surrogate, {error.object!r:.40})"
            ) from error
        return Document(number, text=value)
    if not isinstance(value, list):
        raise Unusable(f"holds a {type(value).__name__}, neither text nor a list of token ids")
    if not all(type(token) is int and 0 <= token < LARGEST_ID for token in value):
        raise Unusable("holds a list that is no list of token ids")
    return Document(number, ids=value)


class Skipped:
    """Records of a corpus that are no document: counted, and the first of them named in the log.

    Args:
        corpus: What to call the corpus.
    """

    def __init__(self, corpus: str) -> None:
        self.corpus = corpus
        self.first: str | None = None
        self.said = 0

    def add(self, place: object, why: Unusable) -> None:
        """One more; where it is, and why it is none."""
        if self.first is None:
            self.first = f"{place}, {why}"
            logger.warning(
                "%s: no document: %s. Such records are skipped and counted", self.corpus, self.first
            )

    def total(self, n: int) -> None:
        """So many were skipped in a whole pass; said when there are more than before."""
        if n > self.said:
            self.said = n
            logger.info("%s: %d malformed records skipped", self.corpus, n)

    def judge(self, n: int, records: int, remedy: str) -> None:
        """Log a few malformed records; refuse many.

        Args:
            n: How many there are.
            records: How many were looked at.
            remedy: What to do.

        Raises:
            InputError: More than 1 % are malformed (one is always borne).
        """
        if not n:
            return
        finding = f"{n} of {records} records looked at in {self.corpus} are no document"
        if not n <= max(1, MALFORMED_SHARE * records):
            raise InputError(
                f"{finding} (the first: {self.first}); at most {MALFORMED_SHARE:.0%} may be. "
                f"{remedy}"
            )
        logger.warning("%s; they are skipped.", finding)


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
