"""The comparison for people: files, HTML, terminal."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from kanllama_lightning.comparison.charts import Row, figures
from kanllama_lightning.comparison.loading import Evaluated
from kanllama_lightning.comparison.print_tables import latex, markdown, points
from kanllama_lightning.comparison.tables import (
    MATCHED,
    PAIR,
    QUANTITIES,
    differences,
    seed_table,
    table,
)
from kanllama_lightning.measures.cells import SHARE, fine, footnote
from kanllama_lightning.measures.metrics import NOT_MEANINGFUL, meaningful
from kanllama_lightning.pages.plots import write_page, write_svg
from kanllama_lightning.runs.folder import make_folder
from kanllama_lightning.storage.files import write_text

SEEDS_OF_A_CLAIM = 3


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "d_sae": ("latents", "{:,}".format),
    "parameters": ("parameters", "{:,}".format),
    "target_l0": ("L0 target", "{:g}".format),
    "l0": ("L0", "{:.2f}".format),
    "bits_per_token": ("bits per token", "{:.1f}".format),
    "fvu": ("FVU", fine),
    "delta_ce": ("delta CE", fine),
    "delta_ce_share": (SHARE, "{:.2%}".format),
    "kl": ("KL", fine),
    "dead_frac": ("dead", "{:.1%}".format),
    "dead_tokens": ("dead: of N tokens", "{:,.0f}".format),
    "dense_frac": ("dense", "{:.1%}".format),
    "lens_kurtosis_median": ("kurtosis, median", "{:.2f}".format),
    "lens_skewness_median": ("skewness, median", "{:.2f}".format),
    "lens_max_cosine_mean": ("largest cosine, mean", "{:.3f}".format),
    "sae_kept_frac": ("answers kept", "{:.1%}".format),
    "recovered_frac": ("concepts recovered", "{:.1%}".format),
    "mean_f1": ("concepts, mean F1", "{:.3f}".format),
    "train_tokens": ("training tokens", "{:,}".format),
    "train_passes": ("passes over the text", "{:.2f}".format),
    "train_tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "ce_score": ("CE score (by zeros)", "{:.4f}".format),
    "ce_uniform": ("uniform guess, ln V (nats)", "{:.3f}".format),
    "train_commit": ("commit", str),
}
"""Columns for people, with their heads; those blank for all runs are left out."""
SHARES = ("delta_ce_share", "ce_score")
"""Columns that say nothing of some heads (`metrics.meaningful`)."""
BESIDE = (
    *("lens_kurtosis_median", "lens_skewness_median", "lens_max_cosine_mean"),
    *("sae_kept_frac", "recovered_frac", "mean_f1"),
    *("train_tokens", "train_passes", "train_tokens_per_second", "train_commit"),
    *("ce_score", "ce_uniform"),
)
"""Columns that belong to a run, not to a set."""
BRIEF = ("parameters", "l0", "fvu", "delta_ce", "delta_ce_share", "kl", "dead_frac", "dead_tokens")
"""Columns that fit a terminal."""


def write(
    out: Path, runs: Sequence[Evaluated], flags: Sequence[str] = (), tolerance: float = MATCHED
) -> list[Path]:
    """Write the comparison into a folder; returns the files.

    `comparison.csv` (`table`), `differences.csv` (`differences`), `seeds.csv` (`seed_table`, where
    there are several seeds of a head), their tables in `comparison.md` and, for a paper,
    `comparison.tex`, the plots as `svg/*.svg`, and last `comparison.html`, which opens without a
    network.

    Args:
        out: The folder; made if it is missing.
        runs: To be compared.
        flags: From `conflicts`.
        tolerance: Share by which L0 may differ for it to count as matched.
    """
    rows, pairs, means = table(runs), differences(runs, tolerance), seed_table(runs)
    make_folder(out, "folder", "--out FOLDER")
    files = {
        "comparison.csv": pd.DataFrame(rows),
        "differences.csv": pd.DataFrame(pairs, columns=list(PAIR)),
    }
    if means:
        files["seeds.csv"] = pd.DataFrame(means)
    written = [write_text(out / name, frame.to_csv(index=False)) for name, frame in files.items()]
    text = (
        f"{len(runs)} runs at {runs[0].summary.get('hook_point')} of {runs[0].summary.get('lm')}. "
        "Lower FVU, delta CE and KL are better; losses in nats per token. Below a figure: its 95 % "
        f"interval, bootstrap over documents. {SHARE}: what the reconstruction costs as a share of "
        "what the mean activation in its place costs; 0 is perfect, 1 no better than the mean."
    )
    drawn, shown = figures(runs), _tables(rows, means, pairs)
    drawings = {re.sub(r"\W+", "_", str(f.layout.title.text)).lower(): f for f in drawn}
    written += write_svg(out / "svg", drawings)
    written.append(write_text(out / "comparison.md", _markdown(text, shown, flags)))
    brief = [row for row in rows if row["set"] == rows[0]["set"]]
    grid = _of_runs(brief, [c for c in _used(brief) if c in BRIEF])
    caption = f"{text.split('. ')[0]}, on {rows[0]['set']}; 95 % intervals over documents."
    written.append(write_text(out / "comparison.tex", latex(caption, grid)))
    html = write_page(
        out / "comparison.html",
        "Comparison",
        text,
        drawn,
        template="comparison.html.j2",
        flags=flags,
        tolerance=f"{tolerance:.0%}",
        footnote=footnote(_cell(row, key) for row in rows for key in SHARES),
        **shown._asdict(),
    )
    return [*written, html]


class Tables(NamedTuple):
    """Tables of the page, each its title or meaning, its head and its rows of cells."""

    sets: list[tuple[str, list[str], list[list[str]]]]
    beside: tuple[list[str], list[list[str]]] | None
    means: tuple[list[str], list[list[str]]] | None
    pairs: list[tuple[str, list[str], list[list[str]]]]


def _markdown(text: str, shown: Tables, flags: Sequence[str]) -> str:
    parts = [f"# Comparison\n\n{text}\n", points("Not alike", flags)]
    parts += [markdown(title, (head, rows)) for title, head, rows in shown.sets]
    if shown.beside:
        parts.append(markdown("Latents, concepts, training", shown.beside))
    if shown.means:
        parts.append(markdown("Over seeds: means", shown.means, words=1))
    parts += [markdown(meaning, (head, rows), words=3) for meaning, head, rows in shown.pairs]
    return "\n".join(part for part in parts if part)


def _tables(rows: Sequence[Row], means: Sequence[Row], pairs: Sequence[Row]) -> Tables:
    sets = []
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        size = f"{own[0]['documents']:,} documents, {own[0]['n_targets']:,} predicted tokens"
        table_ = _of_runs(own, [c for c in _used(own) if c not in BESIDE])
        sets.append((f"On {name}: {size}", *table_))
    main = [row for row in rows if row["set"] == rows[0]["set"]]
    beside = [c for c in _used(main) if c in BESIDE]
    keys = [k for k in COLUMNS if any(row.get(k) is not None for row in means)]
    of_means = [[row["group"], *(_cell(row, c) for c in keys)] for row in means]
    levels = {lv: [row for row in pairs if row["level"] == lv] for lv in ("seeds", "run")}
    return Tables(
        sets,
        _of_runs(main, beside) if beside else None,
        (["group", *(COLUMNS[c][0] for c in keys)], of_means) if means else None,
        [
            (MEANING[lv], ["a", "b", "L0", *QUANTITIES.values()], _paired(own))
            for lv, own in levels.items()
            if own
        ],
    )


MEANING = {
    "seeds": "a minus b, means over seeds; the interval covers documents and seeds. A claim about "
    f"two kinds of head needs {SEEDS_OF_A_CLAIM} seeds of each. Not corrected for the number of "
    "pairs.",
    "run": "a minus b; the interval covers documents, the same ones for both, and holds for these "
    "very runs: it does not say what other seeds would give. Not corrected for the number of "
    "pairs.",
}


def _paired(pairs: Sequence[Row]) -> list[list[str]]:
    """A row per pair, a cell per quantity: difference, interval, verdict."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in pairs:
        l0 = f"{row['l0_a']:.2f}, {row['l0_b']:.2f}"
        if row["matching"] != "matched":
            l0 += f"\ncorrected: {row['matching']}"
        cells = found.setdefault((row["a"], row["b"]), [row["a"], row["b"], l0])
        if row["difference"] is None:
            cells.append(f"\n{row['verdict']}")
            continue
        weak = row["level"] == "seeds" and min(row["seeds_a"], row["seeds_b"]) < SEEDS_OF_A_CLAIM
        verdict = _sided(row) + (", too few seeds" if weak else "")
        ends = f"{fine(row['low'], '+')} to {fine(row['high'], '+')}"
        cells.append(f"{fine(row['difference'], '+')}\n{ends}\n{verdict}")
    return list(found.values())


def _sided(row: Row) -> str:
    """The verdict with a and b for their labels, which stand beside it."""
    for side in "ab":
        if row["verdict"] == f"{row[side]} lower":
            return f"{side} lower"
    return str(row["verdict"])


def _used(rows: Sequence[Row]) -> list[str]:
    """Columns for people that some row fills."""
    return [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]


def _of_runs(rows: Sequence[Row], columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table with a row per run."""
    cells = [[row["run"], row["head"], *(_cell(row, c) for c in columns)] for row in rows]
    return ["run", "head", *(COLUMNS[c][0] for c in columns)], cells


def _cell(row: Row, key: str) -> str:
    """A figure as text; its interval or range, if it has one, on a second line."""
    show, value = COLUMNS[key][1], row.get(key)
    if key in SHARES and not meaningful(value, row.get("fvu")):
        return NOT_MEANINGFUL
    if value is None:
        return ""
    low, high = (
        row.get(f"{key}_{end}", row.get(f"{key}_{other}"))
        for end, other in (("low", "min"), ("high", "max"))
    )
    return show(value) + (f"\n{show(low)} to {show(high)}" if low is not None else "")


def render(
    runs: Sequence[Evaluated], flags: Sequence[str] = (), tolerance: float = MATCHED
) -> Lines:
    """The main figures, the differences at matched L0 and the flags, for a terminal.

    Args:
        runs: To be compared.
        flags: From `conflicts`.
        tolerance: Share by which L0 may differ for it to count as matched.
    """
    rows = [row for row in table(runs) if row["set"] == runs[0].sets[0]]
    columns = [key for key in _used(rows) if key in BRIEF]
    head, cells = _of_runs(rows, columns)
    title = f"On {runs[0].sets[0]}; 95 % intervals over {rows[0]['documents']:,} documents"
    parts: list[Table | Text] = [_terminal(title, head, cells, 2)]
    pairs = differences(runs, tolerance)
    levels = [level for level in ("seeds", "run") if any(row["level"] == level for row in pairs)]
    if levels:
        own = _paired([row for row in pairs if row["level"] == levels[0]])
        kind = {"seeds": "means over seeds", "run": "run by run"}[levels[0]]
        title = f"a minus b at L0 within {tolerance:.0%}; {kind}"
        parts.append(_terminal(title, ["a", "b", "L0", *QUANTITIES.values()], own, 2))
    parts += [Text(f"- {flag}") for flag in flags]
    why = footnote(cell for row in cells for cell in row)
    parts += [Text(why)] if why else []
    return Lines(*parts)


def _terminal(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> Table:
    """A rich table; cells are taken literally, whatever brackets they hold."""
    made = Table(
        title=Text(title), title_justify="left", show_lines=any("\n" in r[-2] for r in rows)
    )
    for i, name in enumerate(head):
        made.add_column(name, justify="left" if i < words else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
