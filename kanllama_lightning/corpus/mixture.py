"""Several corpora read as one."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np

from kanllama_lightning.corpus.naming import resolve
from kanllama_lightning.corpus.source import Corpus, Document
from kanllama_lightning.types import InputError

DRAWN_AT_ONCE = 4096


class Mixture(Corpus):
    """Documents drawn from several corpora in given proportions, without end.

    Which corpus gives the document of a number depends on that number and the seed alone. Each
    corpus is read in its own order and starts again when it ends.

    Args:
        corpora: The corpora: paths, names of Hugging Face datasets, or corpora.
        weights: For each corpus its share of the documents, up to a common factor.
        seed: Seed of the draw.
    """

    def __init__(self, corpora: list[str | Corpus], weights: list[float], seed: int = 0) -> None:
        self.corpora = [resolve(corpus) for corpus in corpora]
        if not corpora or len(weights) != len(corpora):
            raise InputError(
                f"weights={weights} for {len(corpora)} corpora: give at least one corpus, and one "
                "weight for each."
            )
        if not all(0 < weight < float("inf") for weight in weights):
            raise InputError(f"weights={weights}: each must be above 0; leave out the others.")
        if any(isinstance(corpus, Mixture) for corpus in self.corpora):
            raise InputError(
                "corpora: a mixture inside a mixture is not read; list its corpora with the "
                "products of the weights."
            )
        if seed < 0:
            raise InputError(f"seed={seed}: allowed are whole numbers from 0 up.")
        self.seed = seed
        self._edges = np.cumsum(weights) / np.sum(weights)

    @property
    def name(self) -> str:
        """The names of its corpora, joined by plus signs."""
        return "+".join(corpus.name for corpus in self.corpora)

    def open(self) -> None:
        """Open each corpus; `n_documents` counts those of all."""
        for corpus in self.corpora:
            corpus.open()
        sizes = [corpus.n_documents for corpus in self.corpora]
        self.n_documents = None if None in sizes else sum(filter(None, sizes))
        self.vocabularies = tuple(v for corpus in self.corpora for v in corpus.vocabularies)

    def documents(self, start: int = 0) -> Iterator[Document]:
        """The mixture from draw `start` on; it never ends."""
        drawn = np.zeros(len(self.corpora), dtype=np.int64)
        chunk, within = divmod(start, DRAWN_AT_ONCE)
        for before in range(chunk):
            drawn += np.bincount(self._chunk(before), minlength=len(drawn))
        drawn += np.bincount(self._chunk(chunk)[:within], minlength=len(drawn))
        records = [_endless(c, int(n)) for c, n in zip(self.corpora, drawn, strict=True)]
        for number, which in enumerate(self._choices(start), start):
            found = next(records[which])
            if found is not None:
                yield found._replace(number=number)

    def once(self) -> Iterator[Document]:
        """Each corpus once, mixed in the same proportions for as long as they last."""
        streams = {which: corpus.documents() for which, corpus in enumerate(self.corpora)}
        number = 0
        for which in self._choices(0):
            if which not in streams:
                continue
            found = next(streams[which], None)
            if found is None:
                del streams[which]
                if not streams:
                    return
                continue
            yield found._replace(number=number)
            number += 1

    @property
    def counted(self) -> str:
        """What is one document of each corpus that says so."""
        said = [f"{corpus.name}: {corpus.counted}" for corpus in self.corpora if corpus.counted]
        return "; ".join(said)

    def description(self) -> dict[str, Any]:
        """Its shares and those of its corpora, each with its number in front."""
        parts = {
            f"{number}.{name}": value
            for number, corpus in enumerate(self.corpora)
            for name, value in corpus.description().items()
        }
        return {"class": "Mixture", "seed": self.seed, "edges": self._edges.tolist(), **parts}

    def _chunk(self, chunk: int) -> np.ndarray:
        """Which corpus gives each of the documents of one chunk of numbers."""
        draws = np.random.default_rng([self.seed, chunk]).random(DRAWN_AT_ONCE)
        return np.searchsorted(self._edges[:-1], draws, side="right")

    def _choices(self, start: int) -> Iterator[int]:
        chunk, within = divmod(start, DRAWN_AT_ONCE)
        while True:
            yield from self._chunk(chunk)[within:].tolist()
            chunk, within = chunk + 1, 0


def parts(corpus: Corpus) -> list[Corpus]:
    """The corpora of a mixture; of another corpus itself."""
    return list(corpus.corpora) if isinstance(corpus, Mixture) else [corpus]


def _endless(corpus: Corpus, start: int) -> Iterator[Document | None]:
    """Record `start` of the repeated corpus and all after it; None for an unusable record.

    Unusable records are counted too, so that the place of a draw needs no reading to be known.
    """
    size = corpus.n_documents
    if size is None and next(corpus.documents(start), None) is None:
        size = 1 + max(found.number for found in corpus.documents())
    if size is not None:
        start %= size
    while True:
        number = start
        for found in corpus.documents(start):
            if size is not None and found.number >= size:
                break
            yield from repeat(None, found.number - number)
            yield found
            number = found.number + 1
        size = number if size is None else size
        yield from repeat(None, size - number)
        start = 0
