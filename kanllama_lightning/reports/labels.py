"""What a latent is called: one label, whoever shows it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

from kanllama_lightning.dashboard.contents import Concept, Scores
from kanllama_lightning.lm.token_text import token_text
from kanllama_lightning.measures.contexts import Contexts
from kanllama_lightning.reports.report import EvalRun
from kanllama_lightning.storage.small_files import Count, Within, read_csv, read_json, there

READS = ("concepts.csv", "interpretability.csv")
"""Files of a record that labels come from, where they are there."""
TELLING = 0.5
"""F1 from which on a known fact is what a latent is called by."""
PEAKS, TOKENS = 10, 3
"""Strongest firings (one of a document) that its tokens are taken of, and how many tokens."""
COLUMN = "label"
"""Column of `latents.csv`."""


ANEW = "`--reports concepts interpretability --again true` makes it anew"
CONCEPTS = {
    **{"subject": str, "fact": str, "latent": Count | None},
    **dict.fromkeys(("f1", "precision", "recall"), float | None),
}
SCORES = {
    **{"subject": str, "latent": Count, "explanation": str | None, "category": str | None},
    **{
        "score": Annotated[float, Within(0, 5)] | None,
        "detection": Annotated[float, Within(0, 1)] | None,
    },
}
"""Columns of what other reports found, as far as labels and the dashboard show it."""


class Judged(TypedDict):
    """`done/interpretability.json`, as far as it is told."""

    settings: dict[str, Any]


class Known(NamedTuple):
    """What other reports found, per latent."""

    concepts: Mapping[int, list[Concept]]
    """The best of each first."""
    scores: Mapping[int, Scores]

    @classmethod
    def read(cls, run: EvalRun) -> "Known":
        """From the record, as far as it is there."""
        concepts: dict[int, list[Concept]] = {}
        facts, judged = (run.path(name) for name in READS)
        if there(facts):
            rows = read_csv(facts, CONCEPTS, ANEW)
            for row in sorted(rows, key=lambda row: -(row["f1"] or 0.0)):
                if row["subject"] == "head" and None not in row.values():
                    fact = Concept(row["fact"], row["f1"], row["precision"], row["recall"])
                    concepts.setdefault(row["latent"], []).append(fact)
        scores: dict[int, Scores] = {}
        if there(judged):
            judge = _judge(run)
            for row in read_csv(judged, SCORES, ANEW):
                if row["subject"] == "head" and row["explanation"] is not None:
                    scores[row["latent"]] = Scores(
                        row["explanation"],
                        row["category"] or "",
                        None if row["score"] is None else int(row["score"]),
                        row["detection"],
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
    """The labels in a `latents.csv`; a latent that never fired has none."""
    remedy = "`python evaluate.py report RUN --reports latents --again true` makes it anew"
    rows = read_csv(latents, {"latent": Count, COLUMN: str | None}, remedy)
    return {row["latent"]: row[COLUMN] for row in rows if row[COLUMN]}


def _judge(run: EvalRun) -> str:
    path = run.path("done/interpretability.json")
    done = read_json(path, Judged, ANEW) if there(path) else {"settings": {}}
    return str(done["settings"].get("model", ""))
