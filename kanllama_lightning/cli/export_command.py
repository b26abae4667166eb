"""`evaluate.py export`: a head into another project's folder, read back and compared; or pages."""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from jsonargparse import Namespace
from torch import Tensor

from kanllama_lightning.cli.neuronpedia_command import write_pages
from kanllama_lightning.console.terminal import terminal
from kanllama_lightning.exchange import neuronpedia, saelens
from kanllama_lightning.exchange.agreement import agreement, base, made_rows, with_extremes
from kanllama_lightning.exchange.foreign_files import PART, refuse_others
from kanllama_lightning.exchange.formats import FORMATS
from kanllama_lightning.exchange.origin import Origin, site
from kanllama_lightning.lm.hook_points import parse_input_point
from kanllama_lightning.reports.evaluation import (
    EvalSettings,
    check_batch_seqs,
    device_named,
    first_activations,
    rows_at_once,
    token_rows,
)
from kanllama_lightning.reports.latents_report import LatentsReport
from kanllama_lightning.reports.saved_head import LM_KEYS, SavedHead, read_subject, shared_lm
from kanllama_lightning.runs.folder import EVAL, SUMMARY, make_folder
from kanllama_lightning.runs.lookup import folder_named
from kanllama_lightning.storage.small_files import Count, read_csv, read_json, there
from kanllama_lightning.types import InputError

COMPARED = 8192
"""Tokens that an export is read back and compared on, unless another number is asked for."""


def run_export(given: Namespace) -> None:
    """Write a head, or pages of its latents, for another project.

    Raises:
        InputError: It cannot be held there, or what was written differs from the head.
    """
    if given.tokens is not None and given.tokens < 1:
        raise InputError(f"--tokens={given.tokens}: must be at least 1")
    to_pages = given.to == neuronpedia.NAME
    for name in () if to_pages else ("model_id", "sae_set"):
        if given[name] is not None:
            raise InputError(f"--{name}: goes with --to {neuronpedia.NAME}")
    if not given.out.strip() or "\0" in given.out:
        raise InputError(f"--out {given.out!r}: is no name of a folder; give one")
    subject = read_subject(folder_named(given.run, given.runs_dir), given.allow)
    head, out = subject.head, Path(given.out)
    if out.is_dir() and out.samefile(subject.folder):
        raise InputError(f"--out {given.out!r}: is what is exported; give another folder")
    lm = {key: given.lm[key] for key in LM_KEYS}
    how = EvalSettings(
        lm=lm | {"untrained": lm["untrained"] or None},
        **{key: given[key] for key in ("text", "ctx_len", "batch_seqs", "device", "dtype")},
    )
    check_batch_seqs(how)
    if to_pages:
        write_pages(subject, given, how)
        return
    kind = FORMATS[given.to]
    with arriving(out, kind.FILES) as part:
        became = kind.write(head, origin_of(subject), part)
        again, _ = kind.read(part)
        x, what = activations(subject, how, given.tokens or COMPARED)
        found = agreement(head, again.encode, again.decode, x, lambda rows: base(again, rows))
        if not found.holds:
            raise InputError(
                f"--out {str(out)!r}: what would be written is not the same head ({found}); "
                "nothing was left there"
            )
    say = partial(terminal(highlight=False).print, soft_wrap=True)
    say(f"Written: {out}, {head.title} as {became} of {given.to}")
    say(f"Read back and compared on {what}:\n{found}")
    if became == saelens.OURS:
        say(
            "SAELens loads it after `import kanllama_lightning.exchange.saelens_plugin`, and not "
            "before"
        )


@contextmanager
def arriving(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A folder to write an export into, whose files are moved to `folder` when the block ends.

    A block that fails leaves what was there as it was, and nothing else.

    Args:
        folder: Where they go; made if it is missing.
        names: Of the files; those that are not written are taken away there.

    Raises:
        InputError: It holds something else, or cannot be made.
    """
    refuse_others(folder, names)
    made = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    try:
        make_folder(folder, "folder", "--out FOLDER")
        part = folder / PART
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        for name in names:
            if there(part / name):
                (part / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        part.rmdir()
    except BaseException:
        shutil.rmtree(folder / PART, ignore_errors=True)
        with contextlib.suppress(OSError):
            for one in made:
                one.rmdir()
        raise


def origin_of(subject: SavedHead) -> Origin:
    """What a run, or the card of a saved head, says of itself."""
    known = subject.card.get("provenance", {})
    data = subject.config.get("data", {})
    lm = subject.lm_args()
    text = known.get("text") or data.get("train")
    trained = {k: known[k] for k in ("tokens", "step", "commit", "lm_dtype", "imported")
               if known.get(k) is not None}  # fmt: skip
    l0 = subject.summary.get("val/l0")
    return Origin(
        lm=lm.get("name"),
        hook_point=lm.get("hook_point"),
        input_point=_input_point(subject),
        revision=lm.get("revision"),
        bos=lm.get("bos"),
        ctx_len=data.get("ctx_len"),
        text=None if text is None else _in_words(text),
        tokenizer=lm.get("name"),
        l0=l0 if isinstance(l0, float | int) and l0 > 0 else None,
        trained=trained or None,
        frequency=frequency_of(subject),
    )


def _in_words(text: Any) -> str:
    """A text as its config, or a saved head, says it: a corpus as one would call it, no dict."""
    if not isinstance(text, dict) or not {"class_path", "class"} & text.keys():
        return str(text)
    named = {name: value for name, value in text.items() if name not in ("class", "init_args")}
    given = text.get("init_args") or {} if "class_path" in text else named
    said = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    return f"{str(text.get('class_path') or text['class']).rpartition('.')[2]}({said})"


def _input_point(subject: SavedHead) -> str | None:
    """Where a transcoder reads, in full."""
    known = subject.card.get("provenance", {}).get("input_point")
    if known is not None:
        return str(known)
    lm, at = subject.lm_args(), site(subject.lm_args().get("hook_point"))
    if lm.get("input_point") is None or at is None:
        return None
    return parse_input_point(lm["input_point"], at).name


def frequency_of(subject: SavedHead) -> Float[Tensor, " d_sae"] | None:
    """How often each latent fires by the record; None without one of these weights."""
    table, summary = (subject.folder / EVAL / f for f in (LatentsReport.files[0], SUMMARY))
    if not there(table) or not there(summary):
        return None
    if read_json(summary, dict[str, Any]).get("head_sha256") != subject.sha256:
        return None
    found = torch.zeros(subject.head.d_sae)
    for row in read_csv(table, {"latent": Count, "frequency": float}):
        if row["latent"] < len(found):
            found[row["latent"]] = row["frequency"]
    return found


@torch.no_grad()
def activations(
    subject: SavedHead, how: EvalSettings, tokens: int
) -> tuple[Float[Tensor, "tok d_model"], str]:
    """What an export is compared on, a tenth of it made extreme, and that in words.

    Args:
        subject: The head.
        how: On which text, and where; made activations where there is no text.
        tokens: How many rows, at most.
    """
    if "data" not in subject.config and how.text is None:
        return made_rows(subject.head, tokens), (
            f"{tokens:,} made activations, a tenth of them extreme (a saved head does not say "
            "which text it is for; give some with --text)"
        )
    model = shared_lm([subject], how.lm, how.dtype)
    name, rows = next(iter(token_rows(subject, model, how).items()))
    device = device_named(how.device)
    model.load_(device)
    at_once = how.batch_seqs or rows_at_once(model, rows.ids.shape[1], device)
    found = with_extremes(first_activations(model, rows, at_once, tokens)[:tokens].cpu())
    return found, f"{len(found):,} tokens of {name!r}, a tenth made extreme, which shifts L0"
