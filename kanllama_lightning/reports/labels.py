"""What a latent is called: one label, whoever shows it."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kanllama_lightning.contexts import Contexts
from kanllama_lightning.dashboard.data import Concept, Scores
from kanllama_lightning.prompts.reading import token_text
from kanllama_lightning.reports.base import EvalRun

READS = ("concepts.csv", "interpretability.csv")
"""Files of a record that labels come from, where they are there."""
TELLING = 0.5
"""F1 from which on a known fact is what a latent is called by."""
PEAKS, TOKENS = 10, 3
"""Strongest firings (one of a document) that its tokens are taken of, and how many tokens."""
COLUMN = "label"
"""Of `latents.csv`."""


class Known(NamedTuple):
    """What other reports found, per latent."""

    concepts: Mapping[int, list[Concept]]
    """The best of each first."""
    scores: Mapping[int, Scores]

    @classmethod
    def read(cls, run: EvalRun) -> "Known":
        """From the record, as far as it is there."""
        concepts: dict[int, list[Concept]] = {}
        if run.path("concepts.csv").is_file():
            table = run.read_table("concepts.csv")
            own = table[table["subject"] == "head"].sort_values("f1", ascending=False)
            for row in own.to_dict("records"):
                fact = Concept(row["fact"], row["f1"], row["precision"], row["recall"])
                concepts.setdefault(int(row["latent"]), []).append(fact)
        scores: dict[int, Scores] = {}
        if run.path("interpretability.csv").is_file():
            table = run.read_table("interpretability.csv")
            judge = str(_judge(run))
            for row in table[table["subject"] == "head"].to_dict("records"):
                if isinstance(row["explanation"], str):
                    scores[int(row["latent"])] = Scores(
                        row["explanation"],
                        _text(row["category"]),
                        None if _missing(row["score"]) else int(row["score"]),
                        None if _missing(row["detection"]) else float(row["detection"]),
                        judge,
                    )
        return cls(concepts, scores)

    def label(self, latent: int, tokens: Sequence[str]) -> str:
        """What a latent is called: its explanation, else the fact it tells, else its tokens.

        Args:
            latent: Its number.
            tokens: What it fires on most, from `firing_tokens`; none if it never fired.
        """
        if latent in self.scores:
            return self.scores[latent].explanation
        for concept in self.concepts.get(latent, [])[:1]:
            if concept.f1 >= TELLING:
                return concept.fact
        return " ".join(json.dumps(token, ensure_ascii=False) for token in tokens)


def firing_tokens(contexts: Contexts, latent: int, tokenizer: Any) -> list[str]:
    """Names of the tokens on which a latent fires most, the commonest first.

    Args:
        contexts: With at least PEAKS strongest firings of each latent.
        latent: Its number.
        tokenizer: That made the ids.
    """
    windows = contexts.windows(latent)[0].pick(slice(PEAKS))
    places = zip(windows.row.tolist(), (windows.start + windows.peak).tolist(), strict=True)
    ids = [int(contexts.row_ids(row, at + 1)[-1]) for row, at in places]
    counted = Counter(token_text(tokenizer, i) for i in ids)
    return [token for token, _ in counted.most_common(TOKENS)]


def read_labels(latents: Path) -> dict[int, str]:
    """The labels in a `latents.csv`; none in one of an earlier version."""
    table = pd.read_csv(latents, keep_default_na=False, dtype=str)
    if COLUMN not in table.columns:
        return {}
    return {int(n): text for n, text in zip(table["latent"], table[COLUMN], strict=True) if text}


def _judge(run: EvalRun) -> str:
    path = run.path("done/interpretability.json")
    if not path.is_file():
        return ""
    return str(json.loads(path.read_text())["settings"].get("model", ""))


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any) -> str:
    return "" if _missing(value) else str(value)
