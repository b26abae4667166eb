"""What an LLM makes of latents: explanations, and whether they tell where a latent fires."""

import asyncio
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.functional.bootstrap import middle, ratios
from kanllama_lightning.heads import BatchTopK
from kanllama_lightning.heads.dense_kan import DenseKAN
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.judge.budget import Prices
from kanllama_lightning.judge.client import Judge, JudgeSettings
from kanllama_lightning.judge.endpoint import Endpoint, discreet, shown_address
from kanllama_lightning.judge.panel import (
    HEAD,
    RANDOM,
    SHUFFLED,
    SUBJECTS,
    CallEstimate,
    Verdict,
    estimate,
    hear,
)
from kanllama_lightning.judge.protocol import (
    CATEGORIES,
    DETECT,
    LEAST,
    PER_CALL,
    PLACEHOLDER,
    SCORES,
    Case,
    choose,
    detect_questions,
    explain_question,
    shown,
    spread,
)
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.token_text import pieces
from kanllama_lightning.measures.contexts import Contexts
from kanllama_lightning.pages.plots import PALETTE, SYMBOLS, styled
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.reports.one_pass import DONE
from kanllama_lightning.reports.random_head import random_directions
from kanllama_lightning.reports.report import EvalRun, Figures, Report, Seen
from kanllama_lightning.types import InputError, ValidationBatch

log = logging.getLogger(__name__)

CHANCE, WORST = 0.5, 1.0
"""Detection and score of a latent that nothing is known of."""
TOP_KEPT, SAMPLED, SILENT = 32, 100, 1000
"""Windows collected: the strongest and random ones of each latent; random ones in all."""
RESAMPLES = 10_000
CACHE, PROMPTS = "judge", "interpretability_prompts.jsonl"
BINS = np.linspace(0, 1, 21)
HOW = ("concurrency", "timeout", "retries", "max_cost")
"""Arguments that the result does not depend on."""


class _Tally(NamedTuple):
    """The latents of a subject, counted."""

    alive: int
    dead: int
    eligible: int
    """Alive, with enough windows."""


class InterpretabilityReport(Report):
    """How well an LLM can say what latents stand for, tested on text that it was not shown.

    For each latent the judge writes an explanation, a category and a score from 1 to 5 from
    windows of text in which the latent fires; in a conversation of its own it then tells by that
    explanation alone in which of other windows, of other documents, the latent fires. The share it
    gets right, as balanced accuracy (0.5 is chance), is the detection score and the headline.
    Controls: a dictionary of random directions at the same L0, through all of this, and latents
    whose explanation is another's.

    Latents are drawn at random, one from each of as many equal slices by frequency of those that
    can be judged, so that means speak for these. `alive/...` are the means over all latents that
    fire: those with too few windows enter at chance (detection 0.5, score 1), by their share.
    `all/...` enters the dead ones at chance too. Intervals are 95 % of 10,000 resamples of the
    latents judged.

    Replies are kept in `eval/judge/`: the same command goes on where it was stopped, and makes the
    same record again without a server. The key is taken from OPENAI_API_KEY alone.

    Args:
        latents: How many latents of the head to judge.
        model: Name of the judge, with its version.
        base_url: Address of an OpenAI-like server, such as http://localhost:8000/v1 (default:
            OPENAI_BASE_URL, or OpenAI).
        price_in: USD per million input tokens (default: gpt-4o's price; prices change).
        price_out: USD per million output tokens (default: gpt-4o's price).
        max_cost: Most that one command may spend, in USD; nothing is asked if the estimate, which
            is rather too high, is above.
        concurrency: Calls at once.
        controls: Latents of each control; 0 leaves them out.
        windows: Documents of the text a latent has to fire in to be judged. With fewer than 60
            the judge is shown less than the protocol wants.
        width: Tokens of a window.
        tokens: Most tokens of text to collect windows from; None for all.
        seed: Random seed for sampling latents and windows; also sent to the judge.
        dry_run: Write the prompts to eval/interpretability_prompts.jsonl and the estimated cost to
            the log, and ask nothing.
        timeout: Seconds that the server may be silent.
        retries: Repetitions of a call that got no answer, each after a longer wait; of one that
            the server was silent on, one at most.
        max_output: Most tokens of a reply; models that think first need more.
        remark: A sentence for the page, such as what this judge is worth.
    """

    name = "interpretability"
    files = ("interpretability.csv", "interpretability.html")
    streams = True
    on_request = True

    def __init__(
        self,
        latents: int = 100,
        model: str = "gpt-4o-2024-08-06",
        base_url: str | None = None,
        price_in: float = 2.5,
        price_out: float = 10.0,
        max_cost: float = 10.0,
        concurrency: int = 8,
        controls: int = 20,
        windows: int = 60,
        width: int = 32,
        tokens: int | None = None,
        seed: int = 0,
        dry_run: bool = False,
        timeout: float = 60.0,
        retries: int = 5,
        max_output: int = 300,
        remark: str | None = None,
    ) -> None:
        self.latents, self.model, self.base_url = latents, model, base_url
        self.price_in, self.price_out, self.max_cost = price_in, price_out, max_cost
        self.concurrency, self.controls, self.windows = concurrency, controls, windows
        self.width, self.tokens, self.seed, self.dry_run = width, tokens, seed, dry_run
        self.timeout, self.retries = timeout, retries
        self.max_output, self.remark = max_output, remark
        least = {"latents": 1, "concurrency": 1, "controls": 0, "windows": 2 * LEAST, "width": 2,
                 "retries": 0, "max_output": 1}  # fmt: skip
        least |= {"price_in": 0, "price_out": 0, "max_cost": 0}
        if tokens is not None:
            least["tokens"] = 1
        for argument, low in least.items():
            value = getattr(self, argument)
            if not value >= low or value == math.inf:
                raise InputError(f"interpretability.{argument}={value}: must be at least {low}")
        if not 0 < timeout < math.inf:
            raise InputError(f"interpretability.timeout={timeout}: must be seconds, above 0")
        if not model.strip():
            raise InputError("interpretability.model='': give the name of a model")

    def settings(self) -> dict[str, Any]:
        """The constructor arguments that count; of the address no password."""
        kept = {k: v for k, v in super().settings().items() if k not in HOW}
        if self.remark is None:
            del kept["remark"]
        return kept | {"base_url": shown_address(self.base_url)}

    def applies(self, run: EvalRun) -> str | None:
        """Why it makes no sense for this head; None if it does."""
        if isinstance(run.head, DenseKAN):
            return (
                f"all latents of {run.head.title} fire on every token: there is no text "
                "on which one is silent"
            )
        return None

    def work(self, lm: FrozenLM, heads: Sequence[SAEHead], tokens: int, ctx_len: int) -> Work:
        """Calls of the judge: an explanation of each latent, and what it tells in some calls."""
        detection = -(-2 * DETECT // PER_CALL)
        judged = sum(min(self.latents, head.d_sae) + self.controls for head in heads)
        shuffled = len(heads) * self.controls
        return Work(requests=judged * (1 + detection) + shuffled * detection)

    def begin(self, run: EvalRun) -> None:
        """See that there is a server to ask, and a key for it."""
        reason = self.applies(run)
        if reason is not None:
            raise InputError(f"report interpretability: {reason}; leave it out")
        if not self.dry_run:
            self._endpoint = Endpoint(self.base_url, "interpretability.base_url")
        self._seen = {HEAD: self._collector(run.head.d_sae)}
        self._random: BatchTopK | None = None

    def observe(self, run: EvalRun, seen: Seen) -> None:
        """Collect windows, of the main set alone."""
        batch = seen.batch
        if batch.set_name != run.sets[0] or not len(batch.x):
            return
        self._seen[HEAD].update(batch)
        if not self.controls:
            return
        if self._random is None:
            self._random = _random_head(run, batch)
            self._seen[RANDOM] = self._collector(self._random.d_sae)
        self._seen[RANDOM].update(batch._replace(out=self._random(batch.rows)))

    def finish(self, run: EvalRun) -> Figures | None:
        """Choose, ask, write, draw."""
        cases: dict[str, Sequence[Case]] = {}
        tallies: dict[str, _Tally] = {}
        wanted = {HEAD: self.latents, RANDOM: self.controls}
        for subject, contexts in self._seen.items():
            cases[subject], tallies[subject] = self._cases(run, contexts, wanted[subject])
        if not cases[HEAD]:
            raise InputError(
                f"interpretability.windows={self.windows}: no latent fires in as many documents of "
                f"the text; give more text (--documents), or a smaller number (at least "
                f"{2 * LEAST})"
            )
        if self.controls and not cases.get(RANDOM):
            log.warning("interpretability: no random direction fires in enough documents")
        prices = Prices(self.price_in, self.price_out)
        n_shuffled = min(self.controls, len(cases[HEAD]))
        if self.dry_run:
            left = estimate(None, prices, self.max_output, cases, n_shuffled)
            self._write_prompts(run, cases)
            log.info("interpretability: %s: prompts; would be %s", run.out / PROMPTS, left)
            return None
        with discreet():
            verdicts, judge = asyncio.run(self._ask(run, cases, prices, n_shuffled))
        table = _table(verdicts, prices)
        if judge.stopped is not None or judge.lost:
            (run.out / DONE / f"{self.name}.json").unlink(missing_ok=True)
            run.write_table("interpretability.csv", table)
            if judge.stopped is not None:
                raise judge.stopped
            reasons = ", ".join(f"{n} x {r}" for r, n in sorted(Counter(judge.lost).items()))
            raise InputError(
                f"interpretability: {len(judge.lost)} calls got no answer ({reasons}); what came "
                "is kept, the same command asks for them again"
            )
        run.write_table("interpretability.csv", table)
        figures = self._figures(verdicts, tallies, table, judge)
        self._draw(run, table, figures)
        return figures

    def wanting(self, run: EvalRun) -> str | None:
        """Under half of the latents could be judged."""
        path = run.out / self.files[0]
        return _too_few(pd.read_csv(path)) if path.is_file() and not self.dry_run else None

    def _collector(self, d_sae: int) -> Contexts:
        return Contexts(d_sae, self.width, TOP_KEPT, SAMPLED, SILENT, self.seed)

    def _cases(self, run: EvalRun, contexts: Contexts, wanted: int) -> tuple[list[Case], _Tally]:
        """Latents to judge, by number; and how many there are."""
        fired = contexts.meter.fired
        alive = fired.nonzero().squeeze(1).tolist()
        alive.sort(key=lambda latent: (int(fired[latent]), latent))
        good = [i for i in alive if choose(contexts, i, self.windows, self.seed) is not None]
        draw = random.Random(f"{self.seed}:latents")
        chosen = sorted(good[place] for place in spread(len(good), wanted, draw))

        def text(ids: Sequence[int]) -> list[str]:
            return pieces(run.lm.tokenizer, ids)

        cases = []
        for latent in chosen:
            windows = choose(contexts, latent, self.windows, self.seed)
            assert windows is not None
            cases.append(shown(contexts, latent, windows, text, self.seed))
        return cases, _Tally(len(alive), len(fired) - len(alive), len(good))

    def _write_prompts(self, run: EvalRun, cases: dict[str, Sequence[Case]]) -> None:
        lines = []
        for subject, some in cases.items():
            for case in some:
                about = {"subject": subject, "latent": case.latent}
                questions = [explain_question(case), *detect_questions(case, PLACEHOLDER)]
                lines += [about | question._asdict() for question in questions]
        run.write_text(PROMPTS, "".join(json.dumps(line) + "\n" for line in lines))

    async def _ask(
        self, run: EvalRun, cases: dict[str, Sequence[Case]], prices: Prices, n_shuffled: int
    ) -> tuple[list[Verdict], Judge]:
        manner = JudgeSettings(
            self.model, self.max_output, self.seed, self.concurrency, self.timeout, self.retries
        )
        folder = run.out / CACHE
        async with Judge(self._endpoint, manner, folder, prices, self.max_cost) as judge:
            left: CallEstimate = estimate(judge, prices, self.max_output, cases, n_shuffled)
            log.info("interpretability: %s at %s: %s", self.model, self._endpoint.shown, left)
            if left.cost > self.max_cost:
                raise InputError(
                    f"interpretability.max_cost={self.max_cost}: asking may take {left}; raise it, "
                    "ask for fewer --interpretability.latents and --interpretability.controls, or "
                    "set --interpretability.price_in and --interpretability.price_out to what your "
                    "judge costs (0 for a local one)"
                )
            verdicts = await hear(judge, cases, n_shuffled, left.calls + left.known)
            log.info(
                "interpretability: %d replies came now, for up to %.4f USD",
                judge.asked, judge.budget.spent,
            )  # fmt: skip
        return verdicts, judge

    def _figures(
        self,
        verdicts: Sequence[Verdict],
        tallies: dict[str, _Tally],
        table: pd.DataFrame,
        judge: Judge,
    ) -> dict[str, Any]:
        figures: dict[str, Any] = {"model": self.model}
        draws: dict[str, Tensor] = {}
        for number, subject in enumerate(SUBJECTS):
            every = [v for v in verdicts if v.subject == subject]
            if not every and subject != HEAD:
                continue
            prefix = "" if subject == HEAD else f"{subject.replace(' ', '_')}/"
            judged = [v for v in every if v.status == "ok"]
            figures[f"{prefix}n_judged"] = len(judged)
            figures[f"{prefix}n_failed"] = len(every) - len(judged)
            tally = tallies.get(subject)
            if tally is not None:
                figures[f"{prefix}n_alive"] = tally.alive
                figures[f"{prefix}n_dead"] = tally.dead
                figures[f"{prefix}n_skipped"] = tally.alive - tally.eligible
            measured = {"detection": [v.detection for v in judged]}
            if subject != SHUFFLED:
                measured["score"] = [v.score for v in judged]
            for what, values in measured.items():
                known = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
                if not len(known):
                    continue
                drawn = _resampled(known, self.seed + number)
                draws[f"{prefix}{what}"] = drawn
                figures |= _with_interval(f"{prefix}{what}", float(known.mean()), drawn)
                if tally is not None:
                    chance = CHANCE if what == "detection" else WORST
                    figures |= _beyond(f"{prefix}{{}}/{what}", known, drawn, tally, chance)
            if judged and subject != SHUFFLED:
                counts = Counter(v.category for v in judged)
                for category in CATEGORIES:
                    figures[f"{prefix}category/{category}"] = counts[category] / len(judged)
        for control in (RANDOM, SHUFFLED):
            prefix = control.replace(" ", "_")
            if "detection" in draws and f"{prefix}/detection" in draws:
                apart = figures["detection"] - figures[f"{prefix}/detection"]
                drawn = draws["detection"] - draws[f"{prefix}/detection"]
                figures |= _with_interval(f"over_{prefix}/detection", apart, drawn)
        figures["calls"] = sum(v.calls for v in verdicts)
        for column in ("input_tokens", "output_tokens"):
            values = [getattr(v, column) for v in verdicts]
            figures[column] = None if None in values else sum(values)
        costs = table["cost"].tolist()
        figures["cost"] = None if None in costs else round(sum(costs), 6)
        figures["dropped_parameters"] = ", ".join(sorted(judge.refused)) or None
        return figures

    def _draw(self, run: EvalRun, table: pd.DataFrame, figures: dict[str, Any]) -> None:
        run.write_page(
            "interpretability.html",
            "Interpretability",
            _said(self, figures, _too_few(table)),
            [_detections(table), _scores(table), _by_frequency(table)],
        )


@torch.no_grad()
def _random_head(run: EvalRun, batch: ValidationBatch) -> BatchTopK:
    """Untrained, random directions with the L0 of the head, set up on the first batch."""
    l0 = min(max(1, round(batch.l0())), run.head.d_sae)
    head = random_directions(run.head, l0, batch.rows)
    head.eval().calibrate_(batch.rows)
    return head


def _table(verdicts: Sequence[Verdict], prices: Prices) -> pd.DataFrame:
    rows = []
    for v in verdicts:
        known = v.input_tokens is not None and v.output_tokens is not None
        cost = round(prices.cost(v.input_tokens or 0, v.output_tokens or 0), 8) if known else None
        row = v._asdict()
        del row["calls"], row["status"]
        rows.append(row | {"cost": cost, "status": v.status})
    table = pd.DataFrame(rows)
    for column in ("score", "input_tokens", "output_tokens", "cost"):  # whole numbers, or nothing
        table[column] = pd.Series([row[column] for row in rows], dtype=object)
    return table


def _resampled(values: Float[Tensor, " n"], seed: int) -> Float[Tensor, " resamples"]:
    """Means over resampled latents."""
    return ratios(values[:, None], torch.ones_like(values)[:, None], RESAMPLES, seed)[:, 0]


def _with_interval(name: str, value: float, draws: Float[Tensor, " resamples"]) -> dict[str, float]:
    """A figure and the ends of its interval, which takes two latents at least."""
    found = {name: value}
    if not draws.isnan().any():
        low, high = middle(draws)
        found |= {f"{name}_low": low, f"{name}_high": high}
    return found


def _beyond(
    name: str,
    known: Float[Tensor, " n"],
    draws: Float[Tensor, " resamples"],
    tally: _Tally,
    chance: float,
) -> dict[str, float]:
    """Means over all latents alive, and over all: those that cannot be judged enter at chance."""
    found: dict[str, float] = {}
    for group, size in (("alive", tally.alive), ("all", tally.alive + tally.dead)):
        share = tally.eligible / size
        rest = (1 - share) * chance
        mean = share * float(known.mean()) + rest
        found |= _with_interval(name.format(group), mean, share * draws + rest)
    return found


def _too_few(table: pd.DataFrame) -> str | None:
    """What to say where under half of the head's latents could be judged."""
    status = table[table["subject"] == HEAD]["status"]
    judged = int((status == "ok").sum())
    if 2 * judged >= len(status) and judged:
        return None
    why = Counter(status[status != "ok"]).most_common(3)
    return (
        f"interpretability: only {judged} of {len(status)} latents could be judged "
        f"({', '.join(f'{n} x {reason}' for reason, n in why)}): the scores say little; name a "
        "judge that keeps to the schema of its answers, or a larger one, with "
        "--interpretability.model"
    )


def _said(report: InterpretabilityReport, figures: dict[str, Any], too_few: str | None) -> str:
    def interval(name: str, form: str = ".3f") -> str:
        if name not in figures:
            return "unknown"
        low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
        ends = "" if low is None else f" ({low:{form}} to {high:{form}})"
        return f"{figures[name]:{form}}{ends}"

    text = f"Attention: {too_few.partition(': ')[2]}. " if too_few else ""
    text += f"{report.remark} " if report.remark else ""
    text += (
        f"{report.model} explained {figures['n_judged']} latents ({figures['n_failed']} failed) of "
        f"{figures['n_alive']:,} that fire, {figures['n_skipped']:,} of which fire in too few "
        f"documents, or in nearly all text; {figures['n_dead']:,} are dead. Detection is how well "
        "it then told, by the explanation alone, windows of other documents in which the latent "
        "fires from windows in which it is silent: balanced accuracy, 0.5 by chance. Mean "
        f"detection {interval('detection')}, mean score {interval('score', '.2f')} of 5; with the "
        f"latents that could not be judged at chance {interval('alive/detection')}, with the dead "
        f"ones too {interval('all/detection')}. In parentheses: 95 % intervals over latents. "
    )
    if "random_directions/detection" in figures:
        text += f"Random directions of the same L0: {interval('random_directions/detection')}. "
    if "shuffled_explanations/detection" in figures:
        text += f"With another latent's explanation: {interval('shuffled_explanations/detection')}."
    return text + " Point at a latent to read its explanation; all are in interpretability.csv."


def _detections(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for i, subject in enumerate(SUBJECTS):
        some = table[(table["subject"] == subject) & table["detection"].notna()]
        if some.empty:
            continue
        values = some["detection"].astype(float).to_numpy()
        counts, _ = np.histogram(values, BINS)
        figure.add_bar(
            x=(BINS[:-1] + BINS[1:]) / 2,
            y=counts / len(values),
            name=f"{subject} ({len(values)}): mean {values.mean():.3f}",
            marker={"color": PALETTE[i], "pattern": {"shape": ("", "/", ".")[i]}},
            hovertemplate="%{x:.3f}: %{y:.1%}<extra></extra>",
        )
    figure.add_vline(x=CHANCE, line_dash="dot", line_color="#888", annotation_text="chance")
    figure.update_xaxes(range=[0, 1])
    figure.update_yaxes(tickformat=".0%")
    styled(figure, "Detection on held-out documents", "balanced accuracy", "share of latents")
    return figure.update_layout(barmode="group")


def _scores(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    some = table[(table["subject"] == HEAD) & table["score"].notna()]
    for i, category in enumerate(CATEGORIES):
        scores = some[some["category"] == category]["score"].tolist()
        figure.add_bar(
            x=list(SCORES),
            y=[scores.count(score) for score in SCORES],
            name=f"{category.replace('_', ' ')} ({len(scores)})",
            marker={"color": PALETTE[i], "pattern": {"shape": ("", "/", ".")[i]}},
            hovertemplate="score %{x}: %{y} latents<extra></extra>",
        )
    figure.update_xaxes(tickvals=list(SCORES))
    styled(figure, "Scores that the judge gave its explanations", "score, 5 is clearest", "latents")
    return figure.update_layout(barmode="stack", showlegend=True)


def _by_frequency(table: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for i, subject in enumerate((HEAD, RANDOM)):
        some = table[(table["subject"] == subject) & table["detection"].notna()]
        if some.empty:
            continue
        figure.add_scatter(
            x=some["frequency"].to_numpy(),
            y=some["detection"].astype(float).to_numpy(),
            mode="markers",
            name=f"{subject} ({len(some)})",
            marker={"color": PALETTE[i], "symbol": SYMBOLS[i], "size": 8, "opacity": 0.7},
            text=[
                f"latent {latent}, score {score}: {escape(str(text)[:200], quote=False)}"
                for latent, score, text in zip(
                    some["latent"], some["score"], some["explanation"], strict=True
                )
            ],
            hovertemplate="%{text}<br>fires on %{x:.3%}, detection %{y:.3f}<extra></extra>",
        )
    figure.add_hline(y=CHANCE, line_dash="dot", line_color="#888", annotation_text="chance")
    styled(figure, "Detection and how often a latent fires", "share of tokens, log scale",
           "balanced accuracy")  # fmt: skip
    figure.update_xaxes(type="log")
    return figure.update_layout(showlegend=True, hovermode="closest")
