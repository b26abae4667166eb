"""The command line of the record: `report`, `compare`, `try`."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from kanllama_lightning.cli import quiet
from kanllama_lightning.lm import FrozenLM
from kanllama_lightning.packing import Rows
from kanllama_lightning.reports import texts
from kanllama_lightning.reports.base import EvalRun, Report

# from kanllama_lightning.reports.capability import Capability
# from kanllama_lightning.reports.concepts import Concepts
# from kanllama_lightning.reports.latents import Latents
from kanllama_lightning.reports.losses import Losses
from kanllama_lightning.reports.reconstruction import Reconstruction
from kanllama_lightning.reports.record import make, pending
from kanllama_lightning.reports.send import send
from kanllama_lightning.reports.sparsity import Sparsity
from kanllama_lightning.reports.subject import LM_KEYS, Subject, read_subject, shared_lm
from kanllama_lightning.run import EVAL
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

REPORTS: tuple[type[Report], ...] = (
    #    Capability,
    #    Concepts,
    Sparsity,
    Losses,
    Reconstruction,
    #    Latents,
)
"""In the order they are made; a new report adds its class here."""
CTX_LEN = 512
"""Of a saved head without a run, unless --ctx_len says otherwise."""


def report(
    runs: list[Path],
    reports: list[Report],
    by_name: bool = False,
    documents: int | None = None,
    text: list[str] | None = None,
    ctx_len: int | None = None,
    batch_seqs: int = 16,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    lm_name: str | None = None,
    lm_revision: str | None = None,
    lm_hook_point: str | None = None,
    lm_untrained: bool = False,
    again: bool = False,
    wandb: bool = True,
) -> list[EvalRun]:
    """Make the record of one or more heads on the same LM, from one pass over the text.

    Returns the runs, in the order given; see `add_report_arguments` for the arguments.
    """
    subjects = [read_subject(folder) for folder in runs]
    given: dict[str, Any] = {"name": lm_name, "revision": lm_revision}
    given |= {"hook_point": lm_hook_point, "untrained": lm_untrained or None}
    lm = shared_lm(subjects, given, dtype)
    where = _device(device)
    streams = any(r.streams for r in reports)
    sets = _sets(subjects[0], lm, documents, text, ctx_len) if streams else {}
    main = next(iter(sets.values()), None)
    counts = None if main is None else _counts(main, lm)
    about = {str(s.folder): _about(s, lm, sets, where, dtype) for s in subjects}
    made = [
        EvalRun(s.folder, s.head, lm, s.card, list(sets), s.folder / EVAL, counts)
        for s in subjects
    ]
    jobs = pending(made, reports, list(about.values()), by_name, again)
    if not jobs:
        return made
    lm.load_(where)
    for run in made:
        run.head.to(where)
    try:
        make(jobs, lm, sets, about, batch_seqs)
    finally:
        for subject, run in zip(subjects, made, strict=True):
            if wandb and run.tables:
                send(run, subject.config)
    return made


def _sets(
    first: Subject,
    lm: FrozenLM,
    documents: int | None,
    text: list[str] | None,
    ctx_len: int | None,
) -> dict[str, Rows]:
    if documents is not None and documents < 1:
        raise InputError(f"--documents={documents}: must be at least 1")
    data = first.data(lm.tokenizer)
    if text is None:
        if data is None:
            raise InputError(
                f"RUN={str(first.folder)!r}: a saved head does not say which text to evaluate on; "
                "give files or datasets with --text"
            )
        if ctx_len is not None:
            raise InputError(f"--ctx_len={ctx_len}: goes with --text; a run keeps its own")
        return texts.run_sets(data, documents)
    length = ctx_len or (data.ctx_len if data is not None else CTX_LEN)
    if length < 2:
        raise InputError(f"--ctx_len={length}: must be at least 2 tokens")
    append = data is not None and data.encoder.eos is not None
    return texts.text_sets(text, lm.tokenizer, length, append, documents)


def _counts(rows: Rows, lm: FrozenLM) -> Any:
    ids = rows.ids[rows.keep]
    if len(ids) and int(ids.max()) >= lm.vocab_size:
        raise InputError(
            f"--text: token id {int(ids.max())} is beyond the vocabulary of {lm.name} "
            f"({lm.vocab_size}); use text, or ids made with this model's own tokenizer"
        )
    return torch.bincount(ids, minlength=lm.vocab_size)


def _about(
    subject: Subject, lm: FrozenLM, sets: dict[str, Rows], device: torch.device, dtype: str
) -> dict[str, Any]:
    """What figures depend on, for the head of `summary.json` and for telling what is up to date."""
    head, known = subject.head, subject.card.get("provenance", {})
    data = subject.config.get("data", {})
    training = {k: data.get(k) for k in ("train", "val_fraction", "ctx_len", "append_eos")}
    return {
        "head": type(head).__name__,
        "class_path": subject.card["class_path"],
        "lm": lm.name,
        "revision": lm.revision,
        "hook_point": lm.hook.name,
        "lm_dtype": known.get("lm_dtype"),
        "dtype": dtype,
        "device": device.type,
        "d_model": head.d_model,
        "d_sae": head.d_sae,
        "target_l0": getattr(head, "target_l0", None),
        "seed": head.seed,
        "parameters": head.n_parameters(),
        "scale": float(head.scale),
        "train_tokens": known.get("tokens"),
        "train_finished": subject.summary.get("finished"),
        "train_tokens_per_second": subject.summary.get("tokens_per_second"),
        "train_data": training if data else None,
        "head_sha256": subject.sha256,
        "sets": {
            name: {
                "tokens": rows.ids.numel(),
                "documents": texts.n_documents(rows),
                "ids_sha256": texts.digest(rows),
            }
            for name, rows in sets.items()
        },
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise InputError(f"--device={name!r}: no such device; allowed: auto, cpu, cuda") from e
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device={name!r}: metrics need fp64; allowed: auto, cpu, cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device={name!r}: there is no CUDA device here; use cpu")
    return device


def add_report_arguments(parser: ArgumentParser) -> None:
    """The arguments of `report`, and a group for the settings of every report."""
    names = [r.name for r in REPORTS]
    add = parser.add_argument
    add("runs", nargs="+", type=str, help="Folders of finished runs, or of saved heads.")
    add("--config", action="config", help="YAML with any of these arguments.")
    add(
        "--reports",
        nargs="+",
        type=str,
        default=None,
        help=f"Which to make: {', '.join(names)} (default: all that apply).",
    )
    _add_text_arguments(parser)
    for kind in REPORTS:
        parser.add_class_arguments(kind, kind.name)


def _add_text_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--documents",
        type=int | None,
        default=None,
        help="Documents of each set (default: 2,000, or as many as there are).",
    )
    add(
        "--text",
        nargs="+",
        type=str,
        default=None,
        help="Files, folders or hub datasets to evaluate on (default: the run's held-out text and "
        "validation sets).",
    )
    add(
        "--ctx_len",
        type=int | None,
        default=None,
        help="With --text: tokens per row (default: the run's).",
    )
    add("--batch_seqs", type=int, default=16, help="Rows that the LM runs at once.")
    add("--device", type=str, default="auto", help="cpu, cuda, or auto.")
    add(
        "--dtype",
        type=Literal["float32", "bfloat16"],
        default="float32",
        help="Number format of the LM; bfloat16 blurs losses by up to 1 in 100.",
    )
    add("--again", type=bool, default=False, help="Make anew what is there already.")
    add(
        "--wandb",
        type=bool,
        default=True,
        help="Send tables and figures to the W&B run too, if the run had one.",
    )
    _add_lm_arguments(parser)


def _add_lm_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--lm.name",
        type=str | None,
        default=None,
        help="LM: hub name, folder, or `embedded` (default: the one it was trained on).",
    )
    add("--lm.revision", type=str | None, default=None, help="Commit, tag or branch of a hub LM.")
    add(
        "--lm.hook_point",
        type=str | None,
        default=None,
        help="Where the activations are (default: where the head was trained).",
    )
    add(
        "--lm.untrained",
        type=bool,
        default=False,
        help="Declares random weights: waives the checks that only a trained LM passes.",
    )


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


def _shared(given: Namespace) -> dict[str, Any]:
    keys = ("documents", "text", "ctx_len", "batch_seqs", "device", "dtype", "again", "wandb")
    found = {key: given[key] for key in keys}
    if found["batch_seqs"] < 1:
        raise InputError(f"--batch_seqs={found['batch_seqs']}: must be at least 1")
    return found | {f"lm_{k}": given.lm[k] for k in LM_KEYS}


def run_report(given: Namespace) -> None:
    """`evaluate.py report`."""
    reports = chosen(given.reports, given)
    made = report(
        [Path(r) for r in given.runs], reports, given.reports is not None, **_shared(given)
    )
    for run in made:
        log.info("the record of %s is in %s", run.folder, run.out)


COMMANDS = {"report": (add_report_arguments, run_report)}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    quiet()
    parser = ArgumentParser(
        prog="evaluate.py",
        description="The research record of saved heads.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands()
    for name, (add, run) in COMMANDS.items():
        sub = ArgumentParser(description=run.__doc__, exit_on_error=False, allow_abbrev=False)
        add(sub)
        commands.add_subcommand(name, sub)
    try:
        given = parser.parse_args(list(sys.argv[1:] if args is None else args))
        COMMANDS[given.subcommand][1](given[given.subcommand])
    except (InputError, ArgumentError) as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; finished reports are kept, the same command goes on from them\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
