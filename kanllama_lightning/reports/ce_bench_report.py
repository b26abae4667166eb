"""CE-Bench: contrastive and independence scores over pairs of opposite stories."""

import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kanllama_lightning.console.phase import Phase
from kanllama_lightning.data.vocabulary import special_ids
from kanllama_lightning.functional.bootstrap import interval
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import EMBEDDED, FrozenLM
from kanllama_lightning.lm.token_text import visible
from kanllama_lightning.measures.contrast_scores import ContrastScores, contrast_scores, permuted
from kanllama_lightning.pages.plots import PALETTE, SYMBOLS, styled
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.prompts.pairs import ENGLISH, Pair, load_pairs, world_pairs
from kanllama_lightning.prompts.text_ids import bos, check_length, seen_by, text_ids
from kanllama_lightning.reports.report import EvalRun, Figures, Report
from kanllama_lightning.storage.small_files import read_bytes
from kanllama_lightning.types import InputError

SCORES = ContrastScores._fields


class CeBenchReport(Report):
    """CE-Bench's scores of pairs of opposite stories, beside L0 and a permutation null.

    `ce_bench.csv` has a row per pair (METHODS E1). Compare heads of equal width and L0 alone: the
    scores grow with width and with sparsity.

    Args:
        pairs: File of pairs (jsonl: subject, story1, story2) instead of the shipped ones, which are
            of the story world for the embedded LM and English for any other.
        permutations: How often the latents of each story are permuted for the null.
        legacy: Independence from zero instead of from the other subjects, as in the first code.
    """

    name = "ce_bench"
    files = ("ce_bench.csv", "ce_bench.html")
    streams = False

    def __init__(
        self, pairs: str | None = None, permutations: int = 10, legacy: bool = False
    ) -> None:
        if permutations < 1:
            raise InputError(f"ce_bench.permutations={permutations}: whole numbers from 1 up")
        self.pairs, self.permutations, self.legacy = pairs, permutations, legacy
        self._pairs: list[Pair] = []
        self._ids: list[list[int]] = []

    def settings(self) -> dict[str, Any]:
        """The constructor arguments, and what is in the file of pairs."""
        path = Path(self.pairs).expanduser() if self.pairs else None
        if path is None or not path.is_file():
            return super().settings()
        return super().settings() | {"sha256": hashlib.sha256(read_bytes(path)).hexdigest()}

    def own(self) -> bool:
        """Whether the pairs are the user's own."""
        return self.pairs is not None

    def applies(self, run: EvalRun) -> str | None:
        """The shipped pairs are of no use where the LM's vocabulary has none of their words."""
        if self.pairs is not None or run.lm.name == EMBEDDED:
            return None
        special = set(special_ids(run.lm.tokenizer))
        stories = [text for pair in load_pairs(ENGLISH) for text in pair[1:]]
        if all(set(text_ids(run.lm, text, "story")) - special for text in stories):
            return None
        return (
            f"the shipped pairs are English, of which lm.name={run.lm.name!r} knows no word; give "
            "others with --ce_bench.pairs FILE"
        )

    def _chosen(self, lm: FrozenLM) -> list[Pair]:
        world = self.pairs is None and lm.name == EMBEDDED
        return world_pairs() if world else load_pairs(self.pairs or ENGLISH)

    def work(self, lm: FrozenLM, heads: Sequence[SAEHead], tokens: int, ctx_len: int) -> Work:
        """Every story, up to the hook point."""
        stories = [story for pair in self._chosen(lm) for story in (pair.story1, pair.story2)]
        n = sum(1 + len(text_ids(lm, story, "story")) for story in stories)
        return Work(upto=len(heads) * n)

    def begin(self, run: EvalRun) -> None:
        """Read and tokenise the pairs."""
        self._pairs = self._chosen(run.lm)
        self._ids = []
        for n, pair in enumerate(self._pairs, start=1):
            for story in (pair.story1, pair.story2):
                try:
                    ids = [bos(run.lm), *text_ids(run.lm, story, "story")]
                    check_length(run.lm, story, len(ids), "story")
                except InputError as e:
                    raise InputError(f"ce_bench.pairs={self.pairs!r}, pair {n}: {e}") from e
                self._ids.append(ids)

    def finish(self, run: EvalRun) -> Figures:
        """Latents of all stories; table, figure, means."""
        means, tokens, l0 = self._latents(run)
        subjects = [pair.subject for pair in self._pairs]
        counts = tokens.view(-1, 2)

        def scored(of: Float[Tensor, "story d_sae"]) -> ContrastScores:
            return contrast_scores(of[::2], of[1::2], counts, subjects, self.legacy)

        scores = scored(means)
        generator = torch.Generator().manual_seed(0)
        drawn = [scored(permuted(means, generator)) for _ in range(self.permutations)]
        null = ContrastScores(*(torch.stack(of).mean(0) for of in zip(*drawn, strict=True)))
        rows = []
        for i, pair in enumerate(self._pairs):
            row: dict[str, Any] = {name: visible(text) for name, text in pair._asdict().items()}
            row |= {"tokens1": int(counts[i, 0]), "tokens2": int(counts[i, 1])}
            row["l0"] = float(l0[2 * i : 2 * i + 2].sum() / counts[i].sum())
            row |= {name: float(of[i]) for name, of in zip(SCORES, scores, strict=True)}
            row |= {f"{name}_null": float(of[i]) for name, of in zip(SCORES, null, strict=True)}
            rows.append(row)
        run.write_table("ce_bench.csv", rows)
        run.write_page(
            "ce_bench.html",
            "CE-Bench",
            f"{len(rows)} pairs of opposite stories, {int(tokens.sum()):,} tokens, L0 "
            f"{float(l0.sum() / tokens.sum()):.1f}. The largest z-score of a latent; null: the "
            "latents of every story permuted. Compare heads of equal width and L0 alone.",
            [_figure(name, rows) for name in SCORES],
        )
        figures: dict[str, float | int | None] = {"n_pairs": len(rows)}
        figures |= {"n_subjects": len(set(subjects)), "l0": float(l0.sum() / tokens.sum())}
        number = {subject: i for i, subject in enumerate(dict.fromkeys(subjects))}
        of = torch.tensor([number[s] for s in subjects])
        pairs = of.bincount().double()
        for name, values in zip(SCORES, scores, strict=True):
            low, high = interval(of.bincount(weights=values), pairs)
            figures |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
            figures[f"{name}_null"] = float(getattr(null, name).mean())
        return figures

    def _latents(
        self, run: EvalRun
    ) -> tuple[Float[Tensor, "story d_sae"], Int[Tensor, " story"], Float[Tensor, " story"]]:
        """Mean latents of every story, its tokens that count, and the latents that fire on them."""
        means = torch.zeros(len(self._ids), run.head.d_sae)
        tokens = torch.zeros(len(self._ids), dtype=torch.int64)
        l0 = torch.zeros(len(self._ids), dtype=torch.float64)
        with Phase("reading", len(self._ids), "stories") as progress:
            for i, ids in enumerate(self._ids):
                seen = seen_by(run.head, run.lm, [ids])
                tokens[i] = len(seen.x)
                if not len(seen.x):
                    raise InputError(
                        f"ce_bench.pairs={self.pairs!r}, pair {i // 2 + 1}: a story has no token "
                        "that counts, only special ones or attention sinks; give a longer text"
                    )
                codes = seen.out.codes.sparse()
                sums = torch.zeros(run.head.d_sae, dtype=torch.float64)
                sums.index_add_(0, codes.latents.cpu(), codes.values.double().cpu())
                means[i] = sums / len(seen.x)
                l0[i] = float(seen.out.codes.l0().sum())
                progress.add()
        return means, tokens, l0


def _figure(name: str, rows: list[dict[str, Any]]) -> go.Figure:
    """A score of every pair by its subject, and its null."""
    figure = go.Figure()
    for i, (column, label) in enumerate([(name, "pairs"), (f"{name}_null", "null")]):
        figure.add_scatter(
            x=[escape(row["subject"]) for row in rows],
            y=[row[column] for row in rows],
            name=label,
            mode="markers",
            marker={"color": PALETTE[i], "symbol": SYMBOLS[i], "size": 9},
            hovertemplate=f"{label}: %{{y:.2f}}<extra></extra>",
        )
    return styled(figure, name.capitalize(), "subject", "largest z-score")
