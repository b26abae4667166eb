"""Whether the LM still knows what comes next when it has to make do with the reconstruction."""

import hashlib
import json
from html import escape
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import plotly.graph_objects as go

from kanllama_lightning.lm.frozen import EMBEDDED
from kanllama_lightning.lm.token_text import quoted, token_text, visible
from kanllama_lightning.pages.plots import PALETTE, styled
from kanllama_lightning.prompts import LLAMA, Prompt, load, world_prompts
from kanllama_lightning.prompts.asking import RUNS, Answers, AskedPrompt, ask, question
from kanllama_lightning.reports.report import EvalRun, Figures, Report
from kanllama_lightning.storage.small_files import Like, Positive, Within, read_bytes
from kanllama_lightning.types import InputError

SHOWN = 5
"""How many of the likeliest tokens the log has; all `top` of them are in the table."""
LABELS = {
    "original": "original",
    "sae": "reconstruction",
    "zero": "zero ablation",
    "mean": "mean ablation",
}
COLUMNS = {
    **{"category": str, "answer_tokens": Positive, "top1": str, "rank": Positive},
    "run": Annotated[str, Like("|".join(LABELS), "one of " + ", ".join(LABELS))],
    **{"probability": Annotated[float, Within(0, 1)], "log_prob": float, "kl": float},
    "agrees": Annotated[str, Like("True|False", "True or False")],
}
"""What is read of `capability.csv`."""
STYLES = {
    "original": (PALETTE[0], "", "circle"),
    "sae": (PALETTE[1], "/", "square"),
    "mean": (PALETTE[2], ".", "diamond"),
    "zero": (PALETTE[3], "x", "x"),
}
"""Colour and pattern, as in `losses.html`, and symbol."""
HEADER = """\
CAPABILITY TEST
  head      {head}
  LM        {lm}
  hook      {hook}
  prompts   {prompts}

Each prompt is given to the LM four times, as the same tokens, BOS first:
  original  nothing is replaced
  sae       the head's reconstruction stands in for the activation
  zero      0 does
  mean      the mean activation of the head's start sample does
Replaced are all positions but special tokens (BOS) and attention sinks (norm > {limit:.4g}).
Read at the last position of the prompt:
  rank      of the answer's first token; 1 = no token has a larger logit
  p         its probability
  log p     log-probability of the whole answer, each token after those before it, nats
  KL        of the run's prediction from the original's, nats; 0 = the same
  !         the likeliest token is not the original's
  L0        latents that fire, mean over the replaced tokens
"""


class CapabilityReport(Report):
    """Rank and probability of known answers: original, reconstruction, zero and mean ablation.

    `capability.log` is a transcript for people, with the totals at its end; `capability.csv` has a
    row per prompt and run (control characters of texts and tokens are written as `\\n`, `\\x1b`).

    Args:
        prompt: A prompt of your own instead of a set of them; needs `answer`.
        answer: How that prompt goes on, with the blank before it (" break").
        prompts: File of prompts (jsonl: category, prompt, answer) instead of the shipped ones,
            which are about the story world for the embedded LM and general for any other.
        top: How many of the likeliest tokens are written to the table.
    """

    name = "capability"
    files = ("capability.log", "capability.csv", "capability.html")
    streams = False

    def __init__(
        self,
        prompt: str | None = None,
        answer: str | None = None,
        prompts: str | None = None,
        top: int = 10,
    ) -> None:
        if (prompt is None) != (answer is None):
            given, missing = ("prompt", "answer") if answer is None else ("answer", "prompt")
            raise InputError(
                f"capability.{given}={prompt if answer is None else answer!r} without {missing}: "
                f"give both, or neither for the shipped prompts"
            )
        if prompt is not None and prompts is not None:
            raise InputError(
                f"capability.prompts={prompts!r} beside prompt={prompt!r}: give a file or one "
                "prompt, not both"
            )
        if top < 1:
            raise InputError(f"capability.top={top}: whole numbers from 1 up")
        self.prompt, self.answer, self.prompts, self.top = prompt, answer, prompts, top
        self._questions: list[AskedPrompt] = []

    def settings(self) -> dict[str, Any]:
        """The constructor arguments, and what is in the file of prompts."""
        path = Path(self.prompts).expanduser() if self.prompts else None
        if path is None or not path.is_file():
            return super().settings()
        return super().settings() | {"sha256": hashlib.sha256(read_bytes(path)).hexdigest()}

    def own(self) -> bool:
        """Whether the prompts are the user's own."""
        return self.prompt is not None or self.prompts is not None

    def told(self, run: EvalRun) -> str | None:
        """What became of a prompt of the user's own, or the totals of a file of prompts."""
        if not self.own() or not (run.out / self.files[1]).is_file():
            return None
        table = run.read_table(self.files[1], COLUMNS)
        table["agrees"] = table["agrees"] == "True"
        if self.prompt is None:
            return _totals(table)
        first = table.iloc[0]
        several = int(first["answer_tokens"]) > 1
        lines = [
            f"{quoted(self.prompt)} -> {quoted(str(self.answer))}",
            f"  {'':<15}{'rank':>7}{'probability':>13}  likeliest next token"
            + (f" (rank and probability are of the first of {first['answer_tokens']} tokens of the "
               "answer)" if several else ""),
        ]  # fmt: skip
        for row in table.to_dict("records"):
            figures = f"{row['rank']:>7,}{row['probability']:>13.4f}"
            lines.append(f'  {LABELS[row["run"]]:<15}{figures}  "{row["top1"]}"')
        return "\n".join(lines)

    def begin(self, run: EvalRun) -> None:
        """Read and tokenise the prompts."""
        self._questions = []
        for n, prompt in enumerate(self._prompts(run), start=1):
            try:
                self._questions.append(question(run.lm, prompt))
            except InputError as e:
                which = f"prompts={self.prompts!r}, prompt {n}" if self.prompts else "capability"
                raise InputError(f"{which}: {e}") from e

    def _prompts(self, run: EvalRun) -> list[Prompt]:
        if self.prompt is not None and self.answer is not None:
            return [Prompt("own", self.prompt, self.answer)]
        if self.prompts is not None:
            return load(self.prompts)
        return world_prompts() if run.lm.name == EMBEDDED else load(LLAMA)

    def _source(self, run: EvalRun) -> str:
        if self.prompt is not None:
            return "1, of your own"
        shipped = "about the story world" if run.lm.name == EMBEDDED else f"shipped, {LLAMA.name}"
        return f"{len(self._questions)}, {visible(self.prompts) if self.prompts else shipped}"

    def finish(self, run: EvalRun) -> Figures:
        """Ask everything; transcript, table, bars, figures."""
        log = [self._header(run)]
        rows: list[dict[str, Any]] = []
        kept = 0
        for n, asked in enumerate(self._questions, start=1):
            answers = ask(run.head, run.lm, asked, self.top)
            kept += answers.kept
            log.append(self._transcript(run, n, asked, answers))
            rows += self._rows(run, asked, answers)
        table = pd.DataFrame(rows)
        log.append(_totals(table))
        run.write_table("capability.csv", table)
        run.write_text("capability.log", "\n".join(log))
        run.write_page(
            "capability.html",
            "Capability",
            f"{len(self._questions)} prompts with known answers, original LM, reconstruction and "
            "ablations, read at the last token of the prompt; per category. Single prompts are in "
            "capability.log.",
            [_accuracy(table), _kl(table)],
        )
        figures: dict[str, float | int] = {
            f"{name}_{measure}": float(value)
            for name, values in _aggregate(table, ["run"]).iterrows()
            for measure, value in values.items()
            if name != "original" or measure not in ("agreement", "kl")
        }
        return {"n_prompts": len(self._questions), "n_readout_kept": kept} | figures

    def _header(self, run: EvalRun) -> str:
        head, lm = run.head, run.lm
        revision = f" at {lm.revision}" if lm.revision else ""
        return HEADER.format(
            head=f"{head.title}, {head.d_sae} latents, in {visible(str(run.folder))}",
            lm=f"{visible(lm.name)}{visible(revision)}, {str(lm.dtype).removeprefix('torch.')}",
            hook=lm.hook.name,
            prompts=self._source(run),
            limit=float(head.norm_limit),
        )

    def _transcript(self, run: EvalRun, n: int, asked: AskedPrompt, answers: Answers) -> str:
        prompt = asked.prompt
        lines = [
            f"[{n}] {visible(prompt.category)}: {quoted(prompt.prompt)} -> {quoted(prompt.answer)}",
            f"    {answers.n_ids} tokens, {answers.replaced} of them replaced, L0 {answers.l0:.1f}",
        ]
        if len(asked.answer_ids) > 1:
            parts = " ".join(quoted(token_text(run.lm.tokenizer, i)) for i in asked.answer_ids)
            lines.append(f"    the answer has {len(asked.answer_ids)} tokens, {parts}: rank and p "
                         "are of the first, log p of all")  # fmt: skip
        if asked.alone:
            lines.append("    after the prompt the answer would be cut into other tokens: it was "
                         "tokenised by itself")  # fmt: skip
        if answers.kept:
            lines.append("    the last position is a special token or a sink: it was not replaced")
        for name, r in answers.readings.items():
            top = "  ".join(
                f"{quoted(token_text(run.lm.tokenizer, i))} {p:.3f}" for i, p in r.top[:SHOWN]
            )
            kl = "" if name == "original" else f"KL {r.kl:.4f}"
            lines.append(
                f"  {' ' if r.agrees else '!'} {name:<8}  rank {r.rank:<5} p {r.probability:.4f}  "
                f"log p {r.log_prob:>8.3f}  {kl:<10}  {top}"
            )
        return "\n".join([*lines, ""])

    def _rows(self, run: EvalRun, asked: AskedPrompt, answers: Answers) -> list[dict[str, Any]]:
        def text(token: int) -> str:
            return visible(token_text(run.lm.tokenizer, token))

        return [
            {
                **{name: visible(value) for name, value in asked.prompt._asdict().items()},
                "answer_tokens": len(asked.answer_ids),
                "run": name,
                "rank": r.rank,
                "logit": r.logit,
                "probability": r.probability,
                "log_prob": r.log_prob,
                "kl": r.kl,
                "top1": text(r.top[0][0]),
                "agrees": r.agrees,
                "top": json.dumps([[text(i), p] for i, p in r.top]),
                "replaced": 0 if name == "original" else answers.replaced,
            }
            for name, r in answers.readings.items()
        ]


def _aggregate(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Median rank, shares of first ranks and of agreement, mean log-probability and KL."""
    rows = table.assign(first=table["rank"] == 1).groupby(by, sort=False)
    return pd.DataFrame(
        {
            "median_rank": rows["rank"].median(),
            "top1_accuracy": rows["first"].mean(),
            "agreement": rows["agrees"].mean(),
            "log_prob": rows["log_prob"].mean(),
            "kl": rows["kl"].mean(),
        }
    )


def _totals(table: pd.DataFrame) -> str:
    n = len(table) // len(RUNS)
    title = (
        f"{'':<24}{'run':<10}{'prompts':>8}{'median rank':>13}{'rank 1':>9}{'agrees':>9}"
        f"{'log p':>10}{'KL':>10}"
    )
    lines = [
        f"TOTALS over {n} prompt{'s' if n > 1 else ''}",
        "  rank 1: share of prompts whose answer comes first; agrees: share with the original's",
        "  likeliest token; log p and KL: means, nats",
        "",
        title,
    ]
    parts = [(str(c), t) for c, t in table.groupby("category", sort=False)]
    if len(parts) > 1:
        parts.insert(0, ("all", table))
    for category, part in parts:
        label = category if len(category) < 24 else f"{category[:22]}…"
        for run, v in _aggregate(part, ["run"]).iterrows():
            lines.append(
                f"{label:<24}{run!s:<10}{len(part) // len(RUNS):>8}{v['median_rank']:>13g}"
                f"{v['top1_accuracy']:>9.1%}{v['agreement']:>9.1%}{v['log_prob']:>10.3f}"
                f"{v['kl']:>10.4f}"
            )
            label = ""
    return "\n".join([*lines, ""])


def _accuracy(table: pd.DataFrame) -> go.Figure:
    """Share of the answers that come first, per category and run."""
    means = _aggregate(table, ["run", "category"])["top1_accuracy"]
    figure = go.Figure()
    for run in RUNS:
        values, (colour, pattern, _) = means[run], STYLES[run]
        figure.add_bar(
            x=_labels(values),
            y=values.to_list(),
            name=LABELS[run],
            marker={"color": colour, "pattern": {"shape": pattern}},
            hovertemplate=f"{LABELS[run]}: %{{y:.1%}}<extra></extra>",
        )
    figure = styled(figure, "Answers that come first", "category", "share of the prompts")
    return figure.update_layout(barmode="group", bargap=0.25)


def _kl(table: pd.DataFrame) -> go.Figure:
    """Mean KL from the original, per category and run."""
    means = _aggregate(table, ["run", "category"])["kl"]
    figure = go.Figure()
    for run in RUNS[1:]:
        values, (colour, _, symbol) = means[run], STYLES[run]
        figure.add_scatter(
            x=_labels(values),
            y=values.to_list(),
            name=LABELS[run],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 11},
            hovertemplate=f"{LABELS[run]}: %{{y:.3g}} nats<extra></extra>",
        )
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return styled(figure, "How far the prediction moves", "category", "KL from the original (nats)")


def _labels(values: pd.Series) -> list[str]:
    return [escape(str(category)) for category in values.index]
