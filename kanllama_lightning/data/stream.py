"""The endless training stream: the order of all rows, and how to go on from any of them."""

import logging
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import IterableDataset

from kanllama_lightning.corpus import Corpus, Document
from kanllama_lightning.data.ahead import Ahead
from kanllama_lightning.data.packing import Rows, join
from kanllama_lightning.data.vocabulary import TextEncoder
from kanllama_lightning.types import InputError, TokenBatch

logger = logging.getLogger(__name__)

BLOCK_DOCUMENTS = 4096  # shuffled together, and reread at most on resuming
EPOCH_STRIDE = 2**40  # keeps documents of two epochs apart inside a batch


class TokenStream(IterableDataset):
    """Batches of packed rows for one rank, forever.

    The corpus is read in blocks of `BLOCK_DOCUMENTS` document numbers. The documents of a block
    are permuted, packed, and the rows permuted again, by a generator seeded with (seed, epoch,
    block); when the corpus ends, the next epoch begins. So the order of all rows is a function
    of the seed, and (epoch, block, row) is a place in it. When half of the rows of a block are
    gone, a thread begins to read and tokenise the next one. Each step takes `batch_seqs` rows per
    rank off that one sequence and deals them out in turn, so that all ranks are always at the
    same place.

    Args:
        corpus: Where the documents come from.
        encoder: Makes rows of them.
        held_out: Documents with a smaller `share()` are not for training.
        batch_seqs: Rows per batch and rank.
        seed: Seed of the order.
        rank: Which of the `world` processes this is.
        world: Number of processes that train together.
        position: (epoch, block, row) of the first row.
        validated: `likeness()` of further documents that are not for training.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: TextEncoder,
        held_out: float,
        batch_seqs: int,
        seed: int,
        rank: int,
        world: int,
        position: Int[Tensor, " 3"],
        validated: frozenset[float] = frozenset(),
    ) -> None:
        self.corpus = corpus
        self.encoder = encoder
        self.held_out = held_out
        self.batch_seqs = batch_seqs
        self.seed = seed
        self.rank = rank
        self.world = world
        self.position = position.clone()
        self.validated = validated

    def __iter__(self) -> Iterator[TokenBatch]:
        first_epoch, first_block, row = self.position.tolist()
        wanted = self.batch_seqs * self.world
        parts: list[Rows] = []
        blocks = Ahead(self._blocks(first_epoch, first_block))
        for epoch, block, rows in blocks:
            while row < len(rows.ids):
                if 2 * row >= len(rows.ids):
                    blocks.begin()
                parts.append(rows.pick(slice(row, row + wanted)))
                row += len(parts[-1].ids)
                wanted -= len(parts[-1].ids)
                if wanted == 0:
                    mine = join(parts).pick(slice(self.rank, None, self.world))
                    yield TokenBatch(*mine, torch.tensor([epoch, block, row]))
                    wanted = self.batch_seqs * self.world
                    parts = []
            row = 0

    def _blocks(self, epoch: int, block: int) -> Iterator[tuple[int, int, Rows]]:
        """The shuffled blocks from one on, with their places."""
        while True:
            logger.info("%s: epoch %d, from block %d", self.corpus.name, epoch, block)
            whole, empty, left_out = block == 0, True, 0
            documents = self.corpus.documents(block * BLOCK_DOCUMENTS)
            for number, members in groupby(documents, lambda d: d.number // BLOCK_DOCUMENTS):
                ours = [d for d in members if d.share() >= self.held_out]
                training = [d for d in ours if not self._validated(d)]
                left_out += len(ours) - len(training)
                rows = self._rows(epoch, number, training)
                empty = empty and not len(rows.ids)
                yield epoch, number, rows
            if whole and empty:
                raise InputError(
                    f"train: {self.corpus.name} has no document left to train on beside the "
                    f"held-out share of {self.held_out:.2%}. Give more documents, or "
                    "`val_fraction` 0 and validation sets in `val`."
                )
            if left_out:
                logger.info(
                    "%s: %d documents were not trained on, as they are in a set of `val`",
                    self.corpus.name,
                    left_out,
                )
            epoch, block = epoch + 1, 0

    def _validated(self, document: Document) -> bool:
        return bool(self.validated) and document.likeness() in self.validated

    def _rows(self, epoch: int, block: int, documents: list[Document]) -> Rows:
        generator = np.random.default_rng([self.seed, epoch, block])
        shuffled = [documents[i] for i in generator.permutation(len(documents))]
        rows = self.encoder.pack(shuffled, first_number=epoch * EPOCH_STRIDE)
        return rows.pick(torch.from_numpy(generator.permutation(len(rows.ids))))
