"""`evaluate.py publish`: a head, its SAELens folder, its figures and a card, to the hub."""

import csv
import hashlib
import io
import logging
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from jsonargparse import Namespace

from kanllama_lightning.cli.export_command import origin_of
from kanllama_lightning.comparison.loading import Recorded
from kanllama_lightning.console.secrets import LONG, MARK, scrubbed
from kanllama_lightning.console.secrets import known as secrets
from kanllama_lightning.console.terminal import terminal
from kanllama_lightning.exchange import saelens
from kanllama_lightning.exchange.model_card import NAME, CardFacts, card, plain
from kanllama_lightning.exchange.origin import Origin
from kanllama_lightning.heads.head import CARD as HEAD_CARD
from kanllama_lightning.heads.head import WEIGHTS
from kanllama_lightning.lm.frozen import EMBEDDED
from kanllama_lightning.measures import cells
from kanllama_lightning.reports.report import Report
from kanllama_lightning.reports.saved_head import SavedHead, read_subject
from kanllama_lightning.runs.folder import CONFIG, EVAL, HEAD, SUMMARY
from kanllama_lightning.runs.from_hub import NO_HUB, misnamed
from kanllama_lightning.runs.lookup import folder_named
from kanllama_lightning.storage.files import write_text
from kanllama_lightning.storage.small_files import read_csv, read_json, read_text, there, write_json
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

Rows = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Columns and rows of a table."""
STAGED = "published"
"""Folder of a run in which lies what goes to the hub, as it was sent last."""
RECORD, THEIRS = "record", "saelens"
MOST_BYTES = 16 << 20
"""Of a table of the record; larger ones stay here."""
SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[a-z]_[A-Za-z0-9]{20,}|"
    r"AKIA[A-Z0-9]{16})(?![A-Za-z0-9])"
)
"""Keys of well-known services, which are no secret that the environment tells."""
KEYS = re.compile(r"api_?key|secret|passw|credential|(?:^|_)token$", re.IGNORECASE)
"""Names under which nobody would publish a text."""
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
MADE_ANEW = "delete it; `evaluate.py report` makes it anew"
TEXTS = {
    "capability.csv": ("prompt", "answer", "top1", "top", "said"),
    "ce_bench.csv": ("story1", "story2"),
}
"""Columns of tables that hold text that was asked about: it stays here."""
FOLDERS = re.compile(
    r"""(?:(?<!\w)file:/+|(?<![^\s,;=:'"(\[])~?/)(?:[^\s/'",;]+/)+(?=[^\s/'",;])"""
)
"""Folders of this machine in front of a name, wherever they stand in a text."""
UNITS = (
    "CE: the LM's next-token cross-entropy in nats per token. Delta CE: what it rises by with the "
    "reconstruction in the activation's place. FVU: share of the variance left unexplained. L0: "
    "latents per token. All measured as at inference."
)


def run_publish(given: Namespace, figures: Callable[[SavedHead, dict[str, Any]], Rows]) -> None:
    """Put a head on the hub, or list what would go there.

    Args:
        given: The parsed command line.
        figures: Makes a table for people of a head's `eval/summary.json`.

    Raises:
        InputError: The head is none, the name is none, or the hub does not take it.
    """
    repository = _repository(given.repository)
    if given.license is not None and LICENSE.fullmatch(given.license) is None:
        raise InputError(
            f"--license {given.license!r:.100}: must be the short name of a licence, as the hub "
            "lists them, such as mit or apache-2.0"
        )
    subject = read_subject(folder_named(given.run, given.runs_dir), given.allow)
    if subject.imported:
        raise InputError(
            f"RUN={given.run!r}: comes from another project, and is not ours to publish; export or "
            "copy its folder"
        )
    folder = _staged(subject, repository, given.license, figures)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    say = partial(terminal(highlight=False).print, soft_wrap=True)
    say(f"{folder}, for https://huggingface.co/{repository}:")
    for path in files:
        say(f"  {str(path.relative_to(folder)):32} {path.stat().st_size:>14,} bytes")
    if given.dry_run:
        say("Nothing was sent (--dry_run true).")
        return
    say(f"Published: {_sent(folder, repository, given.private)}")


def _repository(name: str) -> str:
    name = name.removeprefix("hub://")
    if why := misnamed(name):
        raise InputError(
            f"--repository {name!r:.200}: must be OWNER/NAME on the hub ({why}); such as me/my-sae"
        )
    return name


def _staged(
    subject: SavedHead,
    repository: str,
    license: str | None,
    figures: Callable[[SavedHead, dict[str, Any]], Rows],
) -> Path:
    """Write what is published into a folder of the run; returns it."""
    secrets.add_all_in(yaml.safe_dump([subject.config, subject.card]))
    folder = subject.folder / STAGED
    part = subject.folder / f"{STAGED}.tmp"
    for place in (folder, part):
        if there(place) and (place.is_symlink() or not place.is_dir()):
            raise InputError(
                f"{place}: is no folder, and what is sent is put together there; move it away"
            )
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _gathered(subject, part, repository, license, figures)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


def _gathered(
    subject: SavedHead,
    part: Path,
    repository: str,
    license: str | None,
    figures: Callable[[SavedHead, dict[str, Any]], Rows],
) -> None:
    """Put what is published into a folder."""
    # the weights as they are, and the card without what may be nobody's business
    source = subject.folder if there(subject.folder / HEAD_CARD) else subject.folder / HEAD
    shutil.copyfile(source / WEIGHTS, part / WEIGHTS)
    write_json(part / HEAD_CARD, _discreet(subject.card))
    origin = origin_of(subject)
    try:
        became: str | None = saelens.write(subject.head, origin, part / THEIRS)
    except InputError as e:
        log.warning("without a folder for SAELens: %s", e)
        became = None
        shutil.rmtree(part / THEIRS, ignore_errors=True)
    else:
        config = part / THEIRS / saelens.CONFIG
        write_json(config, _discreet(read_json(config, dict[str, Any])))
    if subject.config:
        text = yaml.safe_dump(_discreet(subject.config), sort_keys=False)
        write_text(part / CONFIG, _clean(text))
    known = _record(subject, part)
    digest = hashlib.sha256()
    for name in (HEAD_CARD, WEIGHTS):
        digest.update((part / name).read_bytes())
    sha256 = digest.hexdigest()
    facts = _facts(subject, origin, sha256, repository, license, became, known, figures)
    write_text(part / NAME, _clean(card(facts)))


def _clean(text: str) -> str:
    """A text without the secrets that are known, and without what looks like one."""
    return SHAPES.sub(MARK, scrubbed(text))


def _discreet(tree: Any) -> Any:
    """Plain values without secrets, and without the folders of the machine they come from."""
    if isinstance(tree, dict):
        return {
            _clean(str(key)): MARK
            if isinstance(value, str) and KEYS.search(str(key)) and len(value) >= LONG
            else _discreet(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [_discreet(value) for value in tree]
    if isinstance(tree, str):
        whole = Path(tree).name if tree[:1] in ("/", "~") else tree
        return _clean(FOLDERS.sub("", whole))
    return tree


def _record(subject: SavedHead, folder: Path) -> dict[str, Any]:
    """The figures of a record of these weights, copied; empty where there is none."""
    own = subject.folder / EVAL
    if not there(own / SUMMARY):
        return {}
    known: dict[str, Any] = read_json(own / SUMMARY, dict[str, Any])
    if known.get("head_sha256") != subject.sha256:
        return {}
    read_json(own / SUMMARY, Recorded, MADE_ANEW)
    (folder / RECORD).mkdir()
    write_json(folder / RECORD / SUMMARY, _discreet(known))
    tables = {name for kind in Report.__subclasses__() for name in kind.files}
    for path in sorted(own.iterdir()):
        if path.name not in tables or path.suffix != ".csv" or not path.is_file():
            continue  # whatever else lies there
        if path.stat().st_size <= MOST_BYTES:
            write_text(folder / RECORD / path.name, _table(path))
    return known


def _table(path: Path) -> str:
    """A table without the texts, the secrets and the folders in it."""
    left_out = TEXTS.get(path.name, ())
    if not left_out:
        text = read_text(path, most=MOST_BYTES)
    else:
        rows = read_csv(path, {})
        out = io.StringIO(newline="")
        columns = [name for name in (rows[0] if rows else ()) if name not in left_out]
        writer = csv.DictWriter(out, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    return _clean(text)


def _facts(
    subject: SavedHead,
    origin: Origin,
    sha256: str,
    repository: str,
    license: str | None,
    became: str | None,
    known: dict[str, Any],
    figures: Callable[[SavedHead, dict[str, Any]], Rows],
) -> CardFacts:
    head = subject.head
    provenance = subject.card.get("provenance", {})
    rows = [
        ("latents", f"{head.d_sae:,}"),
        ("width of the activations", f"{head.d_model:,}"),
        ("parameters", f"{head.n_parameters():,}"),
        ("LM", _lm(_discreet(origin.lm or ""))),
        ("hook point", plain(origin.hook_point or "")),
        ("read at", plain(origin.input_point or "")),
        ("context", f"{origin.ctx_len:,} tokens" if origin.ctx_len else ""),
        ("first token of a row", plain(str(origin.bos)) if origin.bos is not None else ""),
        ("trained on", plain(_discreet(origin.text or ""))),
        ("tokens", f"{provenance['tokens']:,}" if provenance.get("tokens") else ""),
        ("L0 when training ended", _number(subject.summary.get("val/l0"), ".2f")),
        ("FVU when training ended", _number(subject.summary.get("val/fvu"), ".4f")),
        ("SHA-256 of head.json and head.safetensors", f"`{sha256}`"),
    ]
    try:
        columns, table = figures(subject, known) if known else ((), ())
    except (TypeError, ValueError, AttributeError) as e:
        if isinstance(e, InputError):
            raise
        summary = subject.folder / EVAL / SUMMARY
        raise InputError(f"{summary}: a figure is no number ({e}); {MADE_ANEW}") from e
    columns = [*columns[:1], *map(plain, columns[1:])]  # names of texts, whatever they are called
    notes = [UNITS, cells.footnote([c for row in table for c in row[1:]])] if table else []
    commands = [shlex.join(["python", "train.py", "fit", "--config", CONFIG])]
    commands += ["python evaluate.py report RUN"] if known else []
    return CardFacts(
        repository=repository,
        title=f"{head.title}: {repository.split('/')[1]}",
        kind=type(head).__name__,
        facts=[row for row in rows if row[1]],
        columns=columns,
        figures=table,
        notes=[note for note in notes if note],
        commands=commands if subject.config else [],
        lm=_discreet(origin.lm),
        hook_point=origin.hook_point,
        saelens=became,
        plug_in=became == saelens.OURS,
        license=license,
        transcoder=head.transcoder,
        version=version("kanllama-lightning"),
        commit=provenance.get("commit"),
    )


def _lm(name: str) -> str:
    return plain(name) + (
        " (a small Llama that comes with the package)" if name == EMBEDDED else ""
    )


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, float | int) else ""


def _sent(folder: Path, repository: str, private: bool) -> str:
    """Send the folder in one commit; what the hub has already is not sent again."""
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Publish a head with its record",
        )
    except LocalTokenNotFoundError as e:
        raise InputError(
            "publish: nobody is logged in; `hf auth login` once, or set HF_TOKEN"
        ) from e
    except HfHubHTTPError as e:
        code = getattr(e.response, "status_code", None)
        remedy = "log in with `hf auth login` as somebody who may write there"
        if code not in (401, 403):
            remedy = "give the same command again; what has arrived is not sent again"
        said = " ".join(str(e).split())[:300]
        raise InputError(
            f"--repository {repository}: the hub answers {code}: {said}; {remedy}"
        ) from e
    except (OSError, RuntimeError, httpx2.HTTPError, *NO_HUB) as e:  # of threads the second
        said = " ".join(str(e).split())[:300]
        raise InputError(
            f"--repository {repository}: the hub cannot be reached ({said}); give the same command "
            "again; what has arrived is not sent again"
        ) from e
    return str(getattr(done, "commit_url", done))
