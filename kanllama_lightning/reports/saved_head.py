"""From what a person names, a run folder or a saved head, to what is evaluated."""

import hashlib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentError, ArgumentParser
from transformers import PreTrainedTokenizerBase

from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.embedded import MODEL_DIR
from kanllama_lightning.exchange.formats import format_of
from kanllama_lightning.exchange.origin import site
from kanllama_lightning.heads import TopK
from kanllama_lightning.heads.head import CARD, FORMAT, WEIGHTS, SAEHead, read_card
from kanllama_lightning.lm.frozen import EMBEDDED, FrozenLM
from kanllama_lightning.lm.hook_points import parse_input_point
from kanllama_lightning.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    HEAD,
    members,
    read_config,
    read_summary,
)
from kanllama_lightning.runs.state import Kind, look
from kanllama_lightning.storage.named import check_nulls, name_of, refuse_modules
from kanllama_lightning.storage.small_files import there
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

LM_KEYS = ("name", "hook_point", "input_point", "revision", "untrained", "bos")
MEANT = ("input_point", "revision", "bos")
"""Of these a head of ours that says nothing means None; one of another project does not say."""


class SavedHead(NamedTuple):
    """What is evaluated."""

    folder: Path
    """Run folder, or folder of a saved head."""
    head: SAEHead
    card: dict[str, Any]
    """`head.json`."""
    config: dict[str, Any]
    """`config.yaml` of the run; empty for a saved head."""
    summary: dict[str, Any]
    """`summary.json` of the run; empty for a saved head."""
    sha256: str
    """SHA-256 of the head's weights."""
    allow: Collection[str] = ()
    """Modules whose classes its files may name."""
    imported: bool = False
    """Whether it comes from another project, and so without statistics of its text."""

    @property
    def target_l0(self) -> int | None:
        """Latents per token that it was trained for; None where that is not known."""
        unsaid = self.imported and self.card["provenance"]["l0"] is None
        found: int | None = getattr(self.head, "target_l0", None)
        return None if unsaid and not isinstance(self.head, TopK) else found

    def lm_args(self) -> dict[str, Any]:
        """What the LM it was trained on is built with."""
        if "lm" in self.config:
            return {k: self.config["lm"][k] for k in LM_KEYS if k in self.config["lm"]}
        known = self.card.get("provenance", {})
        names = {"name": "lm"} | {key: key for key in LM_KEYS if key not in ("name", "untrained")}
        return {key: known[name] for key, name in names.items() if known.get(name) is not None}

    def data(self, tokenizer: PreTrainedTokenizerBase) -> TokenData | None:
        """The data it was trained and validated on; None for a saved head."""
        given = self.config.get("data")
        if given is None:
            return None
        where = f"{self.folder / CONFIG}: data"
        try:
            refuse_modules(given, self.allow)
            return self._data(given, tokenizer)
        except InputError as e:
            raise InputError(f"{where}: {e}") from e
        except ArgumentError as e:
            said = " ".join(str(e).split())
            raise InputError(f"{where}: {said[:600]}; or give the text with --text") from e
        except (TypeError, ValueError, AttributeError) as e:
            raise InputError(f"{where}: cannot be used ({e}); or give the text with --text") from e

    @staticmethod
    def _data(given: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> TokenData:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(
            TokenData, "data", instantiate=False, skip={"tokenizer", "seed", "workers"}
        )
        given = {k: v for k, v in given.items() if k not in ("seed", "workers", "tokenizer")}
        check_nulls(given, TokenData, "data")
        made = parser.instantiate_classes(parser.parse_object({"data": given})).data
        return TokenData(tokenizer, **made.as_dict() if hasattr(made, "as_dict") else made)


def read_subject(folder: Path, allow: Collection[str] = ()) -> SavedHead:
    """Load a head by its run folder or its own.

    Args:
        folder: Either of them.
        allow: Modules whose classes its files may name, beside what is shipped.

    Raises:
        InputError: There is no finished head.
    """
    if not folder.is_dir():
        raise InputError(f"RUN={str(folder)!r}: no such folder; give the folder of a finished run")
    if there(folder / CARD):
        return _subject(folder, folder, {}, {}, allow)
    if format_of(folder) is not None:
        return _imported(folder)
    if members(folder):
        raise InputError(
            f"RUN={str(folder)!r}: a run of several heads; name the folder of one of them: "
            f"{', '.join(map(str, members(folder)))}"
        )
    if not there(folder / HEAD / CARD):
        state = look(folder)
        if state.holder is not None:
            raise InputError(
                f"RUN={str(folder)!r}: no finished run; it is in use by {state.holder}; wait until "
                "that has ended"
            )
        if state.kind == Kind.DEBRIS:
            raise InputError(
                f"RUN={str(folder)!r}: no finished run; it ended before its first checkpoint; "
                f"start it again with `python train.py fit --config ... --run {folder}`"
            )
        if (folder / CHECKPOINTS).is_dir() or (folder / CONFIG).is_file():
            along = sorted((folder / "heads").glob("*/"))
            also = f", or evaluate a head saved along the way ({along[-1]})" if along else ""
            raise InputError(
                f"RUN={str(folder)!r}: this run is not finished, it has no {HEAD}/ yet; go on with "
                f"`python train.py fit --config ... --ckpt_path {folder}`{also}"
            )
        raise InputError(
            f"RUN={str(folder)!r}: neither a run folder nor a saved head (no {HEAD}/{CARD}, no "
            f"{CARD}); give the folder that `train.py fit` left, its {HEAD}/, or a folder of "
            "SAELens, sparsify or dictionary_learning"
        )
    return _subject(folder, folder / HEAD, read_config(folder), read_summary(folder), allow)


def _subject(
    folder: Path,
    head: Path,
    config: dict[str, Any],
    summary: dict[str, Any],
    allow: Collection[str],
) -> SavedHead:
    digest = hashlib.sha256()
    loaded = SAEHead.load(head, allow)
    if loaded.makeshift is not None:
        log.warning(
            "RUN=%r: its threshold was never calibrated: %s; a run calibrates it when it ends",
            str(folder),
            loaded.makeshift,
        )
    for name in (CARD, WEIGHTS):
        with (head / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return SavedHead(folder, loaded, read_card(head), config, summary, digest.hexdigest(), allow)


def _imported(folder: Path) -> SavedHead:
    """The SAE of another project's folder; its card is made here."""
    kind = format_of(folder)
    assert kind is not None
    head, origin = kind.read(folder)
    digest = hashlib.sha256()
    for name in kind.FILES[:2]:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    card = {
        "format": FORMAT,
        "head": name_of(type(head)),
        "init_args": head.init_args(),
        "provenance": origin.provenance() | {"imported": kind.NAME, "l0": origin.l0},
    }
    return SavedHead(folder, head, card, {}, {}, digest.hexdigest(), imported=True)


def _place(args: Mapping[str, Any]) -> dict[str, Any]:
    """Which LM, and where in it, however it is spelled."""
    found = {key: value for key, value in args.items() if key != "untrained"}
    at = site(found.get("hook_point"))
    if at is not None:
        found["hook_point"], read = at.name, found.get("input_point")
        if read is not None:
            found["input_point"] = parse_input_point(read, at).name
    folder = MODEL_DIR if found.get("name") == EMBEDDED else Path(str(found.get("name")))
    return found | ({"name": str(folder.resolve())} if folder.is_dir() else {})


def _elsewhere(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What both say, and differently."""
    a, b = _place(one), _place(other)
    return [key for key in a if key in b and a[key] != b[key]]


def shared_lm(subjects: list[SavedHead], given: Mapping[str, Any], dtype: str) -> FrozenLM:
    """The LM all of them were trained on.

    Args:
        subjects: Heads that are evaluated together.
        given: Arguments of the LM that override what they say; None for what they shall say.
        dtype: Number format of the evaluation.

    Raises:
        InputError: They say different things, nothing, or their width is not the LM's.
    """
    given = {key: value for key, value in given.items() if value is not None}
    meant: dict[str, Any] = dict.fromkeys(MEANT)
    every = [(s.lm_args() if s.imported else meant | s.lm_args()) | given for s in subjects]
    first = every[0]
    for subject, args in zip(subjects, every, strict=True):
        for key in ("name", "hook_point"):
            if key not in args:
                raise InputError(
                    f"--lm.{key}: {str(subject.folder)!r} does not say which; give --lm.{key}"
                )
        apart = _elsewhere(first, args)
        if apart:
            said, wanted = (
                " and ".join(f"lm.{key}={one.get(key)!r}" for key in apart) for one in (args, first)
            )
            raise InputError(
                f"RUN={str(subject.folder)!r}: trained on {said}, but "
                f"{str(subjects[0].folder)!r} on {wanted}; evaluate them one after the other"
            )
    said_by_any = {key: value for args in every for key, value in args.items()}
    lm = FrozenLM(**said_by_any | first, dtype=dtype)  # type: ignore[arg-type]
    for subject in subjects:
        if subject.head.d_model != lm.d_model:
            raise InputError(
                f"RUN={str(subject.folder)!r}: the head reads activations of width "
                f"{subject.head.d_model}, {lm.name} has {lm.d_model}; give the LM it was trained "
                "on with --lm.name"
            )
        if subject.head.transcoder != lm.transcodes:
            raise InputError(
                f"RUN={str(subject.folder)!r}: "
                + (
                    "the head is a transcoder and does not say where it reads; give "
                    "--lm.input_point, such as mlp_in"
                    if subject.head.transcoder
                    else "the head is no transcoder; leave --lm.input_point out"
                )
            )
    if len(lm.tokenizer) > lm.vocab_size:
        raise InputError(
            f"lm.name={lm.name!r}: its tokenizer has {len(lm.tokenizer)} tokens, its embedding "
            f"{lm.vocab_size}; the folder mixes two models"
        )
    return lm
