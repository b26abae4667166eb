"""The command line of the record: `report`, `compare`, `try`; and `export`."""

import contextlib
import importlib
import math
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.table import Table
from rich.text import Text

from kanllama_lightning import comparison, reports
from kanllama_lightning.cli.arguments import config_files
from kanllama_lightning.cli.evaluate_options import (
    ABOUT,
    CONFIG,
    ONE_RUN,
    PLACES,
    REPOSITORY,
    SETTINGS,
)
from kanllama_lightning.cli.export_command import run_export
from kanllama_lightning.cli.kinds import in_words
from kanllama_lightning.cli.publish_command import run_publish
from kanllama_lightning.console.entry import Aftermath, guarded
from kanllama_lightning.console.quiet import quiet
from kanllama_lightning.console.terminal import terminal
from kanllama_lightning.measures import cells
from kanllama_lightning.prompts.try_page import trial_page
from kanllama_lightning.prompts.try_text import show, try_text
from kanllama_lightning.reports.bits_report import BitsReport
from kanllama_lightning.reports.capability_report import CapabilityReport
from kanllama_lightning.reports.concepts_report import ConceptsReport
from kanllama_lightning.reports.dashboard_report import DashboardReport
from kanllama_lightning.reports.evaluation import EvalSettings, complete, device_named, report
from kanllama_lightning.reports.index_page import Closing, write_index
from kanllama_lightning.reports.interpretability_report import InterpretabilityReport
from kanllama_lightning.reports.labels import read_labels
from kanllama_lightning.reports.latents_report import LatentsReport
from kanllama_lightning.reports.losses_report import LossesReport
from kanllama_lightning.reports.one_pass import finished, stale
from kanllama_lightning.reports.reconstruction_report import ReconstructionReport
from kanllama_lightning.reports.report import EvalRun, Report
from kanllama_lightning.reports.saved_head import LM_KEYS, read_subject, shared_lm
from kanllama_lightning.reports.sparsity_report import SparsityReport
from kanllama_lightning.runs.folder import EVAL, SUMMARY, make_folder, remove_parts
from kanllama_lightning.runs.lookup import folder_named, folders_named
from kanllama_lightning.storage.files import write_text
from kanllama_lightning.storage.small_files import ordinary_size, read_json, there
from kanllama_lightning.types import InputError

ORDER: tuple[type[Report], ...] = (
    CapabilityReport,
    ConceptsReport,
    SparsityReport,
    BitsReport,
    LossesReport,
    ReconstructionReport,
    InterpretabilityReport,  # what comes after takes its explanations in
    LatentsReport,
    DashboardReport,
)
for _module in pkgutil.iter_modules(reports.__path__):
    if _module.name.endswith("_report"):
        importlib.import_module(f"{reports.__name__}.{_module.name}")
REPORTS = (*ORDER, *(kind for kind in Report.__subclasses__() if kind not in ORDER))
"""Those of the folder, in the order they are made."""
PAGES = (InterpretabilityReport, DashboardReport)
"""What is about one run alone: nothing that runs are compared by."""
Form = str | Callable[[Mapping[str, Any]], str]
"""How a figure is written: a format, or what makes text of all figures that it belongs to."""
OVERVIEW: tuple[tuple[str, str, Form], ...] = (
    ("L0", "sparsity/{set}/l0", "{:.2f}"),
    ("bits per token of the code", "bits/{set}/bits_per_token", "{:.1f}"),
    ("FVU", "reconstruction/{set}/fvu", "{:.4f}"),
    ("CE, original", "losses/{set}/ce_clean", "{:.4f}"),
    ("CE, reconstruction", "losses/{set}/ce_recon", "{:.4f}"),
    ("CE, zero ablation", "losses/{set}/ce_zero", "{:.4f}"),
    ("CE, mean ablation", "losses/{set}/ce_mean", "{:.4f}"),
    ("CE, uniform guess", "losses/{set}/ce_uniform", "{:.4f}"),
    ("delta CE (95 % interval)", "losses/{set}/delta_ce", cells.delta_ce),
    (cells.SHARE, "losses/{set}/delta_ce_share", cells.share),
    ("KL (nats per token)", "losses/{set}/kl_recon", "{:.4f}"),
    ("dead", "latents/dead_frac", "{:.1%}"),
    ("dense", "latents/dense_frac", "{:.1%}"),
    ("lens skewness, median", "latents/lens_skewness_median", "{:.2f}"),
    ("lens kurtosis, median (normal: 3)", "latents/lens_kurtosis_median", "{:.2f}"),
    ("answers kept", "capability/sae_kept_frac", "{:.1%}"),
    ("facts recovered (F1 at least 0.9)", "concepts/recovered_frac", "{:.1%}"),
    ("facts: mean F1", "concepts/mean_f1", "{:.3f}"),
    ("LLM: detection (chance: 0.5)", "interpretability/detection", "{:.3f}"),
    ("LLM: score, 1 to 5", "interpretability/score", "{:.2f}"),
)
"""What `report` shows at the end; everything is in `summary.json`."""
OF_THEIR_OWN = {
    "capability": ("n_known", "answers of the untouched LM"),
    "concepts": ("n_facts", "facts in stories of their own"),
    "interpretability": ("n_judged", "latents"),
}
"""Reports that are of something else than the sample: the figure that counts it, and its name."""


OF_A_RECORD = (
    "documents",
    "text",
    "ctx_len",
    "dtype",
    "lm.name",
    "lm.hook_point",
    "lm.input_point",
)
"""Options that say what a record is of."""


def add_arguments(parser: ArgumentParser, command: str) -> None:
    """The arguments of a command; those of `report` have a group for every report."""
    places: dict[str, Any] = {} if command in ONE_RUN else {"nargs": "+"}
    name = "run" if command in ONE_RUN else "runs"
    parser.add_argument(name, type=str, help=PLACES[command], **places)
    if command == "publish":
        parser.add_argument("repository", type=str, help=REPOSITORY)
    parser.add_argument("--config", action="config", help=CONFIG)
    for setting in SETTINGS[command]:
        more: dict[str, Any] = {"nargs": "+"} if setting.many else {}
        more |= {"required": True} if setting.required else {"default": setting.default}
        parser.add_argument(f"--{setting.name}", type=setting.type, help=setting.help, **more)
    if command == "report":
        for kind in REPORTS:
            parser.add_class_arguments(kind, kind.name)


def chosen(names: list[str] | None, given: Namespace) -> list[Report]:
    """The reports asked for, with their settings.

    Raises:
        InputError: There is no report of that name.
    """
    known = {kind.name: kind for kind in REPORTS}
    for name in names or []:
        if name not in known:
            raise InputError(f"--reports {name}: no such report; known: {', '.join(known)}")
    wanted = [kind for kind in REPORTS if names is None or kind.name in names]
    return [kind(**given[kind.name].as_dict()) for kind in wanted]


def how(given: Namespace) -> EvalSettings:
    """On which text, where, in which numbers."""
    lm = {key: given.lm[key] for key in LM_KEYS}
    keys = [key for key in EvalSettings._fields if key != "lm"]
    return EvalSettings(
        lm=lm | {"untrained": lm["untrained"] or None}, **{key: given[key] for key in keys}
    )


def run_report(given: Namespace) -> None:
    """Write the record of finished runs or saved heads into their eval/ folders."""
    reports = chosen(given.reports, given)
    folders = [one for r in given.runs for one in folders_named(r, given.runs_dir)]
    made = report(folders, reports, how(given), given.reports is not None, given.again)
    console = terminal(max(100, terminal().width))
    for run in made:
        answers = [a for r in run.reports if (a := r.told(run)) is not None]
        for answer in answers:
            console.print(Text(answer), soft_wrap=True)
        shown = overview(run)
        if shown.row_count and len(answers) < len(run.reports):
            console.print(shown)
        said = f"Everything is in {run.out}"
        if run.out.is_dir():
            index = write_index(run, _closing(shown), REPORTS, _options(given))
            said += f"; open {index}"
        console.print(said, soft_wrap=True, highlight=False)
    wanting = [why for run in made for r in run.reports if (why := r.wanting(run)) is not None]
    if wanting:
        raise InputError("; ".join(wanting))


def _closing(table: Table) -> Closing:
    """The table as text, for a page."""
    rows = list(zip(*(map(str, column.cells) for column in table.columns), strict=True))
    notes = str(table.caption or "").splitlines()
    return Closing([str(column.header) for column in table.columns], rows, notes)


def _options(given: Namespace) -> list[str]:
    """What the record is of, as it was asked for."""
    found = []
    for setting in SETTINGS["report"]:
        value = given[setting.name] if "." not in setting.name else given.get(setting.name)
        if setting.name in OF_A_RECORD and value not in (None, setting.default):
            many = value if isinstance(value, list) else [value]
            found += [f"--{setting.name}", *map(str, many)]
    return found


def run_compare(given: Namespace) -> None:
    """Compare finished runs; what is missing of their records is made first."""
    folders: list[Path] = []
    labels: list[str | None] = []
    for label, folder in comparison.labelled(given.runs):
        found = folders_named(str(folder), given.runs_dir)
        folders += found
        several = label is not None and len(found) > 1
        labels += [f"{label}/{one.name}" if several else label for one in found]
    if len(folders) < 2:
        raise InputError(f"RUN={', '.join(given.runs)}: give at least two runs to compare")
    tolerance = comparison.MATCHED if given.tolerance is None else given.tolerance
    if not 0 <= tolerance < 1:
        raise InputError(f"--tolerance={tolerance}: must be from 0 to below 1")
    kinds = [kind() for kind in REPORTS if kind not in PAGES]
    records = complete(folders, kinds, how(given))
    runs = comparison.load(folders, labels, records)
    flags = comparison.conflicts(runs, given.force)
    written = comparison.write(Path(given.out), runs, flags, tolerance)
    console = terminal(max(120, terminal().width))
    console.print(comparison.render(runs, flags, tolerance))
    console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False)


def run_try(given: Namespace) -> None:
    """Run the LM with and without its head on a text, and show which latents fire."""
    steer = steering(given.steer or [])
    if given.out is not None and (not given.out or Path(given.out).is_dir()):
        raise InputError(f"--out {given.out}: is a folder; give the name of a file, such as x.html")
    subject = read_subject(folder_named(given.run, given.runs_dir), given.allow)
    lm = {key: given.lm[key] for key in LM_KEYS}
    model = shared_lm([subject], lm | {"untrained": lm["untrained"] or None}, given.dtype)
    device = device_named(given.device)
    model.load_(device)
    head = subject.head.to(device)
    found = try_text(head, model, given.text, given.n_new, given.top, given.latents, steer)
    known = subject.folder / EVAL / LatentsReport.files[0]
    labels = read_labels(known) if there(known) else None
    terminal().print(show(found, labels))
    out = Path(given.out) if given.out else subject.folder / EVAL / "try.html"
    make_folder(out.parent, "folder", "--out FILE")
    write_text(out, trial_page(found, given.text, labels))
    terminal().print(f"Written: {out}", soft_wrap=True, highlight=False)


def steering(given: Sequence[str]) -> dict[int, float]:
    """Latents and strengths from what was typed.

    Raises:
        InputError: It is not LATENT=STRENGTH, or names a latent twice.
    """
    found: dict[int, float] = {}
    for one in given:
        latent, _, strength = one.partition("=")
        try:
            number, value = int(latent), float(strength)
        except ValueError as e:
            raise InputError(
                f"--steer {one!r}: must be LATENT=STRENGTH, a number and an activation, such as "
                "12=3.5"
            ) from e
        if not math.isfinite(value) or number in found:
            why = "is given twice" if number in found else "must be set to a finite number"
            raise InputError(f"--steer {one!r}: latent {number} {why}")
        found[number] = value
    return found


def overview(run: EvalRun) -> Table:
    """The figures of a record that matter most, for a terminal; all of one sample of text.

    A row that is of something else (prompts, stories, a part of the sample) says of what.
    """
    path = run.out / SUMMARY  # which a dry run does not write
    known = read_json(path, dict[str, Any]) if there(path) else {}
    table = Table(title=run.title, title_justify="left", min_width=len(run.title))
    columns, rows = figures_of(run.out, known)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    said = [cell for row in rows for cell in row[1:]]
    notes = [cells.footnote(said)] if cells.footnote(said) else []
    notes += [
        f"Left out: {name}, which is of {sample}; `--reports {name}` makes it anew."
        for name, sample in stale(run.out, known).items()
    ]
    table.caption, table.caption_justify = Text("\n".join(notes)) if notes else None, "left"
    return table


def figures_of(out: Path, known: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the figures that matter most.

    Args:
        out: Folder of the record.
        known: Its `summary.json`.
    """
    sets = known.get("sets", {})
    columns = ["figure"]
    columns += [f"{name}\n{one.get('tokens', 0):,} tokens" for name, one in sets.items()]
    limits = _limits(out, known)
    rows = []
    for label, key, form in OVERVIEW:
        shown = [_cell(known, key.format(set=name), form) for name in sets or [""]]
        if any(shown):
            per_set, report = "{set}" in key, key.split("/")[0]
            row = shown if per_set else [shown[0], *[""] * (len(shown) - 1)]
            rows.append([label + _sample_of(report, known, limits), *row])
    return columns if sets else [*columns, "value"], rows


def _limits(out: Path, known: Mapping[str, Any]) -> dict[str, int]:
    """Reports that looked at a part of the sample, and at how many tokens of each set."""
    every = finished(out, known.get("head_sha256"))
    limits = {done["report"]: done["settings"].get("tokens") for done in every}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _sample_of(report: str, known: Mapping[str, Any], limits: Mapping[str, int]) -> str:
    """What a row is of, where it is not the sample that the table is of."""
    if report in limits:
        return f", about the first {limits[report]:,} tokens"
    if report not in OF_THEIR_OWN:
        return ""
    key, what = OF_THEIR_OWN[report]
    n = known.get(f"{report}/{key}")
    return f", of {n:,.0f} {what}" if n is not None else f", of {what}"


def _cell(known: Mapping[str, Any], key: str, form: Form) -> str:
    """A figure as text, "" if unknown."""
    under = key.rpartition("/")[0]
    if isinstance(form, str):
        return cells.plain(known, key, form)
    return form({k.removeprefix(f"{under}/"): v for k, v in known.items() if under in k})


def publish(given: Namespace) -> None:
    """Put a head on the hub; its card has the figures of its record."""
    run_publish(given, lambda subject, known: figures_of(subject.folder / EVAL, known))


COMMANDS = {
    "report": run_report,
    "compare": run_compare,
    "try": run_try,
    "export": run_export,
    "publish": publish,
}


def _explain(message: str) -> str:
    """One clear message from what the parser says."""
    text = re.sub(r"\s*\n\s*", " ", message).strip()
    text = in_words(text) or text[:1500]
    return f"{text}\nsee `python evaluate.py --help` and `python evaluate.py report --help`"


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    quiet()
    given = list(sys.argv[1:] if args is None else args)
    places: list[Path] = []
    kept = "finished reports are kept, the same command goes on from them"

    def clear(disk: bool) -> None:
        for place in places if disk else []:
            remove_parts(place)

    after = Aftermath(
        _explain,
        lambda _: f"stopped; {kept}",
        lambda: next((place for place in places if place.is_dir()), None),
        lambda: f"make room; {kept}",
        clear,
    )
    return guarded(lambda: _run(given, places), given, after)


def _run(given: list[str], places: list[Path]) -> int:
    """The command itself; puts the folders that it writes into `places`."""
    parser = ArgumentParser(
        prog="evaluate.py",
        description="The research record of saved heads.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands()
    for name in COMMANDS:
        sub = ArgumentParser(description=ABOUT[name], exit_on_error=False, allow_abbrev=False)
        add_arguments(sub, name)
        commands.add_subcommand(name, sub)
    for file in config_files(given):
        ordinary_size(Path(file), "name a YAML file")  # the parser would wait for a pipe
    parsed = parser.parse_args(given)
    settings = parsed[parsed.subcommand]
    runs = settings.get("runs") or [settings.get("run")]
    for run in runs:
        if "hub:" in str(run):
            continue  # the command fetches it
        with contextlib.suppress(InputError):  # the command says it
            places.append(folder_named(str(run).rpartition("=")[2], settings.runs_dir))
    try:
        COMMANDS[parsed.subcommand](settings)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
