"""The endless training stream out of a cache: the order of all rows, and how to go on in it."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import BFloat16, Int
from torch import Tensor
from torch.utils.data import IterableDataset

from kanllama_lightning.data.shards import ActivationCache
from kanllama_lightning.types import ActivationBatch

logger = logging.getLogger(__name__)


class CachedStream(IterableDataset):
    """Batches of activation rows for one rank, forever.

    In each epoch the shards come in an order drawn from (seed, epoch), the rows of a shard in one
    drawn from (seed, epoch, shard). So the order of all rows is a function of the seed, and
    (epoch, place of the shard in the order, row) is a place in it. Each step takes `batch_rows`
    per rank off that one sequence and deals them out in turn, so that all ranks are always at the
    same place. The next shard is read, and checked the first time, while this one is used.

    Args:
        cache: The shards to read.
        batch_rows: Rows per batch and rank.
        seed: Seed of the order.
        rank: Which of the `world` processes this is.
        world: Number of processes that train together.
        position: (epoch, shard, row) of the first row.
    """

    def __init__(
        self,
        cache: ActivationCache,
        batch_rows: int,
        seed: int,
        rank: int,
        world: int,
        position: Int[Tensor, " 3"],
    ) -> None:
        self.cache = cache
        self.batch_rows = batch_rows
        self.seed = seed
        self.rank = rank
        self.world = world
        self.position = position.clone()
        self._checked: set[str] = set()

    def __iter__(self) -> Iterator[ActivationBatch]:
        first_epoch, first_shard, row = self.position.tolist()
        wanted, taken = self.batch_rows * self.world, 0
        parts: list[Tensor] = []
        for epoch, at, rows, order in self._shards(first_epoch, first_shard):
            while row < len(order):
                some = order[row : row + wanted - taken]
                mine = some[(self.rank - taken) % self.world :: self.world]
                parts.append(rows.index_select(0, mine))
                row, taken = row + len(some), taken + len(some)
                if taken == wanted:
                    yield ActivationBatch(torch.cat(parts), torch.tensor([epoch, at, row]))
                    parts, taken = [], 0
            row = 0

    def _shards(
        self, epoch: int, at: int
    ) -> Iterator[tuple[int, int, BFloat16[Tensor, "tok d_model"], Int[Tensor, " tok"]]]:
        """Places, rows and order of the rows, shard by shard."""
        with ThreadPoolExecutor(1) as ahead:
            places = self._places(epoch, at)
            place = next(places)
            opening = ahead.submit(self._open, place[2])
            for following in places:
                coming = ahead.submit(self._open, following[2])
                rows = opening.result()
                if place[0] and not place[1]:
                    logger.info(
                        "cache: epoch %d: its %s activations are read again, in another order",
                        place[0],
                        f"{self.cache.rows:,}",
                    )
                yield place[0], place[1], rows, self._permutation(len(rows), place[0], place[2])
                place, opening = following, coming

    def _places(self, epoch: int, at: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, place in the order, number) of the shards from one on, without end."""
        while True:
            order = self._permutation(len(self.cache.shards), epoch)
            for place in range(at, len(order)):
                yield epoch, place, int(order[place])
            epoch, at = epoch + 1, 0

    def _permutation(self, n: int, *names: int) -> Int[Tensor, " n"]:
        drawn = np.random.default_rng([self.seed, *names]).permutation(n)
        return torch.from_numpy(drawn)

    def _open(self, number: int) -> BFloat16[Tensor, "tok d_model"]:
        shard = self.cache.shards[number]
        rows = self.cache.map(shard)
        if shard.name not in self._checked:
            self.cache.check(shard, rows)
            self._checked.add(shard.name)
        return rows
