"""Which answers the LM still gives when it has to make do with the reconstruction."""

import hashlib
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import plotly.graph_objects as go

from kanllama_lightning.functional.proportion import wilson
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import EMBEDDED, FrozenLM
from kanllama_lightning.lm.token_text import quoted, token_text, visible
from kanllama_lightning.pages.plots import PALETTE, styled
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.prompts import LLAMA, Prompt, load, world_prompts
from kanllama_lightning.prompts.asking import RUNS, Answers, AskedPrompt, ask, question
from kanllama_lightning.reports.report import EvalRun, Figures, Report
from kanllama_lightning.storage.small_files import Like, Positive, Within, read_bytes
from kanllama_lightning.types import InputError

SHOWN = 5
"""How many of the likeliest tokens the log has; all `top` of them are in the table."""
MIN_KNOWN, MIN_SHARE = 5, 0.2
"""A category that the untouched LM answers less of is not one it can do: nothing is kept of it."""
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
    **dict.fromkeys(("agrees", "hit"), Annotated[str, Like("True|False", "True or False")]),
}
"""What is read of `capability.csv`."""
ALL = "(all that it can do)"
"""In the place of a category: those together that the untouched LM can do."""
STYLES = {
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
  rank      of the first answer's first token; 1 = no token has a larger logit
  p         its probability
  log p     log-probability of the whole first answer, each token after those before it, nats
  KL        of the run's prediction from the original's, nats; 0 = the same
  !         the likeliest token is not the original's
  +         what the run says, always its likeliest token, is a whole answer
  L0        latents that fire, mean over the replaced tokens
"""


class CapabilityReport(Report):
    """Answers that the LM gives, and which of them are kept: reconstruction, zero, mean ablation.

    `capability.log` is a transcript for people, with the totals at its end; `capability.csv` has a
    row per prompt and run (control characters of texts and tokens are written as `\\n`, `\\x1b`);
    `categories.csv` has a row per category and run (METHODS C).

    Args:
        prompt: A prompt of your own instead of a set of them; needs `answer`.
        answer: How that prompt goes on, with the blank before it (" break").
        prompts: File of prompts (jsonl: category, prompt, answer, which may be a list) instead of
            the shipped ones, about the story world for the embedded LM and general for any other.
        top: How many of the likeliest tokens are written to the table.
    """

    name = "capability"
    files = ("capability.log", "capability.csv", "categories.csv", "capability.html")
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
        table["hit"] = table["hit"] == "True"
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

    def work(self, lm: FrozenLM, heads: Sequence[SAEHead], tokens: int, ctx_len: int) -> Work:
        """All runs of every prompt; those whose answer is longer than a token are asked again."""
        asked = [question(lm, prompt) for prompt in self._prompts(lm)]
        length = [1 + len(a.prompt_ids) + len(a.answer_ids) - 1 for a in asked]
        again = sum(1 + n for n, a in zip(length, asked, strict=True) if a.most > 1)
        more = sum(a.most > 1 for a in asked)
        answers = sum(len(a.answer_ids) for a in asked)
        runs = len(RUNS) * len(heads)
        return Work(
            upto=len(heads) * sum(length) + runs * again,
            on=runs * (sum(length) + again),
            logits=runs * (answers + more),
        )

    def begin(self, run: EvalRun) -> None:
        """Read and tokenise the prompts."""
        self._questions = []
        for n, prompt in enumerate(self._prompts(run.lm), start=1):
            try:
                self._questions.append(question(run.lm, prompt))
            except InputError as e:
                which = f"prompts={self.prompts!r}, prompt {n}" if self.prompts else "capability"
                raise InputError(f"{which}: {e}") from e

    def _prompts(self, lm: FrozenLM) -> list[Prompt]:
        if self.prompt is not None and self.answer is not None:
            return [Prompt("own", self.prompt, (self.answer,))]
        if self.prompts is not None:
            return load(self.prompts)
        return world_prompts() if lm.name == EMBEDDED else load(LLAMA)

    def _source(self, run: EvalRun) -> str:
        if self.prompt is not None:
            return "1, of your own"
        shipped = "about the story world" if run.lm.name == EMBEDDED else f"shipped, {LLAMA.name}"
        return f"{len(self._questions)}, {visible(self.prompts) if self.prompts else shipped}"

    def finish(self, run: EvalRun) -> Figures:
        """Ask everything; transcript, table, bars, figures."""
        log = [self._header(run)]
        rows: list[dict[str, Any]] = []
        every = ask(run.head, run.lm, self._questions, self.top)
        for n, (asked, answers) in enumerate(zip(self._questions, every, strict=True), start=1):
            log.append(self._transcript(run, n, asked, answers))
            rows += self._rows(run, asked, answers)
        table = pd.DataFrame(rows)
        counts = _counts(table)
        log.append(_totals(table))
        run.write_table("capability.csv", table)
        run.write_table("categories.csv", counts)
        run.write_text("capability.log", "\n".join(log))
        run.write_page(
            "capability.html",
            "Capability",
            f"{len(self._questions)} prompts with known answers. Kept: of the answers that the "
            "untouched LM gives, those that it still gives with the reconstruction or an ablation "
            f"in the activation's place, with 95 % intervals. {_left_out(counts)} Single prompts "
            "are in capability.log.",
            [_kept(counts), _kl(counts)],
        )
        figures: dict[str, float | int | None] = {}
        for total in counts[counts["category"] == ALL].to_dict("records"):
            figures |= {"n_asked": total["asked"], "n_known": total["known"]}
            for name in ("kept", "lost", "gained", "kept_frac", "kept_low", "kept_high", "kl"):
                value = total[name]
                figures[f"{total['run']}_{name}"] = None if pd.isna(value) else value
        untouched = sum(answers.untouched for answers in every)
        return {"n_prompts": len(every), "n_readout_untouched": untouched} | figures

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
            f"[{n}] {visible(prompt.category)}: {quoted(prompt.prompt)} -> "
            + " | ".join(quoted(answer) for answer in prompt.answers),
            f"    {answers.n_ids} tokens, {answers.replaced} of them replaced, L0 {answers.l0:.1f}",
        ]
        if len(asked.answer_ids) > 1:
            parts = " ".join(quoted(token_text(run.lm.tokenizer, i)) for i in asked.answer_ids)
            lines.append(f"    the answer has {len(asked.answer_ids)} tokens, {parts}: rank and p "
                         "are of the first, log p of all")  # fmt: skip
        if asked.alone:
            lines.append("    after the prompt the answer would be cut into other tokens: it was "
                         "tokenised by itself")  # fmt: skip
        if answers.untouched:
            lines.append("    the last position is a special token or a sink: it was not replaced")
        for name, r in answers.readings.items():
            top = "  ".join(
                f"{quoted(token_text(run.lm.tokenizer, i))} {p:.3f}" for i, p in r.top[:SHOWN]
            )
            kl = "" if name == "original" else f"KL {r.kl:.4f}"
            lines.append(
                f" {'+' if r.hit else ' '}{' ' if r.agrees else '!'} {name:<8}  "
                f"rank {r.rank:<5} p {r.probability:.4f}  log p {r.log_prob:>8.3f}  {kl:<10}  {top}"
                + (f"  says {quoted(r.said)}" if asked.most > 1 else "")
            )
        return "\n".join([*lines, ""])

    def _rows(self, run: EvalRun, asked: AskedPrompt, answers: Answers) -> list[dict[str, Any]]:
        def text(token: int) -> str:
            return visible(token_text(run.lm.tokenizer, token))

        return [
            {
                "category": visible(asked.prompt.category),
                "prompt": visible(asked.prompt.prompt),
                "answer": " | ".join(visible(answer) for answer in asked.prompt.answers),
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
                "said": visible(r.said),
                "hit": r.hit,
                "replaced": 0 if name == "original" else answers.replaced,
            }
            for name, r in answers.readings.items()
        ]


def _counts(table: pd.DataFrame) -> pd.DataFrame:
    """A row per category and run (the original is what they are compared with), ALL last.

    Columns: `asked` prompts; `known`, those that the original answers; whether it `can` do the
    category; of the known ones `kept` and `lost`; `gained`, hits among the others, which count for
    nothing; `kept_frac` = kept / known with its 95 % interval (Wilson), empty where it cannot; mean
    `kl` over all prompts, nats. ALL is of the categories that the original can do.
    """
    known = table.loc[table["run"] == "original", "hit"].to_numpy()
    categories = table.loc[table["run"] == "original", "category"]
    asked = categories.groupby(categories, sort=False).size()
    able = {
        category: known[(categories == category).to_numpy()].sum() >= max(MIN_KNOWN, MIN_SHARE * n)
        for category, n in asked.items()
    }
    rows = []
    for category in (*asked.index, ALL):
        for run in RUNS[1:]:
            own = table[table["run"] == run]
            of = own["category"].map(able) if category == ALL else own["category"] == category
            of = of.to_numpy(dtype=bool)
            hit, n = own["hit"].to_numpy()[of], int(known[of].sum())
            kept = int((hit & known[of]).sum())
            can = n > 0 if category == ALL else bool(able[category])
            low, high = wilson(kept, n) if can else (math.nan, math.nan)
            rows.append(
                {
                    **{"category": category, "run": run, "asked": int(of.sum()), "known": n},
                    **{"can": can, "kept": kept, "lost": n - kept},
                    **{"gained": int(hit.sum()) - kept, "kept_frac": kept / n if can else math.nan},
                    **{"kept_low": low, "kept_high": high, "kl": float(own["kl"][of].mean())},
                }
            )
    return pd.DataFrame(rows)


def _left_out(counts: pd.DataFrame) -> str:
    """Which categories the LM cannot do, in words."""
    rows = counts[(counts["run"] == "sae") & (counts["category"] != ALL) & ~counts["can"]]
    if rows.empty:
        return "The untouched LM can do every category."
    named = ", ".join(f"{r.category} ({r.known} of {r.asked})" for r in rows.itertuples())
    return (
        f"The untouched LM answers too little (fewer than {MIN_KNOWN}, or than {MIN_SHARE:.0%}) "
        f"to say what is kept of: {named}."
    )


def _totals(table: pd.DataFrame) -> str:
    n, counts = len(table) // len(RUNS), _counts(table)
    lines = [
        f"TOTALS over {n} prompt{'s' if n > 1 else ''}",
        "  known: prompts that the untouched LM answers (all of an answer, its likeliest tokens)",
        "  kept, lost: of the known ones; gained: hits among the others, part of no share",
        "  kept %: kept / known, with its 95 % interval; KL: mean over all prompts, nats",
        f"  {ALL}: of the categories that the untouched LM can do",
        f"  {_left_out(counts)}",
        "",
        f"{'':<24}{'run':<6}{'asked':>6}{'known':>7}{'kept':>6}{'lost':>6}{'gained':>8}"
        f"{'kept %':>9}  {'interval':<17}{'KL':>9}",
    ]
    last = None
    for r in counts.to_dict("records"):
        category = r["category"]
        label = category if len(category) < 24 else f"{category[:22]}…"
        share = f"{r['kept_frac']:.1%}" if r["can"] else "-"
        between = f"{r['kept_low']:.1%} to {r['kept_high']:.1%}" if r["can"] else ""
        lines.append(
            f"{'' if category == last else label:<24}{r['run']:<6}{r['asked']:>6}{r['known']:>7}"
            f"{r['kept']:>6}{r['lost']:>6}{r['gained']:>8}{share:>9}  {between:<17}"
            f"{r['kl']:>9.4f}"
        )
        last = category
    return "\n".join([*lines, ""])


def _kept(counts: pd.DataFrame) -> go.Figure:
    """Share of the known answers that each run keeps, per category that the LM can do."""
    figure = go.Figure()
    for run in RUNS[1:]:
        rows, (colour, pattern, _) = counts[(counts["run"] == run) & counts["can"]], STYLES[run]
        figure.add_bar(
            x=_labels(rows["category"]),
            y=rows["kept_frac"].to_list(),
            error_y={
                "array": (rows["kept_high"] - rows["kept_frac"]).to_list(),
                "arrayminus": (rows["kept_frac"] - rows["kept_low"]).to_list(),
            },
            customdata=rows[["known", "kept", "lost", "gained"]].to_numpy().tolist(),
            name=LABELS[run],
            marker={"color": colour, "pattern": {"shape": pattern}},
            hovertemplate=f"{LABELS[run]}: %{{y:.1%}} of %{{customdata[0]}}: "
            "kept %{customdata[1]}, lost %{customdata[2]}, gained %{customdata[3]}<extra></extra>",
        )
    figure = styled(figure, "Answers that are kept", "category", "share of the LM's own answers")
    return figure.update_layout(barmode="group", bargap=0.25)


def _kl(counts: pd.DataFrame) -> go.Figure:
    """Mean KL from the original, per category and run."""
    figure = go.Figure()
    for run in RUNS[1:]:
        rows = counts[(counts["run"] == run) & (counts["category"] != ALL)]
        colour, _, symbol = STYLES[run]
        figure.add_scatter(
            x=_labels(rows["category"]),
            y=rows["kl"].to_list(),
            name=LABELS[run],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 11},
            hovertemplate=f"{LABELS[run]}: %{{y:.3g}} nats<extra></extra>",
        )
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return styled(figure, "How far the prediction moves", "category", "KL from the original (nats)")


def _labels(categories: pd.Series) -> list[str]:
    return [escape(str(category)) for category in categories]
