"""What latents mean, against what is known: the facts of the story world, without any LLM.

The embedded world knows which facts hold in each stretch of its stories. On one half of the
stories every fact gets the latent, and the threshold on its activation, with the best F1; how well
they tell the fact is measured on the other half. The definitions of splitting and mixing are ours.

A fact is split over the latents that fire (are positive) on at least 1 % of its tokens and hardly
elsewhere: at least 90 % of the tokens they fire on have the fact.

A latent mixes as many facts as are needed to say where it fires. They are gone through from the
one with most tokens to the one with fewest; a fact counts if the latent fires on at least half of
its tokens, and at least half of those have none of the facts counted before. "cat" inside "animal"
adds nothing; "cat" and "Monday" are two.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kanllama_lightning.embedded import FACTS, Story, story
from kanllama_lightning.embedded.world import STRUCTURE
from kanllama_lightning.functional.matching import (
    Columns,
    dense_columns,
    judge,
    match,
    sparse_columns,
)
from kanllama_lightning.functional.sinks import regular
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.types import DenseCodes

SEED = 7
"""Seed of the stories; those of training are 0 unless someone asks for another."""
LEAST = 20
"""Tokens with a fact that both halves need for it to count; it also holds on half of them at most,
as one that holds on nearly all is told by a latent that always fires."""
RECOVERED = 0.9
"""F1 from which on a fact counts as recovered."""
PURE, COVERS = 0.9, 0.01
"""Precision and recall from which on a latent is one of those that a fact is split over."""
HALF = 0.5
"""Share of a fact's tokens on which a latent that mixes it in fires; and of those, that are new."""
LM_ROWS, HEAD_ROWS = 16, 4096
"""Stories, and tokens, that go through the LM, and the head, at once."""

NUMBER = {name: i for i, name in enumerate(FACTS)}
WITH_VALUES = {name.split(":")[0] for name in FACTS if ":" in name and name not in STRUCTURE}
"""Kinds of facts that have a value: "animal:cat", and "animal" too."""

Codes = SparseCodes | DenseCodes | Float[Tensor, "_ d_sae"]
"""Codes of a head; or any numbers, such as raw coordinates, of which every one is a threshold."""


class Stories(NamedTuple):
    """Stories as the LM reads them, one after the other, each alone behind a BOS; BOS left out."""

    told: list[Story]
    x: Float[Tensor, "tok d_row"]
    """What heads are given (`Prefix.rows`), fp32, on the LM's device."""
    facts: Bool[Tensor, "tok fact"]
    """Which of FACTS hold on a token: those whose stretch of text overlaps its own."""
    story: Int[Tensor, " tok"]
    """Which of `told` a token is of."""
    spans: Int[Tensor, "tok 2"]
    """Where its text begins and ends in the story."""

    def only(self, rows: Bool[Tensor, " tok"]) -> "Stories":
        """Some of the tokens."""
        x = self.x[rows.to(self.x.device)]
        return Stories(self.told, x, self.facts[rows], self.story[rows], self.spans[rows])

    def halves(self) -> tuple["Stories", "Stories"]:
        """The tokens of the first half of the stories, to choose by; those of the others."""
        first = self.story < len(self.told) // 2
        return self.only(first), self.only(~first)


class Recovery(NamedTuple):
    """What a dictionary makes of the facts that count; all but the choice is of the test half."""

    fact: Int[Tensor, " n"]
    """Number of each fact that counts: it holds on LEAST tokens, and half of them at most, in both
    halves."""
    n_tokens: Int[Tensor, " n"]
    """Number of its tokens."""
    latent: Int[Tensor, " n"]
    """The latent with the best F1 on the choosing half."""
    threshold: Float[Tensor, " n"]
    """From this activation on it says that the fact holds; inf: none has a token in common."""
    chosen_f1: Float[Tensor, " n"]
    """F1 on the choosing half."""
    f1: Float[Tensor, " n"]
    precision: Float[Tensor, " n"]
    recall: Float[Tensor, " n"]
    auroc: Float[Tensor, " n"]
    """AUROC of the same latent, over all tokens; those on which it is silent are one tie."""
    best_auroc: Float[Tensor, " n"]
    """AUROC of the latent with the best one on the choosing half."""
    split: Int[Tensor, " n"]
    """Number of latents that it is split over, found on the choosing half."""
    union_recall: Float[Tensor, " n"]
    """Share of its tokens on which at least one of them fires."""
    mixed: Int[Tensor, " alive"]
    """Number of facts that each latent mixes, on the choosing half; of latents that fire there."""
    n_seen: int
    """Number of tokens, of both halves."""

    def figures(self) -> dict[str, float]:
        """The facts together; figures about no fact or latent are left out.

        `recovered_frac` share of facts with F1 of at least RECOVERED; `split_frac` share that is
        split over at least one latent, `mean_split` over how many of those; `mixed_frac` share of
        latents that fire which mix at least one fact, `mean_mixed` how many those do.
        """
        split, mixed = self.split > 0, self.mixed > 0
        means = {
            "recovered_frac": self.f1 >= RECOVERED,
            "mean_f1": self.f1,
            "mean_auroc": self.auroc,
            "mean_best_auroc": self.best_auroc,
            "split_frac": split,
            "mean_split": self.split[split],
            "mean_union_recall": self.union_recall[split],
            "mixed_frac": mixed,
            "mean_mixed": self.mixed[mixed],
        }
        found = {k: float(v.double().mean()) for k, v in means.items() if len(v)}
        if len(self.f1):
            found["median_f1"] = float(self.f1.quantile(0.5))
        return {"n_facts": len(self.fact), **found, "n_tokens": self.n_seen}

    def kinds(self) -> list[str]:
        """The kind of each fact."""
        return [kind(FACTS[fact]) for fact in self.fact.tolist()]


def kind(fact: str) -> str:
    """What a fact is about: its name up to the first colon; "structure", "word class" without."""
    if fact in STRUCTURE:
        return "structure"
    first = fact.split(":")[0]
    return first if first in WITH_VALUES else "word class"


def read_stories(
    lm: FrozenLM, n_stories: int, seed: int = SEED, norm_limit: Tensor | None = None
) -> Stories:
    """Stories 0 to n-1 of a seed as the embedded LM reads them.

    Args:
        lm: The world's own, loaded.
        n_stories: How many, of about 130 tokens each.
        seed: Seed of the stories; not one that the head was trained on.
        norm_limit: Tokens whose activation has a larger norm are left out, as in training.
    """
    told = [story(seed, index) for index in range(n_stories)]
    tokens = lm.tokenizer(
        [s.text for s in told], return_offsets_mapping=True, add_special_tokens=False
    )
    spans = [[(start, end) for start, end in of_story] for of_story in tokens["offset_mapping"]]
    rows = [[lm.tokenizer.bos_token_id, *ids] for ids in tokens["input_ids"]]
    read = Stories(
        told,
        torch.cat([_acts(lm, rows[i : i + LM_ROWS]) for i in range(0, n_stories, LM_ROWS)]),
        torch.cat([_holds(s, where) for s, where in zip(told, spans, strict=True)]),
        torch.arange(n_stories).repeat_interleave(torch.tensor([len(s) for s in spans])),
        torch.tensor([span for of_story in spans for span in of_story]),
    )
    if norm_limit is None:
        return read
    return read.only(regular(read.x[:, -lm.d_model :], norm_limit).cpu())


def _acts(lm: FrozenLM, rows: Sequence[list[int]]) -> Float[Tensor, "tok d_row"]:
    """Activations of everything but BOS; padding goes at the end, where nothing sees it."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + row[:1] * (length - len(row)) for row in rows], device=lm.device)
    acts = lm.acts(ids).float()
    return torch.cat([a[1 : len(row)] for a, row in zip(acts, rows, strict=True)])


def _holds(told: Story, spans: Sequence[tuple[int, int]]) -> Bool[Tensor, "tok fact"]:
    """Which facts hold on each token; none ends in a blank, so one before a word does no harm."""
    starts, ends = [s for s, _ in spans], [e for _, e in spans]
    holds = np.zeros((len(spans), len(FACTS)), dtype=bool)
    for fact in told.facts:
        holds[bisect_right(ends, fact.start) : bisect_left(starts, fact.end), NUMBER[fact.name]] = (
            True
        )
    return torch.from_numpy(holds)


@torch.no_grad()
def codes_of(head: SAEHead, x: Float[Tensor, "tok d_model"]) -> SparseCodes:
    """A head's codes of many activations, on the CPU; as at inference if it is in that mode."""
    parts = [head(some).codes.sparse() for some in x.split(HEAD_ROWS)]
    rows = torch.cat([part.rows.cpu() + i * HEAD_ROWS for i, part in enumerate(parts)])
    values, latents = (torch.cat([p[i].cpu() for p in parts]) for i in (0, 2))
    return SparseCodes(values, rows, latents, len(x), head.d_sae)


def recover(
    codes_choose: Codes,
    facts_choose: Bool[Tensor, "tok fact"],
    codes_test: Codes,
    facts_test: Bool[Tensor, "tok_test fact"],
) -> Recovery:
    """Choose a latent and a threshold for every fact on one half, judge them on the other.

    Args:
        codes_choose: Codes of the choosing half, on the CPU.
        facts_choose: Which facts hold there.
        codes_test: Codes of the other half.
        facts_test: Which facts hold there.
    """
    counts = _counts(facts_choose) & _counts(facts_test)
    choose, test = facts_choose[:, counts], facts_test[:, counts]
    columns, other = _columns(codes_choose), _columns(codes_test)
    found = match(columns, choose)
    chosen_f1, latent = found.f1.max(1)
    threshold = found.threshold.gather(1, latent[:, None]).squeeze(1)
    judged = judge(other, test, latent, threshold)
    ranking = found.auroc.argmax(1)
    fires = torch.stack([(v > 0).sum() for v in columns.values.tensor_split(columns.starts[1:-1])])
    held = choose.sum(0)[:, None]
    pure = (found.hits >= PURE * fires) & (found.hits >= COVERS * held)
    mixes = found.hits >= HALF * held
    return Recovery(
        counts.nonzero().squeeze(1),
        test.sum(0),
        latent,
        threshold,
        chosen_f1,
        *judged,
        judge(other, test, ranking, torch.full_like(threshold, torch.inf)).auroc,
        pure.sum(1),
        _union_recall(other, test, pure),
        _mixed(columns, choose, mixes)[fires > 0],
        len(choose) + len(test),
    )


def _counts(facts: Bool[Tensor, "tok fact"]) -> Bool[Tensor, " fact"]:
    """The facts that hold often enough to be judged, and not too often to mean something."""
    held = facts.sum(0)
    return (held >= LEAST) & (2 * held <= len(facts))


def _columns(codes: Codes) -> Columns:
    if isinstance(codes, Tensor):
        return dense_columns(codes)
    return sparse_columns(*codes.sparse())


def _fires(columns: Columns, latent: int) -> Int[Tensor, " some"]:
    """The tokens on which a latent is positive."""
    at = slice(int(columns.starts[latent]), int(columns.starts[latent + 1]))
    return columns.rows[at][columns.values[at] > 0]


def _union_recall(
    columns: Columns, facts: Bool[Tensor, "tok fact"], pure: Bool[Tensor, "fact d_sae"]
) -> Float[Tensor, " fact"]:
    """Share of each fact's tokens on which any of its latents fires."""
    found = torch.zeros(len(pure), dtype=torch.float64)
    for i, latents in enumerate(pure):
        fired = torch.zeros(columns.n_rows, dtype=torch.bool)
        for latent in latents.nonzero().squeeze(1).tolist():
            fired[_fires(columns, latent)] = True
        found[i] = (fired & facts[:, i]).sum() / facts[:, i].sum()
    return found


def _mixed(
    columns: Columns, facts: Bool[Tensor, "tok fact"], mixes: Bool[Tensor, "fact d_sae"]
) -> Int[Tensor, " d_sae"]:
    """Number of facts that each latent mixes, among those on half of whose tokens it fires."""
    order = facts.sum(0).argsort(descending=True, stable=True)
    held = [fact.nonzero().squeeze(1) for fact in facts.T]
    found = torch.zeros(mixes.shape[1], dtype=torch.int64)
    for latent in mixes.any(0).nonzero().squeeze(1).tolist():
        fired, covered = torch.zeros(2, columns.n_rows, dtype=torch.bool)
        fired[_fires(columns, latent)] = True
        for fact in order[mixes[order, latent]].tolist():
            those = held[fact][fired[held[fact]]]
            if (~covered[those]).sum() >= HALF * len(those):
                found[latent] += 1
                covered[those] = True
    return found
