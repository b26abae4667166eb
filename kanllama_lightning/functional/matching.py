"""How well latents tell where known facts hold: F1 at the best threshold, and AUROC, of every pair.

A latent says that a fact holds on the tokens where its activation is at least a threshold. Tokens
of equal activation stay together, whatever the threshold, and count half in AUROC. Facts hold on
few tokens and latents fire on few, so only what they have in common is ever looked at.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 1 << 18
"""(token, latent, fact) triples that are worked on at once; a latent is never cut."""


class Columns(NamedTuple):
    """Activations latent by latent, the largest first."""

    values: Float[Tensor, " nnz"]
    rows: Int[Tensor, " nnz"]
    """Token of each value, int32."""
    starts: Int[Tensor, " starts"]
    """Where each of d_sae latents begins; one more, the last, is nnz."""
    n_rows: int
    floor: float
    """Thresholds lie above it: 0 where tokens that are not listed are zeros, -inf where all are."""


class Matches(NamedTuple):
    """Every pair of a fact and a latent; fp64."""

    f1: Float[Tensor, "fact d_sae"]
    """At the best threshold; 0 where they have no token in common."""
    threshold: Float[Tensor, "fact d_sae"]
    """The largest at which F1 is best; inf where they have no token in common."""
    auroc: Float[Tensor, "fact d_sae"]
    """NaN for a fact that holds nowhere or everywhere."""
    hits: Float[Tensor, "fact d_sae"]
    """Number of the fact's tokens on which the latent is positive."""


class Judgement(NamedTuple):
    """How well a given latent with a given threshold tells each fact; fp64."""

    f1: Float[Tensor, " fact"]
    precision: Float[Tensor, " fact"]
    """0 where the latent never reaches the threshold."""
    recall: Float[Tensor, " fact"]
    """0 for a fact that holds nowhere, as is F1."""
    auroc: Float[Tensor, " fact"]
    """AUROC of the latent, at all thresholds; NaN for a fact that holds nowhere or everywhere."""


def sparse_columns(
    values: Float[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    latents: Int[Tensor, " nnz"],
    n_rows: int,
    d_sae: int,
) -> Columns:
    """Columns of sparse codes; every activation that is not listed is 0.

    Args:
        values: Activations; zeros among them are as if not listed, those below rank below zeros.
        rows: Token of each.
        latents: Latent of each.
        n_rows: Number of tokens.
        d_sae: Number of latents.
    """
    order = values.argsort(descending=True, stable=True)
    order = order[values[order] != 0]
    order = order[latents[order].argsort(stable=True)]
    counts = torch.bincount(latents[order], minlength=d_sae)
    return Columns(values[order], rows[order].int(), _starts(counts), n_rows, 0.0)


def dense_columns(latents: Float[Tensor, "tok d_sae"]) -> Columns:
    """Columns of dense codes, signed ones too: any threshold will do."""
    n, d_sae = latents.shape
    values, rows = latents.T.sort(dim=1, descending=True)
    starts = torch.arange(d_sae + 1, device=latents.device) * n
    return Columns(values.reshape(-1), rows.int().reshape(-1), starts, n, -torch.inf)


def match(columns: Columns, facts: Bool[Tensor, "tok fact"], block: int = BLOCK) -> Matches:
    """F1 at the best threshold, that threshold, and AUROC of every fact and latent; all exact.

    Args:
        columns: The activations.
        facts: Where each fact holds.
        block: Triples (token, latent, fact) worked on at once; the result does not depend on it.
    """
    n, n_facts = facts.shape
    d_sae = len(columns.starts) - 1
    token, which = facts.nonzero(as_tuple=True)
    per_token = torch.bincount(token, minlength=n)
    positives = torch.bincount(which, minlength=n_facts)
    first = per_token.cumsum(0) - per_token
    f1, auroc, hits = (positives.new_zeros(d_sae, n_facts, dtype=torch.float64) for _ in range(3))
    threshold = torch.full_like(f1, torch.inf)
    reach = torch.cat([per_token.new_zeros(1), per_token[columns.rows].cumsum(0)])[columns.starts]
    for lo, hi in _blocks(reach.tolist(), block):
        at = slice(int(columns.starts[lo]), int(columns.starts[hi]))
        values, rows = columns.values[at], columns.rows[at]
        latent, above, rank, zero_rank = _ranks(columns, lo, hi)
        # one event for each entry and each fact of its token
        per_entry = per_token[rows]
        entry = torch.arange(len(rows), device=rows.device).repeat_interleave(per_entry)
        nth = torch.arange(len(entry), device=rows.device)
        begin = first[rows] - per_entry.cumsum(0) + per_entry
        pair = which[nth + begin[entry]] + (latent * n_facts)[entry]
        size = (hi - lo) * n_facts
        common = torch.bincount(pair, minlength=size)
        ranks = torch.bincount(pair, weights=rank[entry], minlength=size).double()
        ranks = ranks.view(hi - lo, n_facts)
        ranks += zero_rank[:, None] * (positives - common.view(hi - lo, n_facts))
        auroc[lo:hi] = _auroc(ranks, positives, n)
        fires = (values > 0).double()[entry]
        hits[lo:hi] = torch.bincount(pair, weights=fires, minlength=size).view(hi - lo, n_facts)
        allowed = torch.bincount(latent[values > columns.floor], minlength=hi - lo)
        limits = allowed.repeat_interleave(n_facts)
        best, least = _best(pair, above[entry], common, positives.repeat(hi - lo), limits, n)
        start = columns.starts[lo:hi].repeat_interleave(n_facts)
        reached = best > 0
        f1[lo:hi] = best.view(hi - lo, n_facts)
        at_best = columns.values[(start + least - 1)[reached]]
        threshold[lo:hi].view(-1)[reached] = at_best.double()
    return Matches(f1.T, threshold.T, auroc.T, hits.T)


def judge(
    columns: Columns,
    facts: Bool[Tensor, "tok fact"],
    latents: Int[Tensor, " fact"],
    thresholds: Float[Tensor, " fact"],
) -> Judgement:
    """How well the latents and thresholds given, chosen on other tokens, tell the facts.

    Args:
        columns: The activations.
        facts: Where each fact holds.
        latents: The latent of each fact.
        thresholds: It says that the fact holds from this activation on.
    """
    positives = facts.sum(0)
    result = torch.zeros(3, facts.shape[1], dtype=torch.float64, device=facts.device)
    found, said, ranks = result
    for i, (latent, threshold) in enumerate(zip(latents.tolist(), thresholds, strict=True)):
        at = slice(int(columns.starts[latent]), int(columns.starts[latent + 1]))
        holds, says = facts[columns.rows[at], i], columns.values[at] >= threshold
        found[i], said[i] = (holds & says).sum(), says.sum()
        _, _, rank, zero_rank = _ranks(columns, latent, latent + 1)
        ranks[i] = rank[holds].sum() + zero_rank[0] * (positives[i] - holds.sum())
    return Judgement(
        2 * found / (said + positives).clamp_min(1),
        found / said.clamp_min(1),
        found / positives.clamp_min(1),
        _auroc(ranks, positives, columns.n_rows),
    )


def _starts(counts: Int[Tensor, " d_sae"]) -> Int[Tensor, " d_sae+1"]:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _blocks(reach: list[int], block: int) -> Iterator[tuple[int, int]]:
    """Ranges of latents whose triples, summed up to each latent in `reach`, fit into a block."""
    lo = 0
    for hi in range(1, len(reach)):
        if hi == len(reach) - 1 or reach[hi + 1] - reach[lo] > block:
            yield lo, hi
            lo = hi


def _ranks(columns: Columns, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each entry of latents lo to hi: its latent, counted from lo; the number of tokens
    that are at least as active; its rank among all tokens, the least active first, ties at their
    mean. For each latent: the rank of the tokens that are not listed.
    """
    starts = columns.starts[lo : hi + 1] - columns.starts[lo]
    values = columns.values[int(columns.starts[lo]) : int(columns.starts[hi])]
    counts = starts.diff()
    absent = columns.n_rows - counts
    latent = torch.arange(hi - lo, device=values.device).repeat_interleave(counts)
    new = torch.ones_like(values, dtype=torch.bool)
    new[1:] = (values[1:] != values[:-1]) | (latent[1:] != latent[:-1])
    group = new.cumsum(0) - 1
    size = torch.bincount(group)
    above = size.cumsum(0)[group] - starts[latent]
    below_zeros = (values < 0) * absent[latent]
    rank = columns.n_rows + 1 - (above + below_zeros - (size[group] - 1) / 2).double()
    positive = torch.bincount(latent, weights=(values > 0).double(), minlength=hi - lo)
    return latent, above + below_zeros, rank, columns.n_rows - positive - (absent - 1) / 2


def _best(
    pair: Int[Tensor, " events"],
    above: Int[Tensor, " events"],
    common: Int[Tensor, " pairs"],
    positives: Int[Tensor, " pairs"],
    limits: Int[Tensor, " pairs"],
    n: int,
) -> tuple[Float[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """For each pair of a latent and a fact: the best F1, and the least tokens said to have it.

    Args:
        pair: Pair of each token with the fact on which the latent is listed.
        above: How many tokens are at least as active as that one.
        common: Number of events of each pair.
        positives: Tokens of the fact.
        limits: Most tokens that a threshold may let through.
        n: Number of tokens.
    """
    # by pair and falling activation; in a tie only the last event counts all of it, and the others
    # have a smaller F1
    said = (pair * (n + 1) + above).sort().values
    pair = torch.arange(len(common), device=pair.device).repeat_interleave(common)
    said -= pair * (n + 1)
    first = common.cumsum(0) - common
    true = torch.arange(1, len(pair) + 1, device=pair.device) - first.repeat_interleave(common)
    f1 = 2 * true.double() / (said + positives.repeat_interleave(common))
    f1.masked_fill_(said > limits.repeat_interleave(common), 0)
    best = f1.new_zeros(len(common)).scatter_reduce_(0, pair, f1, "amax")
    reached = f1 == best.repeat_interleave(common)
    least = torch.full_like(common, n).scatter_reduce_(0, pair[reached], said[reached], "amin")
    return best, least


def _auroc(ranks: Tensor, positives: Int[Tensor, " fact"], n: int) -> Tensor:
    """Mann and Whitney's U over the number of pairs, from the summed ranks of the positives."""
    return (ranks - positives * (positives + 1) / 2) / (positives * (n - positives))
