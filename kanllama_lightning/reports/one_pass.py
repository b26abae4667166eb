"""One pass over the text for all heads and reports together, and what is already there."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch

from kanllama_lightning.console import stopping
from kanllama_lightning.console.phase import Phase
from kanllama_lightning.data.packing import Rows
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.preflight import preflight
from kanllama_lightning.lm.splice import ablated, losses_by_head
from kanllama_lightning.measures.head_batch import run_head
from kanllama_lightning.reports.report import EvalRun, Report, Seen, ablated_every
from kanllama_lightning.reports.token_sets import batches
from kanllama_lightning.runs.folder import SUMMARY, make_folder
from kanllama_lightning.storage.small_files import read_json, there, write_json
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

DONE = "done"
"""Folder, within a record, of one file per finished report."""


class About(TypedDict):
    """What a report was made of, as far as somebody reads it."""

    head_sha256: str
    sets: dict[str, Any]


class Done(TypedDict):
    """`done/<report>.json`: what a finished report found."""

    report: str
    fingerprint: str
    settings: dict[str, Any]
    about: About
    figures: dict[str, float | int | str | bool | None]
    sha256: NotRequired[dict[str, str]]


def read_done(path: Path) -> dict[str, Any] | None:
    """What a finished report found; None where it is not there, or damaged: it is made anew."""
    if not there(path):
        return None
    try:
        done: dict[str, Any] = read_json(path, Done)
    except InputError as e:
        log.warning("%s", e)
        return None
    return done


class Job(NamedTuple):
    """One report about one head, still to be made."""

    run: EvalRun
    report: Report
    facts: Mapping[str, Any]
    """Everything its figures depend on, beside the report's settings."""


def pending(
    runs: Sequence[EvalRun], about: Mapping[str, Mapping[str, Any]], by_name: bool, again: bool
) -> list[Job]:
    """What is not there yet; says what is left out, and why.

    Args:
        runs: Heads, with the reports that were asked for of each; those that do not apply, and
            those that were not named and have to be, are taken out.
        about: Per run folder: what figures depend on, beside the reports' settings.
        by_name: Whether the reports were asked for by name: one that does not apply is an error.
        again: Make all of them anew.

    Raises:
        InputError: A report that was asked for does not apply to a head.
    """
    jobs = []
    for run in runs:
        facts, asked, run.reports = about[str(run.folder)], run.reports, []
        for report in asked:
            if report.on_request and not by_name:
                continue
            reason = report.applies(run)
            if reason is not None:
                if by_name:
                    raise InputError(f"--reports {report.name}: {reason}")
                log.info("report %s is not made: %s", report.name, reason)
                continue
            run.reports.append(report)
            if not again and _is_done(run, report, facts):
                log.info("%s: there already (--again makes it anew)", run.out / report.files[0])
                continue
            jobs.append(Job(run, report.fresh(), facts))
    return jobs


def _fingerprint(run: EvalRun, report: Report, facts: Mapping[str, Any]) -> str:
    about = {k: v for k, v in facts.items() if report.streams or k != "sets"}
    about |= {"report": report.name, "settings": report.settings()}
    for name in report.reads:
        path = run.path(name)
        about[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _is_done(run: EvalRun, report: Report, facts: Mapping[str, Any]) -> bool:
    done = read_done(run.out / DONE / f"{report.name}.json")
    if done is None or not all((run.out / f).is_file() for f in report.files):
        return False
    return bool(done["fingerprint"] == _fingerprint(run, report, facts))


def make(
    jobs: Sequence[Job],
    lm: FrozenLM,
    sets: Mapping[str, Rows],
    about: Mapping[str, Mapping[str, Any]],
    batch_seqs: int,
) -> None:
    """Make the reports; each is safe on the disk as soon as it is finished.

    Args:
        jobs: What to make. Heads are measured on the same positions: those that are no sink for
            the first of them, whose mean also serves mean ablation.
        lm: Loaded LM.
        sets: Token sets of the pass; may be empty if no report looks at text.
        about: Per run folder: what opens its `summary.json`.
        batch_seqs: Rows the LM runs at once.
    """
    for job in jobs:
        make_folder(job.run.out)
        make_folder(job.run.out / DONE)
        job.report.begin(job.run)
    for job in jobs:
        if not job.report.streams:
            _finish(job, about[str(job.run.folder)])
    streaming = [job for job in jobs if job.report.streams]
    if streaming:
        _stream(streaming, lm, sets, batch_seqs)
        for job in streaming:
            _finish(job, about[str(job.run.folder)])


def _finish(job: Job, about: Mapping[str, Any]) -> None:
    stopping.obey()
    began = time.perf_counter()
    run, report = job.run, job.report
    log.info("%s: making it", report.name)
    made = report.finish(run)
    if made is None:
        return
    # what is no number has no place in JSON
    figures = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in made.items()
    }
    seconds = round(time.perf_counter() - began, 3)
    done = {
        "report": report.name,
        "fingerprint": _fingerprint(run, report, job.facts),
        "settings": report.settings(),
        "seconds": seconds,
        "about": about,
        "figures": figures,
        "sha256": {
            name: hashlib.sha256((run.out / name).read_bytes()).hexdigest()
            for name in report.files
            if name.endswith(".csv") and (run.out / name).is_file()
        },
    }
    write_json(run.out / DONE / f"{report.name}.json", done)
    write_json(run.out / SUMMARY, summary(run, about))
    log.info(
        "%s: %s (%.1f s)", report.name, ", ".join(str(run.out / f) for f in report.files), seconds
    )


def summary(run: EvalRun, about: Mapping[str, Any]) -> dict[str, Any]:
    """What is known about the head, and the figures of all reports on one sample of text.

    Reports on another sample than `sets` says are left out (`stale` lists them).
    """
    flat: dict[str, Any] = dict(about)
    every = finished(run.out, about["head_sha256"])
    looked = [done for done in every if done["about"]["sets"]]
    if looked and not about["sets"]:
        # a report that looks at no text says nothing about it: the sample stays what it was
        path = run.out / SUMMARY
        before = read_json(path).get("sets") if there(path) else None
        looked.sort(key=lambda done: (done["about"]["sets"] != before, done["report"] != "losses"))
        flat["sets"] = looked[0]["about"]["sets"]
    for done in every:
        if same_sample(done, flat["sets"]):
            flat |= {f"{done['report']}/{name}": value for name, value in done["figures"].items()}
    return flat


def finished(out: Path, sha256: str | None) -> list[dict[str, Any]]:
    """What is recorded of every finished report about a head, in a folder of a record."""
    every = [read_done(path) for path in sorted((out / DONE).glob("*.json"))]
    return [done for done in every if done and done["about"]["head_sha256"] == sha256]


def same_sample(done: Mapping[str, Any], sets: Mapping[str, Any]) -> bool:
    """Whether a finished report looked at these very sets, or at no text."""
    own = done["about"]["sets"]
    return not own or _digests(own) == _digests(sets)


def _digests(sets: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one.get("ids_sha256") for name, one in sets.items()}


def stale(out: Path, known: Mapping[str, Any]) -> dict[str, str]:
    """Reports in a folder that its summary leaves out, and the sample that each is of."""
    return {
        done["report"]: sample(done["about"]["sets"])
        for done in finished(out, known.get("head_sha256"))
        if not same_sample(done, known.get("sets", {}))
    }


def sample(sets: Mapping[str, Any]) -> str:
    """Sets of text in words."""
    return ", ".join(
        f"{one.get('tokens', 0):,} tokens ({one.get('documents', 0):,} documents) of {name}"
        for name, one in sets.items()
    )


@torch.no_grad()
def _stream(jobs: Sequence[Job], lm: FrozenLM, sets: Mapping[str, Rows], batch_seqs: int) -> None:
    """The pass: one prefix per batch, and for the losses a continuation of it, one per head, and
    in every n-th batch two for the ablations."""
    runs = list({id(job.run): job.run for job in jobs}.values())
    reference = runs[0].head
    total = sum(-(-len(rows.ids) // batch_seqs) for rows in sets.values())
    limits = [job.report.tokens for job in jobs if job.report.splices]
    most = None if None in limits else max((n for n in limits if n), default=0)
    with Phase("reading", total, "batches") as progress:
        first = True
        for name, rows in sets.items():
            looked = dict.fromkeys(range(len(jobs)), 0)
            whole = rows.ids.numel()
            every = ablated_every(whole if most is None else min(whole, most))
            for index, tokens in enumerate(batches(rows, batch_seqs)):
                tokens = tokens.to(lm.device)
                if first:
                    preflight(lm, tokens, reference.norm_limit)
                    first = False
                wanting = [i for i, job in enumerate(jobs) if _wants(job.report, looked[i])]
                if not wanting:
                    progress.add()
                    continue
                prefix = lm.prefix(tokens.ids)
                views = {
                    id(run): run_head(prefix, tokens, name, run.head, reference.norm_limit)
                    for run in runs
                }
                some = next(iter(views.values()))
                losing = [id(jobs[i].run) for i in wanting if jobs[i].report.splices]
                x_hats = {key: views[key].out.x_hat for key in losing}
                ablations = {} if index % every else ablated(some.x, reference.x_mean)
                losses = losses_by_head(lm, some, x_hats, ablations) if x_hats else {}
                for i in wanting:
                    job = jobs[i]
                    own = losses.get(id(job.run)) if job.report.splices else None
                    job.report.observe(job.run, Seen(views[id(job.run)], index, own))
                    looked[i] += tokens.ids.numel()
                progress.add()


def _wants(report: Report, looked: int) -> bool:
    limit = report.tokens
    return limit is None or looked < limit
