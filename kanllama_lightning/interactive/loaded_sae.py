"""`kanllama_lightning.load`: a trained head with its LM, for a notebook."""

import logging
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.dashboard.unpack import read_dashboard
from kanllama_lightning.functional.lens import logit_lens
from kanllama_lightning.heads.decoders import UnitDirections
from kanllama_lightning.heads.head import CARD
from kanllama_lightning.interactive.text_latents import TextLatents
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.token_text import token_text
from kanllama_lightning.prompts.text_ids import seen_by
from kanllama_lightning.prompts.try_text import STEERED, check_steering, continuation, given_ids
from kanllama_lightning.reports.evaluation import device_named
from kanllama_lightning.reports.labels import read_labels
from kanllama_lightning.reports.saved_head import SavedHead, read_subject, shared_lm
from kanllama_lightning.runs.folder import CONFIG, EVAL, HEAD, SUMMARY
from kanllama_lightning.runs.lookup import LAST, folder_named
from kanllama_lightning.storage.small_files import (
    Count,
    check,
    from_json,
    read_csv,
    read_json,
    there,
)
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

LENS = {"latent": Count, "skewness": float | None, "kurtosis": float | None} | dict.fromkeys(
    ("top_tokens", "top_values", "bottom_tokens", "bottom_values"), str
)
"""Columns of `logit_lens.csv`, as far as they are read back."""


class LatentLens(NamedTuple):
    """What a latent's direction says of each token of the vocabulary, on the direct path."""

    raised: list[tuple[str, float]]
    """Tokens raised most, with logits per unit of activation, before the final norm's 1 / rms."""
    lowered: list[tuple[str, float]]
    skewness: float
    kurtosis: float
    """3 for a normal distribution."""


class FiringContext(NamedTuple):
    """Text around a token on which a latent fires."""

    tokens: list[str]
    activations: list[float]
    """Of the latent on each token, head's units; 0 where it is silent."""
    peak: int
    """Place of the token that it is the context of."""

    def __repr__(self) -> str:
        before, after = self.tokens[: self.peak], self.tokens[self.peak + 1 :]
        at = f"[[{self.tokens[self.peak]}]]"
        return f"{self.activations[self.peak]:.2f}: {''.join(before)}{at}{''.join(after)}"


class LoadedSAE:
    """A trained head, its LM and what its record knows; nothing here builds a graph.

    Args:
        subject: The head, with the files it came from.
        lm: The LM it was trained on; its weights are read when they are first needed.
        device: Where both run.
    """

    def __init__(self, subject: SavedHead, lm: FrozenLM, device: torch.device) -> None:
        self.folder, self.card, self._sha256 = subject.folder, subject.card, subject.sha256
        self.head, self._lm, self.device = subject.head.to(device), lm, device

    @property
    def lm(self) -> FrozenLM:
        """The LM, loaded."""
        return self._lm.load_(self.device)

    def __repr__(self) -> str:
        at = f"{self._lm.hook.name} of {self._lm.name}"
        return f"{self.head.title}, {self.head.d_sae} latents at {at} ({self.folder})"

    @torch.no_grad()
    def __call__(self, text: str | Sequence[str]) -> TextLatents | list[TextLatents]:
        """Run the LM on a text, or on each of several, and the head on its activations.

        Raises:
            InputError: It is no text, empty, or longer than the LM's context.
        """
        labels = self.labels
        if isinstance(text, list | tuple):
            return [self._read(one, labels) for one in text]
        return self._read(text, labels)

    def _read(self, text: Any, labels: dict[int, str]) -> TextLatents:
        lm, ids = self.lm, self._ids(text)
        seen = seen_by(self.head, lm, [ids])
        positions = seen.mask[0].nonzero().squeeze(1).tolist()
        tokens = [token_text(lm.tokenizer, ids[position]) for position in positions]
        codes = seen.out.codes.sparse()
        codes = codes._replace(
            values=codes.values.cpu(), rows=codes.rows.cpu(), latents=codes.latents.cpu()
        )
        return TextLatents(text, tokens, positions, codes, labels)

    def _ids(self, text: Any) -> list[int]:
        if not isinstance(text, str):
            raise InputError(
                f"text={text!r:.60}: is a {type(text).__name__}; give a text or a list of texts "
                "(activations go to `encode`)"
            )
        return given_ids(self.lm, text)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Dense latents of activations, as at inference; head's units.

        Args:
            x: Activations at the hook point (of a transcoder: where it reads) in the LM's own
                units, of any floating type, with any leading axes. Every row counts: leave BOS and
                sinks out yourself.

        Raises:
            InputError: `x` is no tensor of finite floating-point numbers of the LM's width.
        """
        return self._rowwise(self.head.encode, x, "x", self.head.d_model, "activations")

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction, in the LM's units, of dense latents with any leading axes.

        Raises:
            InputError: They are no tensor of finite floating-point numbers, one for each latent.
        """
        return self._rowwise(self.head.decode, latents, "latents", self.head.d_sae, "latents")

    def _rowwise(self, run: Any, given: Any, name: str, width: int, what: str) -> Tensor:
        if not isinstance(given, Tensor):
            raise InputError(
                f"{name}: is a {type(given).__name__}; give a tensor (`torch.as_tensor({name})`)"
            )
        shape = list(given.shape)
        if not shape or shape[-1] != width:
            raise InputError(
                f"{name}: has the shape {shape}; {what} are [..., {width}], such as [{width}] or "
                f"[texts, tokens, {width}]"
            )
        if not given.is_floating_point():
            raise InputError(
                f"{name}: holds {str(given.dtype).removeprefix('torch.')}; {what} are "
                f"floating-point numbers (`{name}.float()`)"
            )
        rows = given.to(self.device, torch.float32).reshape(-1, width)
        if not bool(rows.isfinite().all()):
            bad = int((~rows.isfinite().all(1)).sum())
            raise InputError(
                f"{name}: {bad:,} of {len(rows):,} rows are NaN or infinite; leave them out"
            )
        made: Tensor = run(rows)
        return made.reshape(*shape[:-1], made.shape[-1])

    @property
    def labels(self) -> dict[int, str]:
        """What latents are called in the record of the run; empty without one."""
        path = self._recorded("latents.csv")
        return read_labels(path) if path is not None else {}

    def label(self, latent: int) -> str:
        """What a latent is called; "" if it never fired.

        Raises:
            InputError: There is no such latent, or no record; names the command that makes it.
        """
        self._check(latent)
        self._record("latents.csv", "latents")
        return self.labels.get(latent, "")

    def contexts(self, latent: int, n: int = 5) -> list[FiringContext]:
        """Where a latent fires most, strongest first, from the dashboard of the record.

        Empty for a latent that never fired there.

        Args:
            latent: Its number.
            n: How many at most; the record holds 20 or so.

        Raises:
            InputError: There is no such latent, or no record; names the command that makes it.
        """
        self._check(latent)
        if not (type(n) is int and n >= 1):
            raise InputError(f"n={n!r}: whole numbers from 1 up")
        path = self._record("dashboard.html", "dashboard")
        try:
            bands = read_dashboard(path)["latent"](latent)["bands"]
        except (AttributeError, LookupError, OSError, TypeError, ValueError, zlib.error) as e:
            raise InputError(
                f"{path}: cannot be read back ({type(e).__name__}); {self._anew('dashboard')} "
                "--again true` makes it anew"
            ) from e
        found = [window for band in bands[:1] for window in band["windows"]]
        return [
            FiringContext(
                one["tokens"],
                [float(one["values"].get(i, 0.0)) for i in range(len(one["tokens"]))],
                one["peak"],
            )
            for one in found[:n]
        ]

    @torch.no_grad()
    def lens(self, latent: int, top: int = 10) -> LatentLens:
        """The logit lens of a latent: the tokens that its direction raises and lowers most.

        Of a head whose decoder has curves, the direction depends on how its latents fire: the
        record has it then.

        Args:
            latent: Its number.
            top: Tokens at either end, at most.

        Raises:
            InputError: There is no such latent, it has no direction, or there is no record where
                that is needed.
        """
        self._check(latent)
        if not (type(top) is int and top >= 1):
            raise InputError(f"top={top!r}: whole numbers from 1 up")
        if not isinstance(getattr(self.head, "decoder", None), UnitDirections):
            return self._recorded_lens(latent, top)
        lm, anywhere = self.lm, torch.ones(self.head.d_sae, device=self.device)
        directions = self.head.directions(anywhere, self.head.x_mean[None])
        gain = lm.model.model.norm.weight
        found = logit_lens(directions[latent : latent + 1], gain, lm.unembed(), top)
        ends = (found.top_ids, found.top_values), (found.bottom_ids, found.bottom_values)
        raised, lowered = (
            [(token_text(lm.tokenizer, i), v) for i, v in zip(*pair, strict=True)]
            for pair in ((ids[0].tolist(), values[0].tolist()) for ids, values in ends)
        )
        return LatentLens(raised, lowered, float(found.skewness), float(found.kurtosis))

    def _recorded_lens(self, latent: int, top: int) -> LatentLens:
        path = self._record("logit_lens.csv", "latents")
        remedy = f"{self._anew('latents')} --again true` makes it anew"
        rows = read_csv(path, LENS, remedy)
        row = next((row for row in rows if row["latent"] == latent), None)
        if row is None or row["kurtosis"] is None:
            raise InputError(f"latent={latent}: it has no direction: it never fired in the record")
        try:
            raised, lowered = (_pairs(row, end)[:top] for end in ("top", "bottom"))
        except ValueError as e:
            raise InputError(f"{path}: is damaged: latent {latent}: {e}; {remedy}") from e
        skewness = math.nan if row["skewness"] is None else row["skewness"]
        return LatentLens(raised, lowered, skewness, row["kurtosis"])

    def steer(self, latents: Mapping[int, float]) -> "SteeredLM":
        """The LM with latents held at activations (head's units; 0 ablates) on every token.

        The error of the reconstruction is left in place; BOS and sinks keep their activation.

        Raises:
            InputError: There is no such latent, or an activation is no finite number.
        """
        check_steering(self.head, latents)
        return SteeredLM(self, dict(latents))

    def _check(self, latent: Any) -> None:
        if not (type(latent) is int and 0 <= latent < self.head.d_sae):
            raise InputError(f"latent={latent!r}: there are latents 0 to {self.head.d_sae - 1}")

    def _anew(self, report: str) -> str:
        return f"`python evaluate.py report {self.folder} --reports {report}"

    def _recorded(self, file: str) -> Path | None:
        """A file of the record; None if there is none, or if it is of other weights."""
        path, summary = self.folder / EVAL / file, self.folder / EVAL / SUMMARY
        if not there(path) or not there(summary):
            return None
        if read_json(summary, dict[str, Any]).get("head_sha256") == self._sha256:
            return path
        log.warning("%s is of other weights than the head has now, and left out", path)
        return None

    def _record(self, file: str, report: str) -> Path:
        path = self._recorded(file)
        if path is None:
            raise InputError(
                f"{self.folder / EVAL}: has no {file} of this head; {self._anew(report)}` makes it"
            )
        return path


def _pairs(row: Mapping[str, Any], end: str) -> list[tuple[str, float]]:
    """Tokens and their logits at one end of the lens; ValueError if the cells are damaged."""
    tokens = check(from_json(row[f"{end}_tokens"]), list[str], f"{end}_tokens")
    values = check(from_json(row[f"{end}_values"]), list[float], f"{end}_values")
    return list(zip(tokens, values, strict=True))


class SteeredLM(NamedTuple):
    """The LM with latents held at activations."""

    sae: LoadedSAE
    latents: dict[int, float]

    @torch.no_grad()
    def generate(self, text: str, tokens: int = 20) -> str:
        """The text, and what the LM writes on from it, always its likeliest token.

        Args:
            text: What it begins with.
            tokens: Tokens to write, at most; fewer where the text or the LM's context ends.

        Raises:
            InputError: The text is empty or too long, or `tokens` is no whole number from 0 up.
        """
        if not (type(tokens) is int and tokens >= 0):
            raise InputError(f"tokens={tokens!r}: whole numbers from 0 up")
        sae = self.sae
        ids = sae._ids(text)
        new = continuation(sae.head, sae.lm, ids, STEERED, tokens, self.latents)
        return text + "".join(new.pieces)


def load(
    name: str | Path = LAST,
    *,
    runs_dir: str | Path = "runs",
    lm: str | Path | FrozenLM | None = None,
    hook_point: str | None = None,
    input_point: str | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    allow: Collection[str] = (),
) -> LoadedSAE:
    """Load a trained head together with the LM that it reads.

    Args:
        name: A run by its folder, its name or the beginning of the name, or `last`; one head of a
            run of several (`NAME/kan`); the folder of a saved head; or a file in one of these.
        runs_dir: Where names of runs are looked for.
        lm: The LM: hub name, folder, `embedded`, or one that is loaded (default: the one that the
            head was trained on, as its run or its `head.json` says).
        hook_point: Where it is read (default: where the head was trained).
        input_point: Where a transcoder reads (default: where it was trained).
        device: cpu, cuda, or auto.
        dtype: Number format of the LM.
        allow: Modules whose classes the files may name; importing a module runs its code.

    Raises:
        InputError: There is no finished head of that name, or its LM cannot be had.
    """
    folder = folder_named(str(name), str(runs_dir), "name")
    if folder.name == HEAD and there(folder / CARD) and there(folder.parent / CONFIG):
        folder = folder.parent
    subject, where = read_subject(folder, allow), device_named(device)
    if isinstance(lm, FrozenLM):
        if lm.d_model != subject.head.d_model:
            raise InputError(
                f"lm={lm.name!r}: its activations have width {lm.d_model}, the head reads "
                f"{subject.head.d_model}; give the LM it was trained on"
            )
        if lm.transcodes != subject.head.transcoder:
            raise InputError(
                f"lm={lm.name!r}: was built {'with' if lm.transcodes else 'without'} an "
                "input_point, where a transcoder reads, and the head "
                f"{'is one' if subject.head.transcoder else 'is none'}; give the LM by its name"
            )
        return LoadedSAE(subject, lm, where)
    given = {"name": None if lm is None else str(lm), "hook_point": hook_point}
    given["input_point"] = input_point
    try:
        model = shared_lm([subject], given, dtype)
    except InputError as e:
        here = repr(str(name))
        raise InputError(
            f"load({here}): the LM of this head cannot be had ({e}). Give it with load({here}, "
            "lm=FOLDER_OR_HUB_NAME) and, where the head does not say it, hook_point=...; the head "
            "alone, for activations, is SAEHead.load(folder)"
        ) from e
    return LoadedSAE(subject, model, where)
