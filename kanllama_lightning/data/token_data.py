"""Text to packed batches of tokens: the data module."""

import logging
import os
from collections.abc import Iterator
from itertools import islice

import torch
from jaxtyping import Int
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import PreTrainedTokenizerBase

from kanllama_lightning.corpus import Corpus, Document, parts, resolve
from kanllama_lightning.data.cached_activations import CachedStream
from kanllama_lightning.data.packing import Rows
from kanllama_lightning.data.shards import ActivationCache
from kanllama_lightning.data.stream import TokenStream
from kanllama_lightning.data.vocabulary import TextEncoder, check_vocabulary
from kanllama_lightning.types import InputError, TokenBatch

logger = logging.getLogger(__name__)

HELD_OUT = "heldout"
VAL_TOKENS = 131_072  # of a set where nobody says; what the held-out share is chosen for then
HELD_OUT_AT_MOST = 0.1  # of a corpus too small to give `val_tokens` at the share asked for
HELD_OUT_MARGIN = 1.2  # over the estimate, which rests on a sample
PREFETCHED_BATCHES = 32  # bridge the seconds that a background process packs a new block
SAMPLE_DOCUMENTS = 200
SAMPLE_SPAN = 2_000  # documents read at most for that sample
VALIDATED_DOCUMENTS = 10_000  # of each set in `val`; all of them are kept out of training
OVERLAP_SPAN = 20_000  # training documents looked at for some that are in `val`


class TokenData(LightningDataModule):
    """A training corpus and fixed validation sets, as batches of packed token rows.

    Part of the training corpus is held out by a hash of each document, so that identical
    documents are on the same side, whatever the order, the epoch and the number of processes.

    Args:
        tokenizer: The language model's own tokenizer, from which the command line takes it.
        train: Training corpus: a file or folder, the name of a Hugging Face dataset, or a corpus
            class with its arguments.
        val: A further validation set in the same forms, or a list of several, of up to 10,000
            documents each. What is in them is not trained on: the same documents in `train` are
            left out there, and counted.
        val_fraction: Share of the training documents that is held out as the validation set
            `heldout`; 0 for none. A small corpus holds out more, up to a tenth, until that gives
            `val_tokens`; the share in force is logged.
        val_tokens: Tokens per validation set, rounded down to whole rows. Left out, a command
            sets it so that the validations take a tenth of the training (`plan/validation.py`),
            and 131,072 are held out for.
        ctx_len: Tokens per row.
        lm_batch_seqs: Rows per training batch and process.
        val_batch_seqs: Rows per validation batch and process.
        append_eos: Whether each document ends with the tokenizer's EOS token.
        seed: Seed of the order of the training rows.
        workers: Background processes that read and tokenise: 0 or 1.
        cache: Folder to write the LM's activations into once, for this run and others with the
            same LM, hook point and text: they read them instead of running the LM. Left out,
            the LM runs in every run.
        cache_tokens: Activations to write (default: as many as the run needs). A run that needs
            more than there are reads them again, in another order; a larger number than there
            are adds the rest.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: str | Corpus,
        val: str | Corpus | list[str | Corpus] | None = None,
        val_fraction: float = 0.005,
        val_tokens: int | None = None,
        ctx_len: int = 512,
        lm_batch_seqs: int = 8,
        val_batch_seqs: int = 8,
        append_eos: bool = True,
        seed: int = 0,
        workers: int = 0,
        cache: str | None = None,
        cache_tokens: int | None = None,
    ) -> None:
        super().__init__()
        _require(0 <= val_fraction <= 0.5, "val_fraction", val_fraction, "shares from 0 to 0.5")
        _require(ctx_len >= 2, "ctx_len", ctx_len, "whole numbers from 2 up")
        enough = val_tokens is None or val_tokens >= ctx_len
        _require(enough, "val_tokens", val_tokens, f"at least one row, {ctx_len} tokens")
        _require(lm_batch_seqs >= 1, "lm_batch_seqs", lm_batch_seqs, "whole numbers from 1 up")
        _require(val_batch_seqs >= 1, "val_batch_seqs", val_batch_seqs, "whole numbers from 1 up")
        _require(seed >= 0, "seed", seed, "whole numbers from 0 up")
        _require(workers in (0, 1), "workers", workers, "0 and 1: one keeps up, more would repeat")
        rule = "whole numbers from 1 up, beside a folder in `cache`"
        _require(
            cache_tokens is None or (cache is not None and cache_tokens >= 1),
            "cache_tokens",
            cache_tokens,
            rule,
        )
        if val_fraction == 0 and not val:
            raise InputError(
                "val_fraction=0 and no `val`: nothing would be validated. Hold out a share of "
                "the training documents, such as 0.005, or name a validation corpus in `val`."
            )
        self.encoder = TextEncoder(tokenizer, ctx_len, append_eos)
        self.train_corpus = resolve(train)
        several = val if isinstance(val, list) else [val] if val else []
        self.val_corpora = [resolve(corpus) for corpus in several]
        self.val_fraction = val_fraction
        self.val_sized = val_tokens is None
        """Whether nobody said how many tokens to validate on."""
        self.split_tokens = VAL_TOKENS if val_tokens is None else val_tokens
        """Tokens that the held-out share of a small corpus is to give: the same documents for
        training and record, whatever a command sets `val_tokens` to."""
        self.val_tokens = max(self.split_tokens, ctx_len)
        self.ctx_len = ctx_len
        self.lm_batch_seqs = lm_batch_seqs
        self.val_batch_seqs = val_batch_seqs
        self.seed = seed
        self.workers = workers
        self.cache, self.cache_tokens = cache, cache_tokens
        self.cached: ActivationCache | None = None
        self.epoch_tokens: float | None = None
        """Tokens of the training text, estimated; known after `setup`, where its size is."""
        self.position: Int[Tensor, " 3"] = torch.zeros(3, dtype=torch.int64)
        self._val: dict[str, Rows] = {}
        self.validated: frozenset[float] = frozenset()
        """`likeness()` of the documents of `val`, which are not trained on."""
        self.validated_shares: frozenset[float] = frozenset()
        """Their `share()`, by which caches know them."""

    @property
    def val_names(self) -> list[str]:
        """Names of the validation sets, in the order of their loaders; known after `setup`."""
        return list(self._val)

    @property
    def val_sets(self) -> int:
        """How many validation sets there are; known from the start."""
        return (self.val_fraction > 0) + len(self.val_corpora)

    def resume_from(self, position: Int[Tensor, " 3"]) -> None:
        """Let the next training loader start at the `position` of a batch: with the row after."""
        self.position = position.clone()

    def setup(self, stage: str) -> None:
        """Check everything that can be wrong with the data, and collect the validation sets."""
        if self._val:
            return
        self._open()
        rows = self.val_tokens // self.ctx_len
        for name, documents in self._sets():
            self._val[name] = self._filled(name, self.encoder.first_rows(documents, rows))
            logger.info(
                "validation set %s: %d rows, %d tokens%s",
                name,
                len(self._val[name].ids),
                self._val[name].ids.numel(),
                ""
                if len(self._val[name].ids) == rows
                else f", fewer than val_tokens={self.val_tokens}",
            )
        if all(not self._trained(d) for d in self.train_corpus.once()):
            also = " or are in `val`" if self.validated else ""
            raise InputError(
                f"train: all documents of {self.train_corpus.name} are held out for validation "
                f"(val_fraction={self.val_fraction:.3g}){also}. "
                f"{self._more_text('Give more documents')}, or `val_fraction` 0 and a validation "
                "corpus of other text in `val`."
            )
        self._say_overlap()

    def held_back(self, n: int) -> dict[str, list[Document]]:
        """The first n documents of every validation set; none of them was trained on.

        The held-out share is that of training, however many documents are asked for.
        """
        self._open()
        return {name: list(islice(found, n)) for name, found in self._sets()}

    def _open(self) -> None:
        self.encoder.say_special()
        self.train_corpus.open()
        for corpus in self.val_corpora:
            try:
                corpus.open()
            except InputError as error:
                raise InputError(
                    f"data.val: {error}\nLeave this validation set out with --data.val null"
                ) from error
            self._refuse_same(corpus)
        for corpus in (self.train_corpus, *self.val_corpora):
            check_vocabulary(corpus, self.encoder)
            self.encoder.check_text(corpus)
        some = (islice(c.once(), VALIDATED_DOCUMENTS) for c in self.val_corpora)
        both = {(d.likeness(), d.share()) for documents in some for d in documents}
        self.validated = frozenset(likeness for likeness, _ in both)
        self.validated_shares = frozenset(share for _, share in both)
        self._size_split()

    def _refuse_same(self, corpus: Corpus) -> None:
        """Refuse a validation set that is the training text itself, or a part of its mixture."""
        for part in parts(corpus):
            if any(part.description() == other.description() for other in parts(self.train_corpus)):
                raise InputError(
                    f"data.val: {part.name} is what is trained on (data.train). Name other text, "
                    "or leave it out with --data.val null: `val_fraction` holds a share of the "
                    "training text back, and none of that is trained on"
                )

    def _trained(self, document: Document) -> bool:
        """Whether a document is for training."""
        kept = document.share() >= self.val_fraction
        return kept and (not self.validated or document.likeness() not in self.validated)

    def _say_overlap(self) -> None:
        """Count the documents that are in both, among the first of the training text."""
        if not self.validated:
            return
        first = [d.likeness() for d in islice(self.train_corpus.once(), OVERLAP_SPAN)]
        both = sum(likeness in self.validated for likeness in first)
        if both:
            logger.warning(
                "%d of the first %d documents of %s are in a set of `val` too: wherever they come, "
                "they are not trained on",
                both,
                len(first),
                self.train_corpus.name,
            )

    def _sets(self) -> Iterator[tuple[str, Iterator[Document]]]:
        """Names of the validation sets, and their documents."""
        names = {HELD_OUT} if self.val_fraction > 0 else set()
        if names:
            yield HELD_OUT, self._held_out()
        for corpus in self.val_corpora:
            name = corpus.name if corpus.name not in names else f"{corpus.name}_{len(names)}"
            names.add(name)
            yield name, islice(corpus.once(), VALIDATED_DOCUMENTS)

    def train_dataloader(self) -> DataLoader:
        """Batches without end, from `position` on."""
        rank, world = self._place()
        if self.cached is not None:
            rows = self.lm_batch_seqs * self.ctx_len
            return self.loader(
                CachedStream(self.cached, rows, self.seed, rank, world, self.position)
            )
        if self.cache is not None:
            raise InputError(
                f"data.cache={self.cache!r}: nothing was written there for this data yet; "
                "`train.py fit` does it, or call kanllama_lightning.training.fill_cache.fill_"
            )
        return self.loader(self.stream(self.seed, rank, world, self.position))

    def stream(self, seed: int, rank: int, world: int, position: Int[Tensor, " 3"]) -> TokenStream:
        """The training text in the order of a seed, for one of several processes."""
        return TokenStream(
            self.train_corpus,
            self.encoder,
            self.val_fraction,
            self.lm_batch_seqs,
            seed,
            rank,
            world,
            position,
            self.validated,
        )

    def loader(self, stream: IterableDataset) -> DataLoader:
        """The stream, read in the background if there are `workers`."""
        if self.workers:
            # a process that has tokenised on several threads must not be forked
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=PREFETCHED_BATCHES if self.workers else None,
        )

    def val_dataloader(self) -> list[DataLoader]:
        """One loader for each validation set, in the order of `val_names`."""
        return [self._val_loader(rows) for rows in self._val.values()]

    def _val_loader(self, rows: Rows) -> DataLoader:
        dataset = TensorDataset(*rows)
        rank, world = self._place()
        # Lightning's own sampler would repeat rows to make the ranks even, and count them twice
        own = range(rank, len(dataset), world)
        return DataLoader(dataset, self.val_batch_seqs, sampler=own, collate_fn=collate)

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _held_out(self) -> Iterator[Document]:
        return (d for d in self.train_corpus.once() if d.share() < self.val_fraction)

    def _size_split(self) -> None:
        """Hold out more of a small corpus; log its size."""
        corpus = self.train_corpus
        if corpus.n_documents is None:
            logger.info("train: %s, size unknown, %.3g held out", corpus.name, self.val_fraction)
            return
        step = -(-min(corpus.n_documents, SAMPLE_SPAN) // SAMPLE_DOCUMENTS)
        sample = list(islice(corpus.once(), 0, SAMPLE_SPAN, step))
        lengths = [len(ids) + 2 for ids in self.encoder.encode(sample)]
        tokens = sum(lengths) / max(1, len(lengths)) * corpus.n_documents
        needed = HELD_OUT_MARGIN * self.split_tokens / max(1.0, tokens)
        raised = min(needed, HELD_OUT_AT_MOST)
        if 0 < self.val_fraction < raised:
            logger.info(
                "val_fraction raised from %.3g to %.3g, for %d validation tokens",
                self.val_fraction,
                raised,
                self.split_tokens,
            )
            self.val_fraction = raised
        self.epoch_tokens = (1 - self.val_fraction) * tokens
        logger.info(
            "train: %s, %d documents%s, about %.3g tokens per epoch, %.3g held out",
            corpus.name,
            corpus.n_documents,
            f" ({corpus.counted})" if corpus.counted else "",
            self.epoch_tokens,
            self.val_fraction,
        )

    def _filled(self, name: str, rows: Rows) -> Rows:
        """The rows, if there is text in them."""
        if not rows.keep.any():
            more = "Give more documents or a larger `val_fraction`"
            raise InputError(
                f"validation set {name!r} has no token (val_fraction={self.val_fraction:.3g}). "
                f"{self._more_text(more) if name == HELD_OUT else more}, or 0 and a validation "
                "corpus in `val`."
            )
        return rows

    def _more_text(self, more: str) -> str:
        """What to give: more text, but for copies of one document, where more of it is no help."""
        shares = [d.share() for d in islice(self.train_corpus.once(), OVERLAP_SPAN)]
        if len(set(shares)) > 1:
            return more
        found = "one document" if len(shares) == 1 else f"{len(shares):,} documents that are equal"
        return (
            f"{self.train_corpus.name} holds {found}, and equal documents are on the same side of "
            "the split: give different ones"
        )


def collate(rows: list[tuple[Tensor, ...]]) -> TokenBatch:
    """A validation batch; it has no place in the training stream."""
    ids, keep, doc = (torch.stack(column) for column in zip(*rows, strict=True))
    return TokenBatch(ids, keep, doc, torch.zeros(3, dtype=torch.int64))


def _require(allowed: bool, argument: str, value: object, rule: str) -> None:
    if not allowed:
        raise InputError(f"data.{argument}={value}: allowed are {rule}. Change `{argument}`.")
