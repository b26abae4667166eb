"""Tables of what the benchmarks found, from the JSON lines in a folder.

    .venv/bin/python benchmarks/table.py runs/benchmarks
    .venv/bin/python benchmarks/table.py runs/benchmarks --write docs/performance.md

Prints them, or puts them between the marks of a page.
Takes every `*.jsonl` of the folder, in the order of names: results of end_to_end.py,
head_step_peers.py and head_step.py; other lines are left alone. Nothing is computed here.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks/table.py: begin -->", "<!-- benchmarks/table.py: end -->"
TITLES = {
    "ours": "ours",
    "saelens": "SAELens",
    "sae_lens": "SAELens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
}

Row = dict[str, Any]


def load(folder: Path) -> list[Row]:
    """Every JSON object in the files of a folder."""
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line]


def ranged(values: dict[str, float], form: str = "{:.3g}") -> str:
    """Median, and in parentheses the range."""
    low, high = (form.format(values[bound]) for bound in ("min", "max"))
    return f"{form.format(values['median'])} ({low}-{high})"


def grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def caption(rows: Sequence[Row]) -> str:
    """Where the figures come from: command, commit, machine, versions, load."""
    first = rows[0]
    peers = ", ".join(f"{TITLES.get(k, k)} {v}" for k, v in first["peers"].items())
    loads: list[float] = []
    for row in rows:
        load = row["load_before"]
        loads += sum(load.values(), []) if isinstance(load, dict) else [load]
    lines = [
        f"`{first['command']}`",
        f"({first['measures']}) at `{first['commit']}`, {first['date']}, {first['machine']},"
        f" {first['threads']} thread{'s' if first['threads'] > 1 else ''},"
        f" n = {first['n']}, load of the machine before a run {min(loads):g} to {max(loads):g};"
        f" {peers or 'no peers'}.",
        *first["notes"],
    ]
    return "\n".join(lines)


def end_to_end(rows: Sequence[Row]) -> str:
    """Rates of the runners, and where our time goes."""
    parts = []
    for row in rows:
        lines = [
            [
                TITLES[name],
                ranged(rate, "{:,.0f}"),
                *(
                    ranged(row[key][name]) if name in row[key] else ""
                    for key in ("ours_over", "ours_over_per_cpu_second")
                ),
                f"{row['peak_rss_mib'][name]:,}",
                f"{row['lm_tokens_per_token'][name]:.2f}",
            ]
            for name, rate in row["tokens_per_second"].items()
        ]
        header = ["", "tokens/s", "ours over it", "the same per CPU second", "peak RSS, MiB"]
        parts += [caption([row]), grid([*header, "LM tokens per token"], lines)]
        if "our_shares" in row:
            shares = (f"{k} {ranged(v, '{:.1%}')}" for k, v in row["our_shares"].items())
            parts.append(f"Our counted time: {', '.join(shares)}.")
    return "\n\n".join(parts)


def head_steps(rows: Sequence[Row]) -> str:
    """Steps of the peers over ours; a table for each command."""
    parts = []
    for command in dict.fromkeys(row["command"] for row in rows):
        some = [row for row in rows if row["command"] == command]
        peers = list(dict.fromkeys(name for row in some for name in row["over_ours"]))
        lines = [
            [
                f"{row['head']}{' (settled)' if row['settled'] else ''}",
                ranged(row["ms"]["ours"], "{:,.0f}"),
                *(ranged(row["over_ours"][p]) if p in row["over_ours"] else "" for p in peers),
                slashed(row["l0"], ["ours", *peers]),
                slashed(row["above_state_mib"], ["ours", *peers]),
            ]
            for row in some
        ]
        names = [TITLES[peer] for peer in peers]
        header = ["head", "ours, ms", *(f"{n} / ours" for n in names), "L0", "MiB beyond state"]
        tok, d_model, d_sae, k = some[0]["tok_model_sae_k"]
        shape = f"{tok} tokens, width {d_model}, {d_sae} latents, k {k}."
        order = f"L0 and memory: ours, {', '.join(names)}." if names else ""
        parts += [caption(some), f"{shape} {order}".strip(), grid(header, lines)]
    return "\n\n".join(parts)


def slashed(values: dict[str, float], names: Sequence[str]) -> str:
    """Several values in one cell."""
    return " / ".join(f"{values[name]:g}" for name in names if name in values)


def floors(rows: Sequence[Row]) -> str:
    """Our steps over the least that any exact step could take."""
    lines = [
        [
            row["head"],
            " x ".join(map(str, row["tok_model_sae_k"])),
            ranged(row["over_floor"]),
            ranged(row["ms"]["head"], "{:,.0f}"),
            f"{row['above_state_mib']['head']:g}",
        ]
        for row in rows
    ]
    return grid(["head", "shape", "over the floor", "ms", "MiB beyond state"], lines)


def together(rows: Sequence[Row]) -> str:
    """Heads side by side over their own steps and one LM pass."""
    parts = []
    for row in rows:
        lines = [
            [name, row["heads"].get(name, ""), ranged(ms, "{:,.0f}")]
            for name, ms in row["ms"].items()
            if name != "whole"
        ]
        lines.append(["all, `train.py fit`", "", ranged(row["ms"]["whole"], "{:,.0f}")])
        over = f"Side by side over the sum of its parts: {ranged(row['over_parts'])}."
        parts += [grid(["what", "head", "ms per step"], lines), f"`{row['command']}`. {over}"]
    return "\n\n".join(parts)


def long_runs(rows: Sequence[Row]) -> str:
    """Resident memory over the steps of a long run."""
    parts = []
    for row in rows:
        some = list(row["mib"].items())
        lines = [[f"{int(step):,}", f"{mib:,.0f}"] for step, mib in some[:: max(1, len(some) // 8)]]
        said = f"`{row['command']}`. Last fifth over second fifth: {row['growth']:.3f}."
        parts += [grid(["step", "resident, MiB"], lines), said]
    return "\n\n".join(parts)


SECTIONS: list[tuple[str, Callable[[Row], bool], Callable[[Sequence[Row]], str]]] = [
    ("Training, end to end", lambda row: row.get("benchmark") == "end_to_end", end_to_end),
    ("One training step", lambda row: row.get("benchmark") == "head_step_peers", head_steps),
    ("Heads side by side", lambda row: row.get("benchmark") == "side_by_side", together),
    ("Memory over a long run", lambda row: row.get("benchmark") == "soak", long_runs),
    ("One training step over its floor", lambda row: "over_floor" in row, floors),
]
"""Title, which rows, how they are written."""


def page(rows: Sequence[Row]) -> str:
    """All sections that there are results for."""
    parts = []
    for title, belongs, written in SECTIONS:
        some = [row for row in rows if belongs(row)]
        if some:
            parts += [f"## {title}", written(some)]
    return "\n\n".join(parts)


def put(text: str, tables: str, name: str) -> str:
    """A page with new tables between its marks."""
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise SystemExit(
            f"{name}: has no place for tables; put these two lines in:\n{BEGIN}\n{END}"
        )
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of .jsonl files")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    args = parser.parse_args()
    tables = page(load(args.folder))
    if not tables:
        raise SystemExit(f"{args.folder}: holds no results (*.jsonl) of the benchmarks")
    if args.write is None:
        sys.stdout.write(tables + "\n")
    else:
        args.write.write_text(put(args.write.read_text(), tables, str(args.write)))


if __name__ == "__main__":
    main()
