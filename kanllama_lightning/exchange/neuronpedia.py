"""Neuronpedia's pages of latents, in both forms that it takes; docs/neuronpedia.md has all fields.

`dashboards/batch-N.json` are SAEDashboard's files, which its converter reads.
`exports/MODEL/SOURCE/` is what the converter makes of them and the importer of the site reads: rows
of its tables.
"""

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from kanllama_lightning.exchange.foreign_files import PART, refuse_others
from kanllama_lightning.lm.hook_points import HookPoint
from kanllama_lightning.storage.files import replacing, write_text
from kanllama_lightning.types import InputError

NAME = "neuronpedia"
BATCHES, TABLES = "dashboards", "exports"
CREATOR = "clkht01d40000jv08hvalcvly"
"""The user that every Neuronpedia database begins with; rows of one it has not are refused."""
UNNAMED = "Unnamed"
"""What the site calls an author that it does not know."""
PER_FILE = 512
"""Latents of a file. The importer sees at most 1,000 files of a kind."""
FILE = re.compile(r"(batch-\d+\.(json|jsonl\.gz)|[a-z]+\.jsonl)(\.tmp)?")
"""Names of the files of an export."""
WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
SITES = {"attn_out": "att", "mlp_out": "mlp"}
"""How names of source sets there begin; everything else is `res`."""
APART = ("feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations")
"""Fields of a latent in a batch file that its row in the table Neuron does not have."""


class PageContext(NamedTuple):
    """A stretch of text in which a latent fires."""

    tokens: list[str]
    values: list[float]
    """Activation on each token, head's units; 0 where it is silent."""
    peak: int
    """Place of the token that it is shown for."""
    low: float
    """Ends of the interval that it is an example of; -1 for the strongest ones."""
    high: float
    share: float
    """Share of all tokens on which the activation is in the interval; -1 for the strongest ones."""


class LatentPage(NamedTuple):
    """What the page of a latent shows."""

    latent: int
    frequency: float
    """Share of tokens on which it fires."""
    largest: float
    """Largest activation, head's units; 0 for a latent that never fired."""
    bars: tuple[list[float], list[int]]
    """Histogram of its activations where it fires: middles of the bins, and counts."""
    lens_bars: tuple[list[float], list[int]]
    """The same of its logits over the vocabulary; empty without a direction."""
    raised: list[tuple[str, float]]
    """Tokens whose logits it raises most, with these; empty without a direction."""
    lowered: list[tuple[str, float]]
    coordinates: list[tuple[int, float, float]]
    """Largest coordinates of its direction: index, value, share of the L1 norm."""
    contexts: list[PageContext]
    explanation: str | None
    judge: str
    """Model that the explanation is by."""


class PageSource(NamedTuple):
    """What all pages of a head have in common."""

    model: str
    """The site's name of the LM."""
    set_name: str
    """Of the source set: what heads at several blocks have in common."""
    layer: int
    about: Mapping[str, Any]
    """The LM as a row of the table Model, but for its name and creator."""
    prompts: int
    """Rows of text that were looked at."""
    prompt_tokens: int
    """Tokens of each, BOS included."""
    text: str
    title: str
    notes: str
    sha256: str
    """Of the head's weights."""

    @property
    def name(self) -> str:
        """The site's name of this head."""
        return f"{self.layer}-{self.set_name}"

    def key(self, *parts: object) -> str:
        """A key of a row: the same for the same head and place, and no other row's."""
        told = json.dumps([self.sha256, self.model, self.name, *map(str, parts)])
        return f"c{hashlib.sha256(told.encode()).hexdigest()[:24]}"


class Made(NamedTuple):
    """What was written."""

    latents: int = 0
    alive: int = 0
    contexts: int = 0
    explained: int = 0


def model_name(lm: str) -> str:
    """What the site calls an LM: `llama3.1-8b-it` is meta-llama/Llama-3.1-8B-Instruct."""
    plain = Path(lm).name.lower().replace("llama-3", "llama3").replace("-instruct", "-it")
    return _plain(plain)


def set_name(hook: HookPoint, title: str, d_sae: int) -> str:
    """A name for heads of a kind: place, kind, latents; such as `mlp-kanencoder-512`."""
    return _plain(f"{SITES.get(hook.kind, 'res')}-{title.lower()}-{d_sae}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", name).strip("-._") or "unnamed"


def check_word(option: str, value: str) -> str:
    """The name, if it can be part of an address there; raises InputError."""
    if WORD.fullmatch(value) is None:
        raise InputError(
            f"--{option} {value!r:.140}: Neuronpedia takes up to 128 lower-case letters, digits, "
            "'.', '-' and '_', the first of them a letter or digit"
        )
    return value


def check_folder(folder: Path) -> None:
    """Raise InputError where the folder holds something else than an earlier export."""
    refuse_others(folder, (BATCHES, TABLES), folders=True)
    for path in sorted((*(folder / BATCHES).rglob("*"), *(folder / TABLES).rglob("*"))):
        if path.is_symlink() or not (path.is_dir() or FILE.fullmatch(path.name)):
            raise InputError(
                f"--out {str(folder)!r}: {str(path.relative_to(folder))!r} is not of an export to "
                "Neuronpedia, which takes the place of an earlier one; give another folder"
            )


def write(pages: Iterable[LatentPage], source: PageSource, folder: Path) -> Made:
    """Write both forms.

    Args:
        pages: One for every latent, in order; they are written as they come.
        source: What they have in common.
        folder: Made if it is missing; an earlier export is replaced when this one is whole.

    Raises:
        InputError: The folder holds something else.
    """
    check_folder(folder)
    new, old = folder / PART / "new", folder / PART / "old"
    parts = (Path(BATCHES), Path(TABLES, source.model, source.name))
    if (folder / PART).exists():  # of an export that was killed
        _give_back(folder, old, parts)
        shutil.rmtree(folder / PART)
    try:
        made = _write(pages, source, *(new / part for part in parts))
        for part in parts:
            for place in (folder / part, old / part):
                place.parent.mkdir(parents=True, exist_ok=True)
            if (folder / part).exists():
                (folder / part).replace(old / part)
            (new / part).replace(folder / part)
    except BaseException:
        _give_back(folder, old, parts)
        raise
    finally:
        shutil.rmtree(folder / PART, ignore_errors=True)
    return made


def _give_back(folder: Path, old: Path, parts: Sequence[Path]) -> None:
    """Put the parts of an earlier export that were taken aside back into their places."""
    for part in parts:
        if (old / part).exists():
            shutil.rmtree(folder / part, ignore_errors=True)
            (old / part).replace(folder / part)


def _write(pages: Iterable[LatentPage], source: PageSource, batches: Path, home: Path) -> Made:
    """Write both forms into folders that are not there yet."""
    for place in (batches, *(home / name for name in ("features", "activations", "explanations"))):
        place.mkdir(parents=True)
    for file, row in _common_rows(source).items():
        write_text(home / f"{file}.jsonl", f"{_json(row)}\n")
    made = Made()
    every = iter(pages)
    for number, some in enumerate(iter(lambda: list(islice(every, PER_FILE)), [])):
        features = [_feature(page, source) for page in some]
        batch = {
            "model_id": source.model,
            "layer": source.layer,
            "sae_set": source.set_name,
            "features": features,
        }
        write_text(batches / f"batch-{number}.json", _json(batch))
        rows = {
            "features": [_neuron(*both, source) for both in zip(some, features, strict=True)],
            "activations": [row for page in some for row in _activations(page, source)],
            "explanations": [
                _explanation(page, source) for page in some if page.explanation is not None
            ],
        }
        for name, lines in rows.items():
            if lines:
                _write_lines(home / name / f"batch-{number}.jsonl.gz", lines)
        made = Made(
            made.latents + len(some),
            made.alive + sum(page.frequency > 0 for page in some),
            made.contexts + len(rows["activations"]),
            made.explained + len(rows["explanations"]),
        )
    return made


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = "".join(f"{_json(row)}\n" for row in rows)
    with replacing(path) as part:
        part.write_bytes(gzip.compress(lines.encode(), 5, mtime=0))


def _short(values: Iterable[float]) -> list[float]:
    """As many digits as an fp32 number has."""
    return [float(f"{value:.7g}") for value in values]


def _common_rows(source: PageSource) -> dict[str, dict[str, Any]]:
    """The rows that all latents refer to, by file."""
    creator = {"creatorId": CREATOR}
    seen = {"visibility": "PUBLIC"}
    return {
        "release": {"name": source.set_name, "description": source.title,
                    "creatorName": UNNAMED, "urls": [], **creator, **seen},
        "model": {"id": source.model, **source.about, **creator, **seen},
        "sourceset": {"modelId": source.model, "name": source.set_name,
                      "description": source.title, "releaseName": source.set_name,
                      "creatorName": UNNAMED, "urls": [], **creator, **seen},
        "source": {"id": source.name, "modelId": source.model, "setName": source.set_name,
                   "num_prompts": source.prompts, "num_tokens_in_prompt": source.prompt_tokens,
                   "dataset": source.text, "notes": source.notes, **creator, **seen},
    }  # fmt: skip


def _feature(page: LatentPage, source: PageSource) -> dict[str, Any]:
    """A latent as SAEDashboard writes it."""
    raised, lowered = ([list(column) for column in zip(*some, strict=True)] or [[], []]
                       for some in (page.raised, page.lowered))  # fmt: skip
    places = [list(column) for column in zip(*page.coordinates, strict=True)] or [[], [], []]
    middles, heights = page.bars
    lens_middles, lens_heights = page.lens_bars
    return {
        "feature_index": page.latent,
        "neuron_alignment_indices": places[0],
        "neuron_alignment_values": _short(places[1]),
        "neuron_alignment_l1": _short(places[2]),
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": lowered[0],
        "neg_values": _short(lowered[1]),
        "pos_str": raised[0],
        "pos_values": _short(raised[1]),
        "frac_nonzero": page.frequency,
        "freq_hist_data_bar_values": _short(middles),
        "freq_hist_data_bar_heights": heights,
        "logits_hist_data_bar_heights": lens_heights,
        "logits_hist_data_bar_values": _short(lens_middles),
        "n_prompts_total": source.prompts,
        "n_tokens_in_prompt": source.prompt_tokens,
        "dataset": source.text,
        "decoder_weights_dist": [],
        "activations": [_context(context) for context in page.contexts],
    }


def _context(context: PageContext) -> dict[str, Any]:
    low, high, share = _short((context.low, context.high, context.share))
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": context.tokens,
        "values": _short(context.values),
        "qualifying_token_index": context.peak,
    }


def _of(page: LatentPage, source: PageSource) -> dict[str, Any]:
    """Which latent a row is about."""
    return {"modelId": source.model, "layer": source.name, "index": str(page.latent)}


def _neuron(page: LatentPage, feature: Mapping[str, Any], source: PageSource) -> dict[str, Any]:
    """A row of the table Neuron."""
    shown = {name: value for name, value in feature.items() if name not in APART}
    (largest,) = _short([page.largest])
    return {
        **_of(page, source),
        "creatorId": CREATOR,
        "sourceSetName": source.set_name,
        "maxActApprox": largest,
        **shown,
    }


def _activations(page: LatentPage, source: PageSource) -> Iterator[dict[str, Any]]:
    """Rows of the table Activation."""
    for number, context in enumerate(page.contexts):
        shown = _context(context)
        values = shown["values"]
        yield {
            "id": source.key("context", page.latent, number),
            **_of(page, source),
            "creatorId": CREATOR,
            "tokens": shown["tokens"],
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "binMin": shown["bin_min"],
            "binMax": shown["bin_max"],
            "binContains": shown["bin_contains"],
            "qualifyingTokenIndex": context.peak,
        }


def _explanation(page: LatentPage, source: PageSource) -> dict[str, Any]:
    """A row of the table Explanation; the judge is in a note, as the site has a list of its own."""
    return {
        "id": source.key("explanation", page.latent),
        **_of(page, source),
        "authorId": CREATOR,
        "description": page.explanation,
        "notes": f"by {page.judge or 'a language model'}, with kanllama_lightning",
    }
