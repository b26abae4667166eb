"""A cache folder: raw shards of activation rows, and a manifest that says whose they are."""

import json
import zlib
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import torch
from jaxtyping import BFloat16
from torch import Tensor

from kanllama_lightning.storage.files import replacing
from kanllama_lightning.storage.small_files import Count, Like, Within, read_json, there
from kanllama_lightning.types import InputError

MANIFEST = "manifest.json"
ROW_DTYPE = torch.bfloat16

Key = dict[str, Any]
"""What activations depend on, as plain values: equal keys, equal activations."""


class ShardPlace(NamedTuple):
    """A place in the activations of a token stream, from which they can be made again."""

    epoch: int
    block: int
    row: int
    """(epoch, block, row) of the token stream (see `TokenStream`)."""
    skip: int
    """Activations to leave out from there on."""


class Shard(NamedTuple):
    """One file of rows."""

    name: str
    rows: int
    crc32: int
    start: ShardPlace
    end: ShardPlace


class Listed(TypedDict):
    """A shard, as a manifest lists it."""

    name: Annotated[str, Like(r"\d{6,}\.bf16", "the name of a shard, such as 000000.bf16")]
    rows: Annotated[int, Within(1, 1 << 40)]
    crc32: Annotated[int, Within(0, (1 << 32) - 1)]
    start: tuple[Count, Count, Count, Count]
    end: tuple[Count, Count, Count, Count]


class Named(TypedDict):
    """Whose activations a manifest says they are, as far as reading them needs it."""

    d_model: Annotated[int, Within(1, 1 << 24)]


class Manifest(TypedDict):
    """`manifest.json`."""

    key: Named
    whole: bool
    shards: list[Listed]


class ActivationCache:
    """A folder of activations [row, d_model] in bf16, little-endian, without headers.

    A shard is written beside, synced and renamed, and only then listed in the manifest, which is
    replaced whole: whatever happens to the writer, every listed shard was complete. Shards are
    never changed afterwards, only more are added.

    Args:
        folder: The folder.
        key: Whose activations these are.
        shards: Those listed so far.
        whole: Whether the text is used up: there is nothing to add.
    """

    def __init__(self, folder: Path, key: Key, shards: list[Shard], whole: bool) -> None:
        self.folder, self.key, self.shards, self.whole = folder, key, shards, whole

    @classmethod
    def open(cls, folder: Path, key: Key) -> "ActivationCache":
        """The cache in a folder; an empty one where there is none yet.

        Raises:
            InputError: The folder holds the activations of something else; lists what differs.
        """
        file = folder / MANIFEST
        if not there(file):
            return cls(folder, key, [], False)
        remedy = "delete the folder, or give another one: the activations are written anew"
        try:
            read = read_json(file, Manifest, remedy)
        except InputError as e:
            raise InputError(f"data.cache={str(folder)!r}: {e}") from e
        shards = [
            Shard(s["name"], s["rows"], s["crc32"], ShardPlace(*s["start"]), ShardPlace(*s["end"]))
            for s in read["shards"]
        ]
        for i, shard in enumerate(shards):
            if shard.name != f"{i:06d}.bf16" or (i and shard.start != shards[i - 1].end):
                raise InputError(
                    f"data.cache={str(folder)!r}: {file}: shard {i} does not follow the one before "
                    f"it; {remedy}"
                )
        cache = cls(folder, read["key"], shards, read["whole"])
        have = cache.key
        differences = [
            f"  {name}: {have.get(name)!r} in the cache, {key.get(name)!r} wanted"
            for name in sorted(have.keys() | key.keys())
            if have.get(name) != key.get(name)
        ]
        if differences:
            listed = "\n".join(differences)
            raise InputError(
                f"data.cache={str(folder)!r}: holds the activations of something else:\n{listed}\n"
                "Give another folder, in which those wanted are then written"
            )
        return cache

    @property
    def d_model(self) -> int:
        """Width of a row."""
        return int(self.key["d_model"])

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def end(self) -> ShardPlace:
        """Where the next shard begins."""
        return self.shards[-1].end if self.shards else ShardPlace(0, 0, 0, 0)

    def n_bytes(self, rows: int) -> int:
        """Size of so many rows."""
        return rows * self.d_model * ROW_DTYPE.itemsize

    def upto(self, rows: int) -> "ActivationCache":
        """The first shards that hold `rows` rows together, or all: what one run reads.

        What others add later does not change it, so that a run can be continued exactly.
        """
        first: list[Shard] = []
        while len(first) < len(self.shards) and sum(s.rows for s in first) < rows:
            first.append(self.shards[len(first)])
        return ActivationCache(self.folder, self.key, first, self.whole)

    def torn(self) -> list[int]:
        """Numbers of listed shards whose file is missing or not of its size."""
        return [i for i, shard in enumerate(self.shards) if not self._has_size(shard)]

    def _has_size(self, shard: Shard) -> bool:
        file = self.folder / shard.name
        return file.is_file() and file.stat().st_size == self.n_bytes(shard.rows)

    def write_(
        self, rows: BFloat16[Tensor, "tok d_model"], start: ShardPlace, end: ShardPlace, at: int
    ) -> None:
        """Write a shard and list it: a new one, or a torn one anew.

        Args:
            rows: On the CPU.
            start: Where they begin in the token stream.
            end: Where the rows after them begin.
            at: Number of the shard.
        """
        data = _bytes(rows.contiguous())
        shard = Shard(f"{at:06d}.bf16", len(rows), zlib.crc32(data), start, end)
        _replace(self.folder / shard.name, data)
        self.shards[at : at + 1] = [shard]
        self.list_()

    def list_(self) -> None:
        """Write the manifest."""
        manifest = {
            "key": self.key,
            "whole": self.whole,
            "rows": self.rows,
            "shards": [shard._asdict() for shard in self.shards],
        }
        _replace(self.folder / MANIFEST, memoryview(json.dumps(manifest, indent=1).encode()))

    def map(self, shard: Shard) -> BFloat16[Tensor, "tok d_model"]:
        """The rows of a shard, mapped: only what is looked at is read.

        Raises:
            InputError: The file is missing or torn.
        """
        if not self._has_size(shard):
            raise self._damaged(shard, f"missing, or not of {self.n_bytes(shard.rows)} bytes")
        flat = torch.from_file(
            str(self.folder / shard.name), size=shard.rows * self.d_model, dtype=ROW_DTYPE
        )
        return flat.view(shard.rows, self.d_model)

    def check(self, shard: Shard, rows: BFloat16[Tensor, "tok d_model"]) -> None:
        """Read a mapped shard once, and see whether it is what was written.

        Raises:
            InputError: It is not.
        """
        found = zlib.crc32(_bytes(rows))
        if found != shard.crc32:
            raise self._damaged(shard, f"checksum {found:08x} instead of {shard.crc32:08x}")

    def _damaged(self, shard: Shard, how: str) -> InputError:
        return InputError(
            f"data.cache={str(self.folder)!r}: shard {shard.name} is damaged ({how}); delete that "
            "file and start again: it is written anew"
        )


def _bytes(rows: BFloat16[Tensor, "tok d_model"]) -> memoryview:
    return rows.view(torch.uint8).numpy().data.cast("B")


def _replace(path: Path, data: memoryview) -> None:
    """Put a whole file in the place of another, and on the disk."""
    try:
        with replacing(path) as part:
            part.write_bytes(data)
    except OSError as e:
        raise InputError(
            f"data.cache={str(path.parent)!r}: {path.name} cannot be written ({e.strerror}); what "
            "is listed there stays good: give room, or another folder, and start again"
        ) from e
