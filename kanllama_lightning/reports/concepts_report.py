"""Whether the latents mean something: known facts of the embedded world against them."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.console.phase import Phase
from kanllama_lightning.embedded import FACTS
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.lm.frozen import EMBEDDED, FrozenLM
from kanllama_lightning.measures.concept_matching import (
    LEAST,
    RECOVERED,
    SEED,
    Recovery,
    Stories,
    codes_of,
    read_stories,
    recover,
)
from kanllama_lightning.pages.plots import HEIGHT, PALETTE, styled
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.reports.random_head import CONTROL_SEED, random_directions
from kanllama_lightning.reports.report import EvalRun, Figures, Report
from kanllama_lightning.types import InputError

CONTROL_STORIES = 200
"""From which untrained heads get their scale and threshold."""
STORY_TOKENS = 130
"""Of a story, about."""
DASHES = ("solid", "dash", "dot", "dashdot")
PATTERNS = ("", "/", ".", "x")
MOST_MIXED = 8
"""Facts that a latent mixes; the last bar is for as many or more."""


class ConceptsReport(Report):
    """How well single latents tell the known facts of stories, against what learned nothing.

    For every fact, the latent and threshold with the best F1 on half of the stories are judged on
    the other half. `concepts.csv` has a row per fact for the head and for each control: raw
    coordinates of both signs (latent d_model + i is coordinate i negated), and the head before
    training, or, where the run did not keep it, a BatchTopK head that was never trained. On the
    embedded model only.

    Args:
        stories: Number of stories, half of them to choose by and half to judge; about 130 tokens
            each.
        seed: Seed of the stories; not the one of the training text, which is 0 by default.
        controls: Whether to judge the controls too; raw coordinates take most of the time.
    """

    name = "concepts"
    files = ("concepts.csv", "concepts.html")
    streams = False

    def __init__(self, stories: int = 600, seed: int = SEED, controls: bool = True) -> None:
        if stories < 2:
            raise InputError(f"Concepts.stories={stories}: must be at least 2, one for each half")
        self.stories, self.seed, self.controls = stories, seed, controls

    def applies(self, run: EvalRun) -> str | None:
        """Why it makes no sense for this head; None if it does."""
        if run.lm.name == EMBEDDED:
            return None
        return (
            f"the facts that hold are only known of the stories of lm.name={EMBEDDED!r}, not of "
            f"{run.lm.name!r}"
        )

    def work(self, lm: FrozenLM, heads: Sequence[SAEHead], tokens: int, ctx_len: int) -> Work:
        """Stories of its own, up to the hook point."""
        stories = self.stories + CONTROL_STORIES * self.controls
        return Work(upto=len(heads) * STORY_TOKENS * stories)

    def begin(self, run: EvalRun) -> None:
        """Refuse an LM whose text nothing is known about."""
        reason = self.applies(run)
        if reason is not None:
            raise InputError(f"report concepts: {reason}; leave it out, or take a run on that one")

    def finish(self, run: EvalRun) -> Figures:
        """Judge the head and the controls; write, draw."""
        read = read_stories(run.lm, self.stories, self.seed, run.head.norm_limit)
        choose, test = read.halves()
        with Phase("matching facts", 1 + 2 * self.controls, "subjects") as phase:
            found = {"head": _recover(run.head, choose, test)}
            if not len(found["head"].fact):
                raise InputError(
                    f"Concepts.stories={self.stories}: no fact holds on {LEAST} tokens of both "
                    "halves; give more stories, such as 600"
                )
            phase.add()
            if self.controls:
                raw = [run.head.target(half.x) for half in (choose, test)]
                both = [torch.cat([x, -x], 1).cpu() for x in raw]
                found["raw coordinates"] = recover(both[0], choose.facts, both[1], test.facts)
                phase.add()
                for name, head in self._controls(run, found["head"], choose).items():
                    found[name] = _recover(head, choose, test)
                    phase.add()
        table = pd.DataFrame([row for name, r in found.items() for row in _rows(name, r)])
        run.write_table("concepts.csv", table)
        figures: dict[str, float] = {}
        for name, recovery in found.items():
            prefix = "" if name == "head" else f"{name.replace(' ', '_')}/"
            figures |= {f"{prefix}{key}": value for key, value in recovery.figures().items()}
        own = table[table["subject"] == "head"].groupby("kind")["f1"]
        for kind, f1 in own:
            figures[f"kind/{kind}/n_facts"] = len(f1)
            figures[f"kind/{kind}/recovered_frac"] = float((f1 >= RECOVERED).mean())
            figures[f"kind/{kind}/mean_f1"] = float(f1.mean())
        self._draw(run, found, table)
        return figures

    def _controls(self, run: EvalRun, own: Recovery, choose: Stories) -> dict[str, SAEHead]:
        """The heads that learned nothing, set up on stories of their own."""
        x = read_stories(run.lm, CONTROL_STORIES, CONTROL_SEED, run.head.norm_limit).x
        l0 = getattr(run.head, "target_l0", None)
        if l0 is None:
            l0 = max(1, round(float(codes_of(run.head, choose.x).l0().double().mean())))
        controls: dict[str, SAEHead] = {}
        untrained = run.folder / "baselines" / "untrained"
        if untrained.exists():
            allowed = run.head.modules_named()
            controls["untrained head"] = SAEHead.load(untrained, allowed).to(x.device)
        else:
            controls["untrained BatchTopK"] = random_directions(run.head, l0, x)
        for control in controls.values():
            control.eval().calibrate_(x)
        return controls

    def _draw(self, run: EvalRun, found: Mapping[str, Recovery], table: pd.DataFrame) -> None:
        head = found["head"].figures()
        n, seen = int(head["n_facts"]), int(head["n_tokens"])
        run.write_page(
            "concepts.html",
            "Known concepts",
            f"{n} facts that the story world knows, over {seen:,} tokens of {self.stories} stories "
            f"(seed {self.seed}). For each fact the latent and the threshold with the best F1 are "
            "chosen on half of the stories; everything but the mixing is of the other half. A fact "
            f"counts if it holds on at least {LEAST} tokens, and on half of them at most, in both "
            f"halves; it is recovered from F1 {RECOVERED} on. Of the head's facts "
            f"{head['recovered_frac']:.1%} are, mean F1 {head['mean_f1']:.3f}. Raw coordinates "
            "count with both signs, and may have any threshold. Mixing: how many facts that hold "
            "on different tokens it takes to say where a latent fires. All definitions: "
            "kanllama_lightning/measures/concept_matching.py.",
            [
                _distribution(found),
                _by_kind(
                    table.assign(score=table["f1"]), "F1 by kind", "mean F1 on the test half", ".2f"
                ),
                _by_kind(
                    table.assign(score=table["f1"] >= RECOVERED),
                    "Recovered facts by kind",
                    f"share with F1 of {RECOVERED} or more",
                    ".1%",
                ),
                _scatter(found["head"]),
                _mixing(found),
            ],
        )


def _recover(head: SAEHead, choose: Stories, test: Stories) -> Recovery:
    codes: list[SparseCodes] = [codes_of(head, half.x) for half in (choose, test)]
    return recover(codes[0], choose.facts, codes[1], test.facts)


def _rows(subject: str, recovery: Recovery) -> list[dict[str, Any]]:
    columns = {
        "n_tokens": recovery.n_tokens,
        "latent": recovery.latent,
        "threshold": recovery.threshold,
        "f1": recovery.f1,
        "precision": recovery.precision,
        "recall": recovery.recall,
        "auroc": recovery.auroc,
        "best_auroc": recovery.best_auroc,
        "split": recovery.split,
        "union_recall": recovery.union_recall,
    }
    facts = [FACTS[fact] for fact in recovery.fact.tolist()]
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"subject": subject, "fact": fact, "kind": kind} | dict(zip(columns, row, strict=True))
        for fact, kind, row in zip(facts, recovery.kinds(), values, strict=True)
    ]


def _distribution(found: Mapping[str, Recovery]) -> go.Figure:
    figure = go.Figure()
    for i, (name, recovery) in enumerate(found.items()):
        f1 = recovery.f1.sort(descending=True).values.tolist()
        share = (np.arange(len(f1)) + 1) / len(f1)
        figure.add_scatter(
            x=[1, *f1, 0],
            y=[0, *share, 1],
            name=f"{name}: mean {np.mean(f1):.3f}",
            mode="lines",
            line={"color": PALETTE[i], "dash": DASHES[i], "width": 2.5, "shape": "vh"},
            hovertemplate="%{y:.1%} of facts have F1 ≥ %{x:.3f}<extra></extra>",
        )
    figure.add_vline(
        x=RECOVERED, line_dash="dot", line_color="#888", annotation_text="recovered",
        annotation_position="top left",
    )  # fmt: skip
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    return styled(
        figure, "Facts that a single latent tells at least so well", "F1 on the test half",
        "share of facts",
    )  # fmt: skip


def _by_kind(table: pd.DataFrame, title: str, y: str, form: str) -> go.Figure:
    """Bars of the column `score`, of every subject for each kind; what the head tells best first.

    Args:
        table: Rows of the facts.
        title: What is shown.
        y: What the score is.
        form: Of its numbers.
    """
    own = table[table["subject"] == "head"].groupby("kind")["f1"]
    order, size = own.mean().sort_values(ascending=False).index, own.size()
    figure = go.Figure()
    for i, (name, part) in enumerate(table.groupby("subject", sort=False)):
        figure.add_bar(
            x=[f"{kind} ({size[kind]})" for kind in order],
            y=part.groupby("kind")["score"].mean().reindex(order),
            name=str(name),
            marker={"color": PALETTE[i], "pattern": {"shape": PATTERNS[i]}},
            hovertemplate=f"%{{x}}: %{{y:{form}}}<extra></extra>",
        )
    figure.update_xaxes(tickangle=-45)
    figure.update_yaxes(tickformat=form, rangemode="tozero")
    styled(figure, title, "kind of fact (number of facts)", y)
    return figure.update_layout(height=HEIGHT + 100, barmode="group", bargap=0.25)


def _scatter(recovery: Recovery) -> go.Figure:
    figure = go.Figure()
    names = [escape(FACTS[fact]) for fact in recovery.fact.tolist()]
    hover = [
        f"{name}: latent {latent}, F1 {f1:.3f}, {n:,} tokens"
        for name, latent, f1, n in zip(
            names,
            recovery.latent.tolist(),
            recovery.f1.tolist(),
            recovery.n_tokens.tolist(),
            strict=True,
        )  # fmt: skip
    ]
    figure.add_scatter(
        x=recovery.recall.tolist(),
        y=recovery.precision.tolist(),
        mode="markers",
        marker={
            "color": PALETTE[0],
            "opacity": 0.6,
            "size": _sizes(recovery.n_tokens.double()),
            "line": {"color": "white", "width": 0.5},
        },
        text=hover,
        hovertemplate="%{text}<br>recall %{x:.3f}, precision %{y:.3f}<extra></extra>",
        showlegend=False,
    )
    at = np.linspace(0.01, 1, 200)
    for level, dash in ((0.5, "dot"), (RECOVERED, "dash")):
        recall = at[at > level / (2 - level)]
        figure.add_scatter(
            x=recall,
            y=level * recall / (2 * recall - level),
            mode="lines",
            name=f"F1 {level}",
            line={"color": "#888", "dash": dash, "width": 1.2},
            hoverinfo="skip",
        )
    figure.update_xaxes(range=[-0.02, 1.02])
    figure.update_yaxes(range=[-0.02, 1.04])
    return styled(
        figure, "The head's best latent for each fact (larger: more tokens)",
        "recall on the test half", "precision on the test half",
    )  # fmt: skip


def _sizes(n_tokens: Float[Tensor, " n"]) -> list[float]:
    """Diameters in pixels."""
    return (4 + 2.5 * (n_tokens / LEAST).clamp_min(1).log()).tolist()


def _mixing(found: Mapping[str, Recovery]) -> go.Figure:
    figure = go.Figure()
    names = [*map(str, range(MOST_MIXED)), f"{MOST_MIXED} or more"]
    for i, (name, recovery) in enumerate(found.items()):
        counts = torch.bincount(recovery.mixed.clamp_max(MOST_MIXED), minlength=MOST_MIXED + 1)
        figure.add_bar(
            x=names,
            y=(counts / counts.sum().clamp_min(1)).tolist(),
            name=f"{name}: {len(recovery.mixed):,} latents",
            marker={"color": PALETTE[i], "pattern": {"shape": PATTERNS[i]}},
            hovertemplate="%{x} facts: %{y:.1%} of latents that fire<extra></extra>",
        )
    figure.update_xaxes(type="category")
    figure.update_yaxes(tickformat=".0%")
    styled(
        figure, "Mixing: facts it takes to say where a latent fires", "facts that a latent mixes",
        "share of latents that fire",
    )  # fmt: skip
    return figure.update_layout(barmode="group", bargap=0.25)
