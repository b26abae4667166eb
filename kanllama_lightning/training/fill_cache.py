"""The one LM pass over the training text that a cache is made of."""

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import BFloat16
from torch import Tensor

from kanllama_lightning.console.phase import Phase
from kanllama_lightning.console.stopping import CacheStopped, Stopped
from kanllama_lightning.console.units import size as shown_size
from kanllama_lightning.data.shards import ROW_DTYPE, ActivationCache, Key, ShardPlace
from kanllama_lightning.data.stream import EPOCH_STRIDE
from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.preflight import preflight
from kanllama_lightning.runs.folder import SESSIONS, make_folder
from kanllama_lightning.training.cache_key import cache_key
from kanllama_lightning.types import Acts, InputError, TokenBatch

log = logging.getLogger(__name__)

SHARD_ROWS = 65_536
SMALLEST_SHARD_ROWS = 1_024
SHARDS_AT_LEAST = 8
"""A small cache is cut into as many, so that a killed writer loses little."""
STREAM_SEED = 0
"""Seed of the order in which text is written: the same whatever the run's seed, so that runs of all
seeds share, and extend, one cache. Reading shuffles by the run's own."""
POLL_SECONDS = 0.5


class Chunk(NamedTuple):
    """Rows for one shard."""

    rows: BFloat16[Tensor, "tok d_model"]
    start: ShardPlace
    end: ShardPlace
    last: bool
    """Whether the text ends with them."""


def fill_(lm: FrozenLM, data: TokenData, rows: int, device: torch.device) -> None:
    """Make `data` read from its cache folder; whatever is missing there is written first.

    One process writes, others that want the same folder wait for it.

    Args:
        lm: Loaded onto `device` if the LM has to run.
        data: Set up for `fit`, with a folder in `cache`.
        rows: Activations that the run needs.
        device: Where the LM runs.

    Raises:
        InputError: The folder holds other activations, or the disk has no room.
        CacheStopped: A signal came while this process was writing.
    """
    folder, wanted = Path(str(data.cache)), data.cache_tokens or rows
    key = cache_key(lm, data)
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        cache = _wait(folder, key, wanted)
    else:
        if (folder / SESSIONS).is_file():
            raise InputError(f"data.cache={str(folder)!r}: is the folder of a run; give another")
        make_folder(folder, "data.cache", "--data.cache FOLDER")
        with _alone(folder):
            cache = ActivationCache.open(folder, key)
            if not _complete(cache, wanted):
                try:
                    _write_(cache, wanted, lm, data, device)
                except Stopped as e:
                    raise CacheStopped(
                        e.number, folder, ActivationCache.open(folder, key).rows
                    ) from e
    if not cache.rows:
        raise InputError(
            "data.train: a whole pass over the text gave no token to cache: it holds special "
            "tokens alone, or documents that are empty for this tokenizer; give other text, or "
            "another column of it"
        )
    data.cached = cache.upto(wanted)
    log.info(
        "cache %s: training reads %s activations (%s); the LM runs in validation only%s",
        folder,
        f"{data.cached.rows:,}",
        shown_size(cache.n_bytes(data.cached.rows)),
        f"; the run needs about {rows:,}, so they repeat" if data.cached.rows < rows else "",
    )


def _complete(cache: ActivationCache, wanted: int) -> bool:
    return (cache.rows >= wanted or cache.whole) and not cache.torn()


def _wait(folder: Path, key: Key, wanted: int) -> ActivationCache:
    """The cache, as soon as the first process of this machine has written it."""
    while not _complete(cache := ActivationCache.open(folder, key), wanted):
        time.sleep(POLL_SECONDS)
    return cache


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it is free again when this process ends, however it ends."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("cache %s: another run is writing it; waiting", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_(
    cache: ActivationCache, wanted: int, lm: FrozenLM, data: TokenData, device: torch.device
) -> None:
    missing = 0 if cache.whole else max(0, wanted - cache.rows)
    size = min(SHARD_ROWS, max(SMALLEST_SHARD_ROWS, -(-wanted // SHARDS_AT_LEAST)))
    n_new = -(-missing // size)
    torn = cache.torn()
    to_write = n_new * size + sum(cache.shards[i].rows for i in torn)
    needed, free = cache.n_bytes(to_write), shutil.disk_usage(cache.folder).free
    log.info(
        "cache %s: writing %s activations, %s are there already: %s of disk (%s free)",
        cache.folder,
        f"{to_write:,}",
        f"{cache.rows:,}",
        shown_size(needed),
        shown_size(free),
    )
    if needed > free:
        raise InputError(
            f"data.cache={str(cache.folder)!r}: {to_write:,} activations need "
            f"{shown_size(needed)}, {shown_size(free)} are free; give a folder on another disk, "
            f"or fewer with --data.cache_tokens (at most {free // cache.n_bytes(1):,} would fit)"
        )
    lm.load_(device)
    preflight(lm, next(iter(data.val_dataloader()[0])).to(device))

    progress = Phase("caching", to_write, "activations")

    def batches(place: ShardPlace) -> Iterator[TokenBatch]:
        stream = data.stream(STREAM_SEED, 0, 1, torch.tensor(place[:3]))
        for batch in data.loader(stream):
            yield batch.to(device)
            progress.add(int(batch.keep.sum()))

    with progress:
        for i in torn:
            log.info("cache %s: shard %s is torn: written anew", cache.folder, cache.shards[i].name)
            chunk = next(chunks(batches, lm.acts, cache.shards[i].start, cache.shards[i].rows))
            cache.write_(chunk.rows, chunk.start, chunk.end, i)
        for chunk in islice(chunks(batches, lm.acts, cache.end, size), n_new):
            cache.whole = chunk.last
            if len(chunk.rows):
                cache.write_(chunk.rows, chunk.start, chunk.end, len(cache.shards))
    if cache.whole and missing:
        cache.list_()
        log.info("cache: the text ends after %s activations", f"{cache.rows:,}")


def chunks(
    batches: Callable[[ShardPlace], Iterator[TokenBatch]], acts: Acts, start: ShardPlace, size: int
) -> Iterator[Chunk]:
    """Activations of the text from a place on, in chunks of `size`, until the text ends.

    Args:
        batches: The token batches from a place on.
        acts: Runs the LM.
        start: Where the first chunk begins.
        size: Rows per chunk; the last may have fewer, or none.
    """
    before, skip, begun = start, start.skip, start
    parts: list[Tensor] = []
    filled = 0
    for batch in batches(start):
        batch = batch._replace(keep=batch.keep & (batch.doc < EPOCH_STRIDE))
        rows = batch.activations(acts)
        used = min(skip, len(rows))
        skip -= used
        while used < len(rows):
            some = rows[used : used + size - filled]
            parts.append(some.to("cpu", ROW_DTYPE))
            used, filled = used + len(some), filled + len(some)
            if filled == size:
                end = before._replace(skip=used)
                yield Chunk(torch.cat(parts), begun, end, last=False)
                parts, filled, begun = [], 0, end
        epoch, block, row = batch.position.tolist()
        before = ShardPlace(epoch, block, row, 0)
        if epoch > 0:
            empty = rows[:0].to("cpu", ROW_DTYPE)
            yield Chunk(torch.cat([empty, *parts]), begun, before, last=True)
            return
