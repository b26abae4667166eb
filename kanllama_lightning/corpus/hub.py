"""Documents streamed from the Hugging Face hub."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, Literal

import numpy as np
from datasets import load_dataset
from huggingface_hub import HfApi

from kanllama_lightning.corpus.source import (
    Corpus,
    Document,
    Skipped,
    Unusable,
    document,
    require_vocabulary,
)
from kanllama_lightning.types import InputError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
GIVE_UP_SECONDS = 8.0  # a name server that does not answer knows no timeout of ours
PROBED_RECORDS = 100


class HubCorpus(Corpus):
    """A dataset of the Hugging Face hub, streamed: nothing is stored, no account is needed.

    Args:
        name: The dataset, such as `roneneldan/TinyStories`.
        split: Its split.
        column: The column that holds the document: text, or lists of token ids.
        config: Which of the dataset's configurations, if it has several.
        revision: Commit, tag or branch (default: the newest commit, which is logged).
        sample: Take only this many documents, drawn at random from the whole split, which is
            read through once for it and so should be small. Left out, all are used.
        sample_seed: Seed of that draw.
        tokenizer: Only for a column of token ids: the name of the tokenizer that made them. It
            must be the model's own.
        vocab_hash: Only for a column of token ids, and stronger than the name: the hash of the
            vocabulary they come from, as `kanllama_lightning.data.vocabulary.vocab_hash` gives it.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        column: str = "text",
        config: str | None = None,
        revision: str | None = None,
        sample: int | None = None,
        sample_seed: int = 42,
        tokenizer: str | None = None,
        vocab_hash: str | None = None,
    ) -> None:
        if sample is not None and sample < 1:
            raise InputError(
                f"sample={sample} documents of {name}: allowed are whole numbers from 1 up; "
                "leave it out to use all."
            )
        self.dataset = name
        self.split = split
        self.column = column
        self.config = config
        self.revision = revision
        self.sample = sample
        self.sample_seed = sample_seed
        self.tokenizer = tokenizer
        self.vocab_hash = vocab_hash
        self._sampled: list[Document] | None = None
        self._skipped = Skipped(self.name)

    @property
    def name(self) -> str:
        """The dataset's name, without its owner."""
        return self.dataset.rsplit("/", 1)[-1]

    def open(self) -> None:
        """Ask the hub for the dataset (an answer within seconds, or an error) and its start."""
        info = self._ask(
            lambda: HfApi().dataset_info(
                self.dataset, revision=self.revision, timeout=CONNECT_SECONDS
            )
        )
        self.revision = info.sha  # later commits must not change a stream half-way
        logger.info("dataset %s: revision %s", self.dataset, self.revision)
        stream = self._load()
        try:
            records = list(stream.take(PROBED_RECORDS))
        except Exception as error:  # whatever a reader of some format raises: it is the same
            raise InputError(
                f"name={self.dataset!r}: its first documents cannot be read ({error}). Check "
                "`revision` and `config`, or give a local file."
            ) from error
        columns = {key for record in records for key in record}
        if records and self.column not in columns:
            raise InputError(
                f"column={self.column!r} is not in {self.dataset}. Its columns are "
                f"{', '.join(map(repr, sorted(columns)))}: set `column` to one of them."
            )
        probed = [self._document(i, record) for i, record in enumerate(records)]
        found = [d for d in probed if isinstance(d, Document)]
        if not found:
            raise InputError(
                f"name={self.dataset!r}, split={self.split!r}: no text and no token ids in "
                f"column {self.column!r} of the first {PROBED_RECORDS} records. Choose another "
                "`column` or `split`."
            )
        malformed = sum(d is False for d in probed)
        remedy = "Choose another `column`, `split` or `revision`."
        self._skipped.judge(malformed, len(records), remedy)
        if any(d.ids is not None for d in found):
            self.vocabularies = require_vocabulary(self.name, self.tokenizer, self.vocab_hash)
        split = (stream.info.splits or {}).get(self.split)
        self.n_documents = (split.num_examples or None) if split is not None else None
        if self.sample is not None:
            self._sampled = self._draw(self.sample)
            self.n_documents = len(self._sampled)

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Documents of the stream, or of the sample, from `start` on."""
        if self._sampled is not None:
            yield from self._sampled[start:]
            return
        skipped = 0
        for number, record in self._records(start):
            found = self._document(number, record)
            skipped += found is False
            if found:
                yield found
        self._skipped.total(skipped)

    def _records(self, start: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The records of the stream from a number on."""
        stream = self._load()
        records = iter(stream.skip(start) if start else stream)
        for number in count(start):
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # whatever a reader of some format raises
                raise InputError(
                    f"name={self.dataset!r}: reading stopped at record {number} ({error}). If the "
                    "network failed, the same command with --ckpt_path last goes on from the last "
                    "checkpoint; else choose another `revision`, or give a local file"
                ) from error
            yield number, record

    def _document(self, number: int, record: Mapping[str, Any]) -> Document | Literal[False] | None:
        """The document in a record; None if it is blank, False if it is malformed."""
        try:
            return document(number, record.get(self.column))
        except Unusable as why:
            self._skipped.add(f"record {number + 1}", why)
            return False

    def _draw(self, size: int) -> list[Document]:
        """A uniform sample of the split (reservoir sampling), in its order."""
        generator = np.random.default_rng(self.sample_seed)
        kept: list[Document] = []
        for seen, record in self._records(0):
            found = self._document(seen, record)
            place = seen if seen < size else int(generator.integers(seen + 1))
            if not found or place >= size:
                continue
            if len(kept) < size:
                kept.append(found)
            else:
                kept[place] = found
        kept.sort(key=lambda d: d.number)
        return [d._replace(number=i) for i, d in enumerate(kept)]

    def _load(self) -> Any:
        """The stream from its start."""
        try:
            return load_dataset(
                self.dataset,
                self.config,
                split=self.split,
                revision=self.revision,
                streaming=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"name={self.dataset!r}, config={self.config!r}, split={self.split!r}, "
                f"revision={self.revision!r} cannot be streamed: {error}"
            ) from error

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The hub's answer, or an error after `GIVE_UP_SECONDS` at the latest."""
        answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((question(), None))
            except Exception as error:  # handed on to the thread that waits
                answers.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer, error = answers.get(timeout=GIVE_UP_SECONDS)
        except queue.Empty:
            answer, error = None, TimeoutError(f"no answer within {GIVE_UP_SECONDS:.0f} s")
        if error is not None:
            reason = "".join(str(error).splitlines()[:1])
            raise InputError(
                f"name={self.dataset!r}: the Hugging Face hub does not give this dataset "
                f"({type(error).__name__}: {reason}). Check the name, the revision and the "
                "network; a private or gated dataset needs HF_TOKEN in the environment. "
                "Without a network, give a local file (.jsonl, .json, .txt or .parquet) "
                "instead, or use the built-in stories: --config configs/embedded.yaml."
            ) from error
        return answer
