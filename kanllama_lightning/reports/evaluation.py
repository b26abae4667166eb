"""The record of heads on one LM: what is read, what is missing, and one pass for all of it."""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.data.packing import Rows
from kanllama_lightning.functional.moments import norms
from kanllama_lightning.functional.sinks import sink_limit, within
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.preflight import check_forward
from kanllama_lightning.pages.plots import check_png
from kanllama_lightning.reports import token_sets as texts
from kanllama_lightning.reports.one_pass import (
    DONE,
    finished,
    make,
    pending,
    read_done,
    same_sample,
    sample,
)
from kanllama_lightning.reports.report import EvalRun, Report
from kanllama_lightning.reports.saved_head import SavedHead, read_subject, shared_lm
from kanllama_lightning.reports.send import send
from kanllama_lightning.runs.folder import EVAL, SUMMARY
from kanllama_lightning.runs.wandb_logger import check_mode
from kanllama_lightning.storage.named import name_of
from kanllama_lightning.storage.small_files import read_json, there
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

CTX_LEN = 512
"""Tokens per row for a saved head without a run, unless another number is asked for."""
ROWS_AT_ONCE = 16
"""Rows that the LM runs at once, at most."""
CPU_AT_ONCE = 1.5e11
"""Weights times tokens of a batch on a CPU, at most: some ten seconds for two heads."""
START_TOKENS = 8192
"""Tokens that the mean and the sink limit of an imported head are of."""


class EvalSettings(NamedTuple):
    """How heads are evaluated: on which text, where, in which numbers."""

    documents: int | None = None
    """Documents of each set; None for 2,000, or as many as there are."""
    text: list[str] | None = None
    """Files, folders or hub datasets; None for the run's own validation sets."""
    ctx_len: int | None = None
    """Tokens per row of `text`; None for the run's."""
    batch_seqs: int | None = None
    """Rows that the LM runs at once; None for 16, or fewer of a large LM on a CPU."""
    device: str = "auto"
    dtype: str = "float32"
    """Number format of the LM."""
    lm: Mapping[str, Any] = MappingProxyType({})
    """Overrides for the LM's arguments; None keeps the run's own value."""
    wandb: bool = True
    """Whether the record goes to the W&B run too, if there is one."""
    png: bool = False
    """Whether figures are also written as PNG."""
    allow: Sequence[str] = ()
    """Modules whose classes a run's files may name, beside what is shipped."""


def report(
    runs: Sequence[Path],
    reports: Sequence[Report],
    how: EvalSettings,
    by_name: bool = False,
    again: bool = False,
) -> list[EvalRun]:
    """Make the record of one or more heads on the same LM, from one pass over the text.

    Args:
        runs: Folders of finished runs, or of saved heads.
        reports: What to make.
        how: On which text, where, in which numbers.
        by_name: Whether the reports were asked for by name: one that does not apply is an error.
        again: Make anew what is there already.

    Returns:
        The runs, in the order given; more than one of a head where reports go to several folders.
    """
    if how.png:
        check_png()
    if how.wandb:
        check_mode()
    subjects = [read_subject(folder, how.allow) for folder in runs]
    alike: dict[str | None, list[Path]] = {}
    for subject in subjects:
        alike.setdefault(subject.lm_args().get("input_point"), []).append(subject.folder)
    if len(alike) > 1:  # heads that read one place, and transcoders: a pass for each
        parts = [report(own, reports, how, by_name, again) for own in alike.values()]
        every = [run for part in parts for run in part]
        return sorted(every, key=lambda run: list(runs).index(run.folder))
    lm = shared_lm(subjects, how.lm, how.dtype)
    device = device_named(how.device)
    check_batch_seqs(how)
    sets = token_rows(subjects[0], lm, how) if any(r.streams for r in reports) else {}
    main = next(iter(sets.values()), None)
    counts = None if main is None else _counts(main, lm)
    about = {str(s.folder): _about(s, lm, sets, device, how.dtype) for s in subjects}
    made: list[EvalRun] = []
    for s in subjects:
        home = _home(s, how, about[str(s.folder)])
        places: dict[Path, list[Report]] = {}
        for one in reports:
            places.setdefault(_place(home, one, s.sha256), []).append(one)
        for out, own in places.items():
            run = EvalRun(s.folder, s.head, lm, s.card, list(sets), out, counts, how.png, home)
            run.reports = own
            made.append(run)
    jobs = pending(made, about, by_name, again)
    made = [run for run in made if run.reports]
    if not jobs:
        return made
    lm.load_(device)
    rows = how.batch_seqs or ROWS_AT_ONCE
    if main is not None:
        rows = how.batch_seqs or rows_at_once(lm, main.ids.shape[1], device)
        check_forward(lm, next(texts.batches(main, rows)).to(device))
    for run in made:
        run.head.to(device)
    for s in subjects:
        if s.imported and main is not None:
            start_imported(s, lm, main, rows)
    configs = {str(s.folder): s.config for s in subjects}
    try:
        make(jobs, lm, sets, about, rows)
    finally:
        for run in made:
            if how.wandb and run.tables:
                send(run, configs[str(run.folder)])
    return made


@torch.no_grad()
def start_imported(subject: SavedHead, lm: FrozenLM, rows: Rows, seqs: int) -> None:
    """Give a head of another project what one of ours has from its training text.

    That is the mean activation, which mean ablation splices in, the norm from which on a token is a
    sink, and how many latents it has per token where its folder does not say.

    Args:
        subject: The head, on the LM's device.
        lm: Loaded.
        rows: The text that both are of, of which the first tokens count.
        seqs: Rows that the LM runs at once.
    """
    head = subject.head
    given = first_activations(lm, rows, seqs, START_TOKENS)
    if subject.target_l0 is None and isinstance(head, SAE):
        # what controls of equal sparsity are made by
        head.target_l0 = max(1, round(float(head(given).codes.l0().double().mean())))
    x = head.target(given)
    sizes = norms(x)
    limit = sink_limit(sizes)
    head.norm_limit.copy_(limit)
    head.x_mean.copy_(x[within(sizes, limit)].mean(0))
    log.info(
        "%s: its mean activation and sink limit are those of the first %s tokens evaluated on, "
        "as its folder does not have them", subject.folder, f"{len(x):,}"
    )  # fmt: skip


def _home(subject: SavedHead, how: EvalSettings, about: Mapping[str, Any]) -> Path:
    """The folder of the record that a call is about.

    `eval/` is that of the run's own text. Text of the user's own has a folder inside it, and so has
    another number of documents or number format where `eval/` has a record already that differs.
    """
    home = subject.folder / EVAL
    elsewhere = _elsewhere(subject, how)
    names = elsewhere + _asked(how)
    if not names:
        return home
    standing = finished(home, subject.sha256)
    differs = [done for done in standing if not _alike(done, about)]
    if not differs and not elsewhere and (how.text is None or "data" not in subject.config):
        return home
    beside = home / "-".join(names)
    if differs:
        log.info(
            "%s: the record there is of %s; this one goes to %s",
            home,
            sample(differs[0]["about"]["sets"]),
            beside,
        )
    return beside


def _elsewhere(subject: SavedHead, how: EvalSettings) -> list[str]:
    """A name for another LM, or another place in it, than the head was trained at; none if not."""
    trained = subject.lm_args()
    differs = {
        key: value
        for key, value in how.lm.items()
        if value is not None
        and key != "untrained"
        and (key in trained or key == "bos")
        and value != trained.get(key)
    }
    if not differs:
        return []
    said = ", ".join(f"lm.{key}={value}" for key, value in differs.items())
    was = ", ".join(f"lm.{key}={trained.get(key)}" for key in differs)
    log.warning(
        "%s: the head was trained with %s; these figures are with %s", subject.folder, was, said
    )
    plain = re.sub(r"[^\w.]+", "_", "_".join(str(value) for value in differs.values()))
    return [f"{plain[-40:]}-{_hash(json.dumps(differs, sort_keys=True, default=str))}"]


def _asked(how: EvalSettings) -> list[str]:
    """Names for what is asked otherwise than by default; empty if nothing is."""
    found = []
    if how.text is not None:
        given = json.dumps([how.text, how.ctx_len])
        plain = re.sub(r"[^\w.]+", "_", "_".join(Path(name).name for name in how.text))
        found.append(f"{plain[:40]}-{_hash(given)}")
    if how.documents is not None:
        found.append(f"documents-{how.documents}")
    if how.dtype != "float32":
        found.append(how.dtype)
    return found


def _alike(done: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Whether a finished report is of the sample and number format that is asked for."""
    sampled = not about["sets"] or same_sample(done, about["sets"])
    return sampled and done["about"].get("dtype") == about["dtype"]


def _place(home: Path, one: Report, sha256: str) -> Path:
    """The folder of a report: the record's, or one inside it for settings of one's own."""
    settings = one.settings()
    if settings == type(one)().settings() or (one.on_request and not one.own()):
        return home
    standing = read_done(home / DONE / f"{one.name}.json") or {}
    same = standing.get("settings") == settings
    other_head = standing.get("about", {}).get("head_sha256") != sha256
    if not one.own() and (same or other_head):
        return home
    return home / f"{one.name}-{_hash(json.dumps(settings, sort_keys=True))}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def complete(runs: Sequence[Path], reports: Sequence[Report], how: EvalSettings) -> list[Path]:
    """Make what is missing of the records of several heads, and nothing that is there.

    A report is there if it was made of this very head and of the sample that its record is of;
    which sample that is, is as it was asked for, or as it is where nothing was asked.

    Returns:
        The folder of each head's record.
    """
    if _asked(how):
        return [run.record for run in report(runs, reports, how)]
    alike: dict[tuple[str, ...], list[SavedHead]] = {}
    for folder in runs:
        subject = read_subject(folder, how.allow)
        made = _made(subject)
        lacking = tuple(r.name for r in reports if r.name not in made and not r.on_request)
        if lacking:
            alike.setdefault(lacking, []).append(subject)
    for names, subjects in alike.items():
        wanted = _applicable([r for r in reports if r.name in names], subjects, how)
        if wanted:
            report([subject.folder for subject in subjects], wanted, how)
    return [folder / EVAL for folder in runs]


def _applicable(
    reports: Sequence[Report], subjects: list[SavedHead], how: EvalSettings
) -> list[Report]:
    """Those that make sense for one of the heads: for others no text need be read."""
    lm = shared_lm(subjects[:1], how.lm, how.dtype)
    runs = [EvalRun(s.folder, s.head, lm, s.card, (), s.folder / EVAL) for s in subjects]
    return [report for report in reports if any(report.applies(run) is None for run in runs)]


def _made(subject: SavedHead) -> set[str]:
    """Names of the reports in the record of a head that are of one sample."""
    home = subject.folder / EVAL
    sets = read_json(home / SUMMARY).get("sets", {}) if there(home / SUMMARY) else {}
    every = finished(home, subject.sha256)
    return {done["report"] for done in every if same_sample(done, sets)}


def token_rows(first: SavedHead, lm: FrozenLM, how: EvalSettings) -> dict[str, Rows]:
    """The token sets that are evaluated on, by name: the text asked for, or a run's own.

    Raises:
        InputError: There is none, or it does not fit the LM.
    """
    documents, text, ctx_len = how.documents, how.text, how.ctx_len
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
        _check_length(lm, data.ctx_len)
        return texts.run_sets(data, documents)
    length = ctx_len or (data.ctx_len if data is not None else CTX_LEN)
    if length < 2:
        raise InputError(f"--ctx_len={length}: must be at least 2 tokens")
    _check_length(lm, length)
    append = data is not None and data.encoder.eos is not None
    return texts.text_sets(text, lm.tokenizer, length, append, documents)


def _check_length(lm: FrozenLM, length: int) -> None:
    lm.check_length(
        length,
        f"--ctx_len={length}",
        f"give --text with --ctx_len {lm.positions} or less",
    )


def _counts(rows: Rows, lm: FrozenLM) -> Any:
    ids = rows.ids[rows.keep]
    if len(ids) and int(ids.max()) >= lm.vocab_size:
        raise InputError(
            f"--text: token id {int(ids.max())} is beyond the vocabulary of {lm.name} "
            f"({lm.vocab_size}); use text, or ids made with this model's own tokenizer"
        )
    return torch.bincount(ids, minlength=lm.vocab_size)


def _about(
    subject: SavedHead, lm: FrozenLM, sets: dict[str, Rows], device: torch.device, dtype: str
) -> dict[str, Any]:
    """What figures depend on, for the head of `summary.json` and for telling what is up to date."""
    head, known = subject.head, subject.card.get("provenance", {})
    data = subject.config.get("data", {})
    training = {k: data.get(k) for k in ("train", "val_fraction", "ctx_len", "append_eos")}
    return {
        "head": head.title,
        "class_path": name_of(type(head)),
        "lm": lm.name,
        "revision": lm.revision,
        "hook_point": lm.hook.name,
        **({"input_point": lm.input.name} if lm.input else {}),
        "lm_dtype": known.get("lm_dtype"),
        "dtype": dtype,
        "device": device.type,
        "d_model": head.d_model,
        "d_sae": head.d_sae,
        "target_l0": subject.target_l0,
        "seed": head.seed,
        "parameters": head.n_parameters(),
        "scale": float(head.scale),
        "train_tokens": known.get("tokens"),
        "train_passes": known.get("passes"),
        "train_commit": known.get("commit"),
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


def check_batch_seqs(how: EvalSettings) -> None:
    """Refuse batches of no rows; raises InputError."""
    if how.batch_seqs is not None and how.batch_seqs < 1:
        raise InputError(f"--batch_seqs={how.batch_seqs}: must be at least 1")


def first_activations(
    lm: FrozenLM, rows: Rows, seqs: int, tokens: int
) -> Float[Tensor, "tok d_row"]:
    """What heads are given of the first tokens that are no special ones; whole batches.

    Args:
        lm: Loaded.
        rows: Where they are from.
        seqs: Rows of a batch.
        tokens: After how many to stop, or some more; all there are, if those are fewer.
    """
    parts: list[Tensor] = []
    for batch in texts.batches(rows, seqs):
        batch = batch.to(lm.device)
        parts.append(lm.acts(batch.ids)[batch.keep].float())
        if sum(map(len, parts)) >= tokens:
            break
    return torch.cat(parts)


def rows_at_once(lm: FrozenLM, ctx_len: int, device: torch.device) -> int:
    """Rows of a batch of the pass: on a CPU so few that it can say how far it is.

    Args:
        lm: Its weights need not be loaded.
        ctx_len: Tokens per row.
        device: Where it runs.
    """
    if device.type != "cpu":
        return ROWS_AT_ONCE
    return max(1, min(ROWS_AT_ONCE, int(CPU_AT_ONCE / (lm.n_parameters * ctx_len))))


def device_named(name: str) -> torch.device:
    """The device meant.

    Raises:
        InputError: It is not here, or cannot do it.
    """
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
