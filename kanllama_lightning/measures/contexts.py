"""Where latents fire: windows of text around firings, found in one pass, with bounded memory.

Of every latent the strongest firings are kept and a random sample of all, at most one of each
document; beside them random windows, for showing a judge where a latent is silent. What is kept
depends on the text alone, not on how it is cut into batches.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.measures.metrics import Activations
from kanllama_lightning.types import ValidationBatch

BEFORE = 0.75
"""Share of a window that lies before the token it was taken for, where there is enough text."""
CELLS = 1 << 22
"""Numbers that merging works on at once."""


class Windows(NamedTuple):
    """Windows of text, each around one token; of one latent, or (silent ones) of none."""

    row: Int[Tensor, " n"]
    """Row of the set."""
    start: Int[Tensor, " n"]
    """Position in the row at which it begins."""
    length: Int[Tensor, " n"]
    """Tokens; all of one document, all text (no BOS)."""
    peak: Int[Tensor, " n"]
    """Place, within the window, of the token it was taken for."""
    doc: Int[Tensor, " n"]
    """Document it is of."""
    values: Float[Tensor, "n width"]
    """Activation of the latent on each token, exact to 1 in 1,000 but for the peak's; 0 where it
    is silent, beyond the end, and on tokens that do not count."""

    def pick(self, index: Int[Tensor, " some"] | Bool[Tensor, " n"] | slice) -> "Windows":
        """Some of them."""
        return Windows(*(t[index] for t in self))

    def __len__(self) -> int:  # of windows, not of fields
        return self.row.shape[0]


class _Kept(NamedTuple):
    """The best entries so far of many owners; empty places have the score -inf."""

    score: Float[Tensor, "owners kept"]
    """fp64."""
    place: Int[Tensor, "owners kept"]
    """row * row length + position of the token."""
    doc: Int[Tensor, "owners kept"]
    size: Float[Tensor, "owners kept"]
    """Activation of the token, fp32."""
    values: Float[Tensor, "owners kept width"]
    """Activations of the window, fp16."""


def _empty(owners: int, kept: int, width: int) -> _Kept:
    return _Kept(
        torch.full((owners, kept), -torch.inf, dtype=torch.float64),
        torch.full((owners, kept), -1, dtype=torch.int64),
        torch.full((owners, kept), -1, dtype=torch.int64),
        torch.zeros(owners, kept),
        torch.zeros(owners, kept, width, dtype=torch.float16),
    )


class Contexts:
    """Collects windows for all latents; lives on the CPU.

    Args:
        d_sae: Number of latents.
        width: Tokens of a window.
        top: Strongest firings kept per latent.
        sampled: Random firings kept per latent: all of them put in a random order, the first of
            each document counts.
        silent: Random windows kept in all, whatever fires there.
        seed: Seed of the random choices.
    """

    def __init__(
        self,
        d_sae: int,
        width: int = 32,
        top: int = 20,
        sampled: int = 100,
        silent: int = 1000,
        seed: int = 0,
    ) -> None:
        self.d_sae, self.width, self.seed = d_sae, width, seed
        self.meter = Activations(d_sae)
        """How often and how strongly each latent fires."""
        self._top = _empty(d_sae, top, width)
        self._sampled = _empty(d_sae, sampled, width)
        self._silent = _empty(1, silent, 0)
        self._pairs = torch.zeros(0, 2, dtype=torch.int64)
        self._ids: list[Int[Tensor, "batch pos"]] = []
        self._segments: list[Int[Tensor, "batch pos 2"]] = []
        self._rows = 0

    def update(self, batch: ValidationBatch) -> None:
        """Take in one batch; all batches have rows of one length, and come in order."""
        tokens, mask = batch.tokens, batch.mask.cpu()
        codes = batch.out.codes.sparse()
        codes = SparseCodes(
            codes.values.detach().float().cpu(), codes.rows.cpu(), codes.latents.cpu(), *codes[3:]
        )
        self.meter.update(codes)
        segments = _segments(tokens.keep.cpu(), tokens.doc.cpu())
        self._ids.append(tokens.ids.cpu().to(torch.int32))
        self._segments.append(segments.to(torch.int32))
        seen = _Seen(mask, tokens.doc.cpu(), segments, codes, self._rows, self.width)
        fires = codes.values != 0
        latents, rows = codes.latents[fires], codes.rows[fires]
        size = codes.values[fires]
        place = seen.place[rows]
        strength = size.abs().double()
        self._merge(self._top, seen, latents, place, strength, size)
        chance = _chance(place * self.d_sae + latents, self.seed)
        self._merge(self._sampled, seen, latents, place, chance, size)
        self._keep_silent(seen)
        self._rows += len(mask)

    def windows(self, latent: int) -> tuple[Windows, Windows]:
        """The strongest firings of a latent, strongest first; and the random ones, likewise."""
        return self._windows(self._top, latent), self._windows(self._sampled, latent)

    def silent(self, latent: int) -> Windows:
        """Random windows of text, one of a document, in which the latent fires nowhere."""
        known = self._windows(self._silent, 0)
        places = known.row * self.row_length + known.start + known.peak
        fires = self._pairs[self._pairs[:, 1] == latent, 0]
        return known.pick(~torch.isin(places, fires))

    def ids(self, windows: Windows) -> list[list[int]]:
        """Token ids of windows."""
        every = self._every_id()
        return [
            every[row, start : start + length].tolist()
            for row, start, length in zip(
                windows.row.tolist(), windows.start.tolist(), windows.length.tolist(), strict=True
            )
        ]

    def row_ids(self, row: int, end: int) -> Int[Tensor, " end"]:
        """Token ids of a row up to a position, BOS first: what the LM saw there."""
        return self._every_id()[row, :end].long()

    def goes_on(self, row: int, position: int) -> bool:
        """Whether the text goes on behind a token, in its row."""
        self._every_id()
        return int(self._segments[0][row, position, 1]) > position + 1

    @property
    def row_length(self) -> int:
        """Positions of a row."""
        return self._ids[0].shape[1]

    def _every_id(self) -> Int[Tensor, "rows pos"]:
        if len(self._ids) > 1:
            self._ids = [torch.cat(self._ids)]
            self._segments = [torch.cat(self._segments)]
        return self._ids[0]

    def _windows(self, kept: _Kept, owner: int) -> Windows:
        self._every_id()
        there = kept.score[owner].isfinite().nonzero().squeeze(1)
        place = kept.place[owner, there]
        size = kept.size[owner, there]
        order = (size.abs().double().neg() + place * 1e-12).argsort(stable=True)
        there, place, size = there[order], place[order], size[order]
        row, position = place // self.row_length, place % self.row_length
        start, length = _extent(self._segments[0][row, position].long(), position, self.width)
        values = kept.values[owner, there].float()
        peak = position - start
        if values.shape[1]:
            values[torch.arange(len(there)), peak] = size
        return Windows(row, start, length, peak, kept.doc[owner, there], values)

    def _merge(
        self,
        kept: _Kept,
        seen: "_Seen",
        owners: Int[Tensor, " n"],
        place: Int[Tensor, " n"],
        score: Float[Tensor, " n"],
        size: Float[Tensor, " n"],
    ) -> None:
        """Put the entries that are among their owner's best into `kept`, one of each document."""
        if not kept.score.shape[1]:
            return
        hopeful = score >= kept.score.min(1).values[owners]
        owners, place, score, size = (t[hopeful] for t in (owners, place, score, size))
        best = _best_of(owners, seen.doc_of(place), score)
        owners, place, score, size = (t[best] for t in (owners, place, score, size))
        order = owners.argsort(stable=True)
        owners, place, score, size = (t[order] for t in (owners, place, score, size))
        some, counts = owners.unique_consecutive(return_counts=True)
        if not len(some):
            return
        step = max(1, CELLS // (int(counts.max()) + kept.score.shape[1]) // max(1, self.width))
        ends = counts.cumsum(0)
        for first in range(0, len(some), step):
            part = slice(first, first + step)
            begin = int(ends[first - 1]) if first else 0
            end = int(ends[min(first + step, len(some)) - 1])
            those = slice(begin, end)
            self._merge_some(
                kept, seen, some[part], counts[part], place[those], score[those], size[those]
            )

    def _merge_some(
        self,
        kept: _Kept,
        seen: "_Seen",
        some: Int[Tensor, " m"],
        counts: Int[Tensor, " m"],
        place: Int[Tensor, " n"],
        score: Float[Tensor, " n"],
        size: Float[Tensor, " n"],
    ) -> None:
        n_kept, wide = kept.score.shape[1], int(counts.max())
        line = torch.arange(len(some)).repeat_interleave(counts)
        column = torch.arange(len(line)) - (counts.cumsum(0) - counts)[line]
        new = _empty(len(some), wide, 0)
        for to, value in ((new.score, score), (new.place, place), (new.size, size)):
            to[line, column] = value
        new.doc[line, column] = seen.doc_of(place)
        scores = torch.cat([kept.score[some], new.score], 1)
        docs = torch.cat([kept.doc[some], new.doc], 1)
        places = torch.cat([kept.place[some], new.place], 1)
        sizes = torch.cat([kept.size[some], new.size], 1)
        scores = _one_each(scores, docs, places)
        # ties go to the earlier token, however the text is cut
        order = places.argsort(dim=1, stable=True)
        order = order.gather(
            1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True)
        )
        chosen = order[:, :n_kept]
        kept.score[some] = scores.gather(1, chosen)
        kept.doc[some] = docs.gather(1, chosen)
        kept.place[some] = places.gather(1, chosen)
        kept.size[some] = sizes.gather(1, chosen)
        if kept.values.shape[2]:
            old = kept.values[some]
            held = chosen < n_kept
            moved = old.gather(
                1, chosen.clamp_max(n_kept - 1).unsqueeze(2).expand(-1, -1, old.shape[2])
            )
            fresh = ~held & kept.score[some].isfinite()
            at, where = fresh.nonzero(as_tuple=True)
            moved[at, where] = seen.activations(some[at], places.gather(1, chosen)[at, where])
            kept.values[some] = moved

    def _keep_silent(self, seen: "_Seen") -> None:
        """Random windows of the batch, one of a document, and what fires in them."""
        place = seen.places()
        chance = _chance(place, self.seed + 1)
        best = _best_of(torch.zeros_like(place), seen.doc_of(place), chance)
        place, chance = place[best], chance[best]
        self._merge(
            self._silent, seen, torch.zeros_like(place), place, chance, torch.zeros(len(place))
        )
        here = self._silent.place[0]
        here = here[here >= seen.first]
        self._pairs = torch.cat([self._pairs, seen.pairs(here)])
        self._pairs = self._pairs[torch.isin(self._pairs[:, 0], self._silent.place[0])]


class _Seen:
    """A batch: where its tokens are, and what fires on them."""

    def __init__(
        self,
        mask: Bool[Tensor, "batch pos"],
        doc: Int[Tensor, "batch pos"],
        segments: Int[Tensor, "batch pos 2"],
        codes: SparseCodes,
        first_row: int,
        width: int,
    ) -> None:
        self.length, self.width, self.d_sae = mask.shape[1], width, codes.d_sae
        self.first = first_row * self.length
        self.doc, self.segments = doc.flatten(), segments.view(-1, 2)
        where = mask.flatten()
        self.place = where.nonzero().squeeze(1) + self.first
        """Place in the text of every token that counts."""
        self.row = torch.where(where, where.cumsum(0) - 1, -1)
        """Row of the codes of every position; -1 where there is none."""
        keys = codes.rows * codes.d_sae + codes.latents
        self.keys, order = keys.sort()
        self.values = codes.values[order]

    def doc_of(self, place: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Document of each token."""
        return self.doc[place - self.first]

    def places(self) -> Int[Tensor, " n"]:
        """Every token that counts."""
        return self.place

    def _around(
        self, place: Int[Tensor, " n"]
    ) -> tuple[Int[Tensor, "n width"], Bool[Tensor, "n width"]]:
        """Rows of the codes of the tokens of each window; which of them there are."""
        at = place - self.first
        position = at % self.length
        start, length = _extent(self.segments[at], position, self.width)
        steps = torch.arange(self.width)
        inside = steps < length.unsqueeze(1)
        begin = (at - position + start).unsqueeze(1)
        rows = self.row[(begin + steps).clamp_max(len(self.row) - 1)]
        return rows, inside & (rows >= 0)

    def activations(
        self, latents: Int[Tensor, " n"], place: Int[Tensor, " n"]
    ) -> Float[Tensor, "n width"]:
        """Activations of a latent each in the windows around tokens, fp16."""
        rows, there = self._around(place)
        found = torch.zeros(rows.shape, dtype=torch.float16)
        if not len(self.keys):
            return found
        keys = rows * self.d_sae + latents.unsqueeze(1)
        at = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        hit = there & (self.keys[at] == keys)
        found[hit] = self.values[at[hit]].clamp(-65504, 65504).half()
        return found

    def pairs(self, place: Int[Tensor, " n"]) -> Int[Tensor, "pairs 2"]:
        """(token, latent) for every latent that fires in the window around the token."""
        rows, there = self._around(place)
        found = []
        for where, some in zip(place.tolist(), (r[t] for r, t in zip(rows, there, strict=True)),
                               strict=True):  # fmt: skip
            lo, hi = (
                torch.searchsorted(self.keys, some * self.d_sae),
                torch.searchsorted(self.keys, (some + 1) * self.d_sae),
            )
            spans = [
                torch.arange(a, b)[self.values[a:b] != 0]
                for a, b in zip(lo.tolist(), hi.tolist(), strict=True)
            ]
            latents = (self.keys[torch.cat(spans)] % self.d_sae).unique() if spans else None
            if latents is not None:
                found.append(torch.stack([torch.full_like(latents, where), latents], 1))
        return torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.int64)


def _segments(
    keep: Bool[Tensor, "batch pos"], doc: Int[Tensor, "batch pos"]
) -> Int[Tensor, "batch pos 2"]:
    """First and last position (exclusive) of the stretch of one document's text around each."""
    n = keep.shape[1]
    steps = torch.arange(n).expand_as(doc)
    begins = torch.ones_like(keep)
    begins[:, 1:] = (doc[:, 1:] != doc[:, :-1]) | (keep[:, 1:] != keep[:, :-1])
    start = torch.where(begins, steps, 0).cummax(1).values
    ends = torch.ones_like(keep)
    ends[:, :-1] = begins[:, 1:]
    end = torch.where(ends, steps + 1, n).flip(1).cummin(1).values.flip(1)
    return torch.stack([start, end], 2)


def _extent(
    segment: Int[Tensor, "n 2"], position: Int[Tensor, " n"], width: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Start and length of the window around positions, inside their stretches of text."""
    begin, end = segment.unbind(1)
    start = (position - int(BEFORE * width)).minimum(end - width).maximum(begin)
    return start, (end - start).clamp_max(width)


def _best_of(
    owners: Int[Tensor, " n"], docs: Int[Tensor, " n"], score: Float[Tensor, " n"]
) -> Int[Tensor, " m"]:
    """For each owner and document, the entry with the best score; the first of equals."""
    order = score.argsort(descending=True, stable=True)
    order = order[docs[order].argsort(stable=True)]
    order = order[owners[order].argsort(stable=True)]
    new = torch.ones(len(order), dtype=torch.bool)
    own, doc = owners[order], docs[order]
    new[1:] = (own[1:] != own[:-1]) | (doc[1:] != doc[:-1])
    return order[new]


def _one_each(
    score: Float[Tensor, "m n"], doc: Int[Tensor, "m n"], place: Int[Tensor, "m n"]
) -> Float[Tensor, "m n"]:
    """The scores, -inf for all but the best entry of each document (the earliest of equals)."""
    order = place.argsort(dim=1, stable=True)
    order = order.gather(1, score.gather(1, order).argsort(dim=1, descending=True, stable=True))
    order = order.gather(1, doc.gather(1, order).argsort(dim=1, stable=True))
    docs = doc.gather(1, order)
    again = torch.zeros_like(docs, dtype=torch.bool)
    again[:, 1:] = (docs[:, 1:] == docs[:, :-1]) & (docs[:, 1:] >= 0)
    return score.masked_fill(torch.zeros_like(again).scatter(1, order, again), -torch.inf)


def _chance(keys: Int[Tensor, " n"], seed: int) -> Float[Tensor, " n"]:
    """A random number in [0, 1) for every key: the same for the same key and seed.

    splitmix64 (Steele, Lea and Flood 2014), whose arithmetic wraps as int64's does.
    """

    def shifted(z: Tensor, by: int) -> Tensor:
        return (z >> by) & ((1 << (64 - by)) - 1)  # a logical shift

    z = keys * -7046029254386353131 + seed * 0x632BE59B
    z = (z ^ shifted(z, 30)) * -4658895280553007687
    z = (z ^ shifted(z, 27)) * -7723592293110705685
    return shifted(z ^ shifted(z, 31), 11).double() / 2**53
