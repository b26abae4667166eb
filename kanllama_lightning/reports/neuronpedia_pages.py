"""The pages that Neuronpedia shows of a head's latents, from a pass of our own over text."""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.console.phase import Phase
from kanllama_lightning.data.packing import Rows
from kanllama_lightning.exchange.neuronpedia import LatentPage, PageContext
from kanllama_lightning.functional.lens import LensStatistics
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.token_text import token_text
from kanllama_lightning.measures.contexts import Contexts, Windows
from kanllama_lightning.measures.directions import DirectionStats, read_directions
from kanllama_lightning.measures.head_batch import run_head
from kanllama_lightning.measures.linear_bins import LinearBins
from kanllama_lightning.reports.labels import Known
from kanllama_lightning.reports.report import EvalRun
from kanllama_lightning.reports.saved_head import SavedHead
from kanllama_lightning.reports.token_sets import batches
from kanllama_lightning.runs.folder import EVAL, SUMMARY
from kanllama_lightning.storage.small_files import read_json, there
from kanllama_lightning.types import InputError, ValidationBatch

TOP, PER_BAND, BANDS, SAMPLED, WIDTH = 20, 5, 5, 50, 64
"""Strongest contexts of a latent; contexts of each of equal parts of its range of activations, and
random firings that these are taken of; tokens of a context."""
SHOWN_TOKENS, COORDINATES, LENS_BINS, ROWS = 10, 3, 50, 4096

TokenName = Callable[[int], str]


class Looked(NamedTuple):
    """What a pass over text found."""

    contexts: Contexts
    bins: LinearBins
    directions: DirectionStats


@torch.no_grad()
def look(head: SAEHead, lm: FrozenLM, rows: Rows, set_name: str, seqs: int) -> Looked:
    """Run a head over text.

    Args:
        head: In evaluation mode, on the LM's device.
        lm: Loaded.
        rows: The text.
        set_name: What the text is called.
        seqs: Rows of a batch.

    Raises:
        InputError: Latents are negative, none fires, or the LM's activations are no numbers.
    """
    contexts = Contexts(head.d_sae, WIDTH, TOP, SAMPLED, silent=0)
    bins = LinearBins(head.d_sae)
    some: list[Float[Tensor, "tok d_model"]] = []
    with Phase("reading", -(-len(rows.ids) // seqs), "batches") as progress:
        for tokens in batches(rows, seqs):
            tokens = tokens.to(lm.device)
            batch = run_head(lm.prefix(tokens.ids), tokens, set_name, head)
            contexts.update(batch)
            bins.update(_codes(batch, head))
            if sum(map(len, some)) < ROWS:
                some.append(batch.x)
            progress.add()
    n, fired = int(contexts.meter.n), contexts.meter.fired
    if not fired.any():
        raise InputError(
            f"--text: of {head.d_sae:,} latents none fires on {n:,} tokens of {set_name!r}: there "
            "is nothing to show; give other text, or more of it (--tokens)"
        )
    x = torch.cat(some)[:ROWS]
    meter = contexts.meter.to(x.device)
    found = read_directions(head, lm, meter, x, SHOWN_TOKENS, judged=0, bins=LENS_BINS)
    contexts.meter.cpu()
    return Looked(contexts, bins, found)


def _codes(batch: ValidationBatch, head: SAEHead) -> SparseCodes:
    """The codes of a batch on the CPU."""
    codes = batch.out.codes.sparse()
    if bool((codes.values < 0).any()):
        raise InputError(
            f"--to neuronpedia: latents of {head.title} have both signs, and pages there are of "
            "latents that are 0 or positive; `evaluate.py report` shows them here"
        )
    return codes._replace(
        values=codes.values.float().cpu(), rows=codes.rows.cpu(), latents=codes.latents.cpu()
    )


def known_of(subject: SavedHead, lm: FrozenLM) -> Known:
    """What the record says of the latents; nothing if there is none of these weights."""
    summary = subject.folder / EVAL / SUMMARY
    if not there(summary):
        return Known({}, {})
    if read_json(summary, dict[str, Any]).get("head_sha256") != subject.sha256:
        return Known({}, {})
    home: Path = subject.folder / EVAL
    return Known.read(EvalRun(subject.folder, subject.head, lm, subject.card, [], home))


def pages(looked: Looked, lm: FrozenLM, known: Known) -> Iterator[LatentPage]:
    """The page of every latent, in order.

    Args:
        looked: What the pass found.
        lm: That it was made with.
        known: Explanations.
    """
    contexts = looked.contexts
    lens = LensStatistics(*(values.cpu() for values in looked.directions.lens))
    directions = looked.directions.directions.cpu()
    frequency, largest = contexts.meter.frequency(), contexts.meter.largest
    text = cache(partial(token_text, lm.tokenizer))
    for j in range(contexts.d_sae):
        middles, heights = looked.bins.bars(j)
        judged = known.scores.get(j)
        defined = bool(lens.std[j].isfinite())
        yield LatentPage(
            j,
            float(frequency[j]),
            float(largest[j]),
            (middles.tolist(), heights.tolist()),
            _lens_bars(lens, j) if defined else ([], []),
            _named(text, lens.top_ids[j], lens.top_values[j]) if defined else [],
            _named(text, lens.bottom_ids[j], lens.bottom_values[j]) if defined else [],
            _coordinates(directions[j]),
            list(_contexts(looked, text, j)),
            None if judged is None else judged.explanation,
            "" if judged is None else judged.judge,
        )


def _lens_bars(lens: LensStatistics, latent: int) -> tuple[list[float], list[int]]:
    """Middles of the bins of a latent's logits, and counts."""
    low, high, counts = float(lens.low[latent]), float(lens.high[latent]), lens.counts[latent]
    middles = [low + (high - low) * (i + 0.5) / len(counts) for i in range(len(counts))]
    return middles, counts.tolist()


def _named(
    text: TokenName, tokens: Int[Tensor, " top"], values: Float[Tensor, " top"]
) -> list[tuple[str, float]]:
    return [(text(i), v) for i, v in zip(tokens.tolist(), values.tolist(), strict=True)]


def _coordinates(direction: Float[Tensor, " d_model"]) -> list[tuple[int, float, float]]:
    """The largest ones of a direction, as the site has them: by value, not by size."""
    total = float(direction.abs().sum())
    if not (math.isfinite(total) and total > 0):
        return []
    best = direction.topk(min(COORDINATES, len(direction)))
    return [
        (i, value, abs(value) / total)
        for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _contexts(looked: Looked, text: TokenName, latent: int) -> Iterator[PageContext]:
    """The strongest contexts, then examples of each part of the range, from the highest down."""
    top, sampled = looked.contexts.windows(latent)
    if not len(top):
        return
    meter, counts = looked.contexts.meter, looked.bins.counts[latent]
    n, largest = int(meter.n), float(meter.largest[latent])
    sizes = top.values[torch.arange(len(top)), top.peak]
    yield from _told(looked, text, top, sizes, (-1.0, largest, -1.0))
    width = looked.bins.width(latent)
    used = len(looked.bins.bars(latent)[0])
    edges = [round(used * i / BANDS) for i in range(BANDS + 1)]
    sizes = sampled.values[torch.arange(len(sampled)), sampled.peak].double()
    places = (sizes / width).floor().long()
    for i in reversed(range(BANDS)):
        begin, end = edges[i], edges[i + 1]
        inside = int(counts[begin:end].sum())
        if i == 0:  # the lowest holds the tokens on which the latent is silent
            inside += n - int(meter.fired[latent])
        some = sampled.pick(_spread(((places >= begin) & (places < end)).nonzero().squeeze(1)))
        high = largest if i == BANDS - 1 else end * width
        most = torch.full((len(some),), largest)
        yield from _told(looked, text, some, most, (begin * width, high, inside / n))


def _spread(some: Int[Tensor, " n"]) -> Int[Tensor, " few"]:
    """At most so many as are shown, evenly spread."""
    n = min(PER_BAND, len(some))
    return some[torch.linspace(0, len(some) - 1, n).round().long()] if n else some


def _told(
    looked: Looked,
    text: TokenName,
    windows: Windows,
    most: Float[Tensor, " n"],
    part: tuple[float, float, float],
) -> list[PageContext]:
    """Contexts of a part of the range.

    Args:
        looked: What the pass found.
        text: What a token is called.
        windows: The contexts.
        most: What no activation in each was above; all but the peaks were kept rounded.
        part: Ends of the part, and its share of the tokens.
    """
    every = windows.values.minimum(most.unsqueeze(1)).tolist()
    return [
        PageContext([text(token) for token in ids], values[: len(ids)], peak, *part)
        for ids, peak, values in zip(
            looked.contexts.ids(windows), windows.peak.tolist(), every, strict=True
        )
    ]
