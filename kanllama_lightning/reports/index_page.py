"""The page that a record is read from: the closing table, drawings, links, commands."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kanllama_lightning.pages import PAGES, beside, policy
from kanllama_lightning.reports.one_pass import finished, sample
from kanllama_lightning.reports.report import DRAWINGS, INDEX, EvalRun, Report
from kanllama_lightning.runs.folder import CONFIG, SUMMARY
from kanllama_lightning.storage.files import write_text
from kanllama_lightning.storage.small_files import read_json, there

OTHERS = {
    "try.html": "The text that `evaluate.py try` was given last: its latents, predictions.",
    "../curves.html": "The most bent of the learned curves, at the end of training.",
}
"""Pages of other commands, and what is on them."""


class Closing(NamedTuple):
    """The closing table of a report, as text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    """Paragraphs below it."""


class Shown(NamedTuple):
    """One report on the page."""

    title: str
    text: str
    page: str | None
    picture: str | None
    files: list[str]
    """Tables and logs."""


def write_index(
    run: EvalRun, closing: Closing, kinds: Sequence[type[Report]], options: Sequence[str]
) -> Path:
    """Write `index.html` of a record from what is there; returns the file.

    Args:
        run: Its folder may hold reports of this call and of earlier ones.
        closing: The figures that matter most.
        kinds: All reports, in the order that they are shown in.
        options: What the command was given beside the run and the reports' own settings.
    """
    known = read_json(run.out / SUMMARY, dict[str, Any]) if there(run.out / SUMMARY) else {}
    done = {one["report"]: one for one in finished(run.out, known.get("head_sha256"))}
    made = [kind for kind in kinds if kind.name in done]
    missing = [
        f"{kind.name} (--reports {kind.name} makes it)" for kind in kinds if kind.name not in done
    ]
    style = beside("plain.css")
    html = PAGES.get_template("record.html.j2").render(
        title=run.title,
        sample=_about(known),
        policy=policy(style, images="'self' file: data:"),
        style=style,
        cards=[_card(run.out, kind) for kind in made] + _others(run.out),
        missing=missing,
        beside=sorted(path.parent.name for path in run.out.glob(f"*/{INDEX}")),
        commands=_commands(run, made, done, options),
        made=_provenance(known),
        **closing._asdict(),
    )
    return write_text(run.out / INDEX, html)


def _about(known: Mapping[str, Any]) -> str:
    """How the head was trained, and over what its figures are."""
    said = []
    if known.get("train_tokens"):
        said.append(f"Trained on {known['train_tokens']:,} tokens")
    if known.get("sets"):
        said.append(f"evaluated on {sample(known['sets'])}")
    text = "; ".join(said)
    return text[:1].upper() + text[1:] + "." * bool(text)


def _provenance(known: Mapping[str, Any]) -> str:
    parts = [f"head {known['head_sha256'][:12]}"] if known.get("head_sha256") else []
    if known.get("train_commit"):
        parts.append(f"trained at commit {known['train_commit']}")
    parts += [f"{key} {known[key]}" for key in ("seed", "dtype", "device") if key in known]
    return "; ".join(parts)


def _card(out: Path, kind: type[Report]) -> Shown:
    pages = [name for name in kind.files if name.endswith(".html") and (out / name).is_file()]
    stem = Path(pages[0]).stem if pages else kind.name
    picture = f"{DRAWINGS}/{kind.picture or f'{stem}_0'}.svg"
    return Shown(
        kind.name.capitalize(),
        (kind.__doc__ or "").strip().split("\n")[0].replace("`", ""),
        pages[0] if pages else None,
        picture if (out / picture).is_file() else None,
        [name for name in kind.files if name not in pages and (out / name).is_file()],
    )


def _others(out: Path) -> list[Shown]:
    return [
        Shown(Path(name).stem.capitalize(), text.replace("`", ""), name, None, [])
        for name, text in OTHERS.items()
        if (out / name).is_file()
    ]


def _commands(
    run: EvalRun,
    made: Sequence[type[Report]],
    done: Mapping[str, Mapping[str, Any]],
    options: Sequence[str],
) -> list[str]:
    """What makes the same again: the head, the record, and reports with settings of their own."""
    lines = []
    if (run.folder / CONFIG).is_file():
        lines.append(["python", "train.py", "fit", "--config", str(run.folder / CONFIG)])
    report = ["python", "evaluate.py", "report", str(run.folder), *options]
    lines.append(report)
    for kind in made:
        usual, own = kind().settings(), done[kind.name]["settings"]
        given = [
            f"--{kind.name}.{key}={value}" for key, value in own.items() if usual.get(key) != value
        ]
        if given or kind.on_request:
            lines.append([*report, "--reports", kind.name, *given])
    return [shlex.join(line) for line in lines]
