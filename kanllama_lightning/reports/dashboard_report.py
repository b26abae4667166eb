"""The feature dashboard: what every latent fires on, says, and has to do with, on one page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.dashboard.ablation import AblatedPlace, ablate
from kanllama_lightning.dashboard.contents import (
    Ablation,
    Band,
    Column,
    Curve,
    Dashboard,
    Latent,
    Related,
    Window,
)
from kanllama_lightning.dashboard.dashboard_page import write_dashboard
from kanllama_lightning.dashboard.latent_curves import latent_curves
from kanllama_lightning.dashboard.pool import Pool
from kanllama_lightning.functional.cofiring import Neighbours, neighbours
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads.encoders import FrozenLinearEncoder, LinearEncoder
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.token_text import token_text
from kanllama_lightning.measures.contexts import Contexts, Windows
from kanllama_lightning.measures.directions import (
    OPERATING_POINT,
    RANDOM,
    STRAIGHT,
    DirectionStats,
    read_directions,
)
from kanllama_lightning.measures.metrics import Activations
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.reports.labels import PEAKS, READS, TELLING, Known, firing_tokens
from kanllama_lightning.reports.report import INDEX, EvalRun, Figures, Report, Seen
from kanllama_lightning.types import InputError

ROWS = 4096
"""Activations that curves, and latents that mix in the decoder, are judged over."""
MANY = 4096
"""Latents from which on fewer windows of each are shown."""
FEWER, USUAL = (10, 2), (20, 4)
"""Windows of a latent: the strongest, and of each of the BANDS."""
BANDS = 5
"""Equal parts of the random firings of a latent, from the strongest to the weakest."""
FLOOR = 0.01
"""Share of the largest activation below which a firing is in no band (METHODS D)."""
DENSE = 0.1
"""Share of tokens above which a latent is dense."""
SHARED_CODES = 1 << 21
"""Activations kept for counting which latents fire together."""
SHOWN_TOKENS, COORDINATES, RELATED, LENS_BINS = 10, 10, 5, 60
START, INTERESTING = 6, 50
"""Latents to look at first; firings from which on one may be among them."""
PLACES = 8
"""Tokens of a latent at which it is ablated."""
SPARK = 16
"""Most bins of a sparkline."""
ORDER = ("strongest", "second", "third", "fourth", "weakest")


class DashboardReport(Report):
    """Every latent on one page that opens from disk: `dashboard.html`; over the first token set.

    Contexts, density of activations, logit lens, coordinates, related latents and what becomes of
    the next token without the latent; for KAN heads learned curves; what `concepts` and
    `interpretability` found, if they were made. Related latents are counted over as many tokens as
    2,097,152 activations go into; both have to fire on 50. Dead latents fired on none of the
    tokens, dense ones on more than a tenth.

    Args:
        top: Strongest windows shown per latent (default: 20; 10 if the head has 4,096
            latents or more).
        per_band: Windows shown of each fifth of the range of activations (default: 4; 2 if the
            head has 4,096 latents or more).
        width: Tokens of a window.
        ablated: Latents whose effect on the next token is measured, evenly spread over
            frequencies; 8 positions of each.
        tokens: Tokens looked at, at most, of the set (default: all).
        seed: Random seed for choosing windows.
    """

    name = "dashboard"
    files = ("dashboard.html",)
    reads = READS
    picture = "latents_3"  # how often latents fire

    def __init__(
        self,
        top: int | None = None,
        per_band: int | None = None,
        width: int = 32,
        ablated: int = 64,
        tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        least = {"top": (top, 1), "per_band": (per_band, 0), "width": (width, 4)}
        least |= {"ablated": (ablated, 0), "tokens": (tokens, 1)}
        for argument, (value, smallest) in least.items():
            if value is not None and value < smallest:
                raise InputError(f"dashboard.{argument}={value}: must be at least {smallest}")
        self.top, self.per_band, self.width = top, per_band, width
        self.ablated, self.tokens, self.seed = ablated, tokens, seed
        self._contexts: Contexts | None = None
        self._x: list[Tensor] = []
        self._codes: list[SparseCodes] = []

    def work(self, lm: FrozenLM, heads: Sequence[SAEHead], tokens: int, ctx_len: int) -> Work:
        """The logit lens of every latent, and the rows up to the places that are ablated.

        Places are taken to lie anywhere: so many rows have some, each up to the last of them.
        """
        rows = max(1, min(tokens, self.tokens or tokens) // ctx_len)
        upto = places = 0.0
        for head in heads:
            n = PLACES * min(self.ablated, head.d_sae)
            hit = rows * -math.expm1(-n / rows)
            upto += ctx_len * hit * n / (n + hit) if n else 0.0
            places += n
        lens = sum(head.d_sae + RANDOM for head in heads)
        return Work(upto=upto, on=upto + places, logits=2 * places, directions=lens)

    def begin(self, run: EvalRun) -> None:
        """Without windows."""
        top, per_band = self._shown(run)
        self._contexts = Contexts(
            run.head.d_sae,
            self.width,
            max(top, PEAKS),
            2 * BANDS * per_band,
            silent=1,
            seed=self.seed,
        )
        self._x, self._codes = [], []

    def _shown(self, run: EvalRun) -> tuple[int, int]:
        top, per_band = FEWER if run.head.d_sae >= MANY else USUAL
        return self.top or top, per_band if self.per_band is None else self.per_band

    def observe(self, run: EvalRun, seen: Seen) -> None:
        """Take in a batch of the first set."""
        batch = seen.batch
        if self._contexts is None or batch.set_name != run.sets[0]:
            return
        self._contexts.update(batch)
        room = ROWS - sum(len(x) for x in self._x)
        if room > 0:
            self._x.append(batch.rows[:room])
        if sum(len(codes.values) for codes in self._codes) < SHARED_CODES:
            codes = batch.out.codes.sparse()
            values, rows, latents = codes.values.cpu(), codes.rows.cpu(), codes.latents.cpu()
            self._codes.append(SparseCodes(values, rows, latents, codes.n_rows, codes.d_sae))

    def finish(self, run: EvalRun) -> Figures:
        """Work out what the page shows, and write it."""
        contexts = self._contexts
        if contexts is None or not int(contexts.meter.n):
            raise InputError(f"report dashboard: set {run.sets[0]!r} has no token to look at")
        x = torch.cat(self._x)
        meter = contexts.meter.to(x.device)
        found = read_directions(run.head, run.lm, meter, x, SHOWN_TOKENS, bins=LENS_BINS)
        meter = contexts.meter.cpu()
        curves, bends = latent_curves(run.head, x)
        codes = _limited(self._codes)
        self._x, self._codes = [], []
        near = neighbours(*codes, top=RELATED)
        ablations = self._ablations(run, contexts)
        known = Known.read(run)
        made = _Made(run, contexts, found, near, curves, bends, ablations, known, self._shown(run))
        write_dashboard(run.out / self.files[0], made.dashboard(codes.n_rows), INDEX)
        measured = list(ablations.values())
        return {
            "n_tokens": int(meter.n),
            "n_alive": int((meter.fired > 0).sum()),
            "megabytes": round((run.out / self.files[0]).stat().st_size / 1e6, 3),
            "n_ablated": len(measured),
            "ablation_kl_mean": float(np.mean([a.kl for a in measured])) if measured else None,
        }

    def _ablations(self, run: EvalRun, contexts: Contexts) -> dict[int, Ablation]:
        fired = contexts.meter.fired
        alive = (fired > 0).nonzero().squeeze(1)
        alive = alive[fired[alive].argsort(descending=True, stable=True)]
        n = min(self.ablated, len(alive))
        if not n:
            return {}
        chosen = alive[torch.linspace(0, len(alive) - 1, n).round().long()].unique()
        places = [p for j in chosen.tolist() for p in _places(contexts, j)]
        return ablate(run.head, run.lm, places)


def _places(contexts: Contexts, latent: int, most: int = PLACES) -> list[AblatedPlace]:
    """The tokens on which a latent fires most."""
    windows = contexts.windows(latent)[0].pick(slice(most))
    places = []
    for row, at in zip(windows.row.tolist(), (windows.start + windows.peak).tolist(), strict=True):
        ids = contexts.row_ids(row, at + 2)
        follows = int(ids[at + 1]) if len(ids) > at + 1 and contexts.goes_on(row, at) else None
        places.append(AblatedPlace(latent, ids[: at + 1], follows))
    return places


def _limited(parts: list[SparseCodes]) -> SparseCodes:
    """The codes of the first tokens, as many as there is room for."""
    rows = np.cumsum([0] + [p.n_rows for p in parts]).tolist()
    values = torch.cat([p.values for p in parts])
    latents = torch.cat([p.latents for p in parts])
    at = torch.cat([p.rows + first for p, first in zip(parts, rows, strict=False)])
    n = rows[-1]
    if len(values) > SHARED_CODES:
        n = int(at[SHARED_CODES])  # the token that does not fit whole
        end = int(torch.searchsorted(at, n))
        values, latents, at = values[:end], latents[:end], at[:end]
    return SparseCodes(values, at, latents, n, parts[0].d_sae)


class _Made:
    """Everything about the latents, ready to be put on the page."""

    def __init__(
        self,
        run: EvalRun,
        contexts: Contexts,
        found: DirectionStats,
        near: Neighbours,
        curves: list[Curve | None],
        bends: list[float | None],
        ablations: Mapping[int, Ablation],
        known: Known,
        shown: tuple[int, int],
    ) -> None:
        self.run, self.contexts, self.found, self.near = run, contexts, found, near
        self.curves, self.bends, self.ablations, self.known = curves, bends, ablations, known
        self.top, self.per_band = shown
        self.meter: Activations = contexts.meter
        used = (self.meter.histogram.sum(0) > 0).nonzero().squeeze(1)
        half = Activations.PER_OCTAVE // 2
        self.first = int(used[0]) // half * half
        self.last = (int(used[-1]) // half + 1) * half
        n_bins = (self.last - self.first) // half
        octave = Activations.LOWEST + np.arange(n_bins + 1) / 2 + self.first / (2 * half)
        self.edges = np.exp2(octave)
        used_bins = self.meter.histogram[:, self.first : self.last]
        self.density = used_bins.view(len(used_bins), n_bins, half).sum(2).numpy()
        self.bands = [list(self._bands(j)) for j in range(run.head.d_sae)]
        every = [w for bands in self.bands for _, w in bands]
        rows, starts, lengths = (
            torch.cat([w[i] for w in every]).numpy() if every else np.zeros(0, dtype=np.int64)
            for i in range(3)
        )
        self.pool = Pool(run.lm.tokenizer, contexts, rows, starts, lengths)
        self.cosine = _encoder_cosine(run, found)
        self.tokens = [firing_tokens(contexts, j, run.lm.tokenizer) for j in range(run.head.d_sae)]

    def dashboard(self, n_related: int) -> Dashboard:
        """The page; the latents are made when they are asked for."""
        columns = self._columns()
        return Dashboard(
            f"Dashboard: {self.run.title}",
            self._about(n_related),
            columns,
            self.tokens,
            self._sparklines(),
            [float(f"{e:.6g}") for e in self.edges],
            self.pool.texts,
            self.pool.tokens,
            self._latents(),
            *self._opening(columns),
        )

    def _about(self, n_related: int) -> list[str]:
        meter, run = self.meter, self.run
        n, alive = int(meter.n), int((meter.fired > 0).sum())
        unit = "units of the head: LM units times its scale"
        paragraphs = [
            f"Over {n:,} tokens of {run.sets[0]}: {alive:,} of {run.head.d_sae:,} latents fired. "
            f"Activations are in {unit} ({float(run.head.scale):.4g}). Contexts are one per "
            "document; tokens that are no text (BOS) and attention sinks are not measured.",
            "The bands hold random firings from the strongest fifth to the weakest; what is below "
            f"{FLOOR:.0%} of a latent's largest activation is in none. The logit lens is the "
            "direct path only, in logits per unit of activation before the final norm. Related "
            f"latents fire on the same tokens, counted over {n_related:,} tokens, on at least 50 "
            "together.",
        ]
        if self.ablations:
            paragraphs.append(
                f"For {len(self.ablations):,} latents, evenly spread over frequencies, the next "
                "token without the latent was measured, where it fires most; the error of the "
                "reconstruction stays in place."
            )
        return paragraphs

    def _columns(self) -> list[Column]:
        meter, found = self.meter, self.found
        frequency, fired = meter.frequency(), meter.fired > 0
        kinds = np.where(frequency > DENSE, "dense", np.where(fired, "alive", "dead")).tolist()
        largest = torch.where(fired, meter.largest, torch.nan)
        number, percent, text = "number", "percent", "text"
        labels: list[float | int | str | None] = [
            self.known.label(j, tokens) or None for j, tokens in enumerate(self.tokens)
        ]
        columns = [
            Column("label", "label", labels, "its explanation, else the fact it tells with an F1 "
                   f"of at least {TELLING}, else the tokens it fires on most", text),
            Column("kind", "kind", kinds, "dead: never fired; dense: on over a tenth", text),
            Column("frequency", "frequency", _list(frequency), "share of tokens it fires on",
                   percent),
            Column("max", "max", _list(largest), "largest activation, head's units", number),
            Column("median", "median", _list(meter.quantile(OPERATING_POINT)),
                   "median activation where it fires, head's units", number),
            Column("kurtosis", "kurtosis", _list(found.lens.kurtosis),
                   "of its logits over the vocabulary; 3 for a normal distribution", number),
            Column("skewness", "skewness", _list(found.lens.skewness),
                   "of its logits over the vocabulary; 0 for a normal distribution", number),
            Column("cosine", "max cosine", _list(found.max_cosine),
                   "largest cosine with what another latent writes", number),
        ]  # fmt: skip
        if any(c is not None for c in self.cosine):
            columns.append(
                Column("reads", "reads-writes cosine", list(self.cosine),
                       "of what it reads, where that is linear, and what it writes", number)
            )  # fmt: skip
        if bool((found.straightness < STRAIGHT).any()):
            columns.append(
                Column("straightness", "straightness", _list(found.straightness),
                       "of what it writes; a direction from 0.95 on", number)
            )  # fmt: skip
        if any(b is not None for b in self.bends):
            columns.append(
                Column("bend", "curvature", list(self.bends),
                       "share of the variance of its learned curves that no line explains",
                       percent)
            )  # fmt: skip
        n, numbers = self.run.head.d_sae, columns[2:]
        del columns[2:]
        if self.known.concepts:
            best = [self.known.concepts.get(j, [None])[0] for j in range(n)]
            columns += [
                Column("concept", "concept", [c and c.fact for c in best],
                       "known fact that it tells best of all latents", text),
                Column("concept_f1", "concept F1", [c and c.f1 for c in best],
                       "how well, on stories it was not chosen on", number),
            ]  # fmt: skip
        if self.known.scores:
            judged = [self.known.scores.get(j) for j in range(n)]
            columns += [
                Column("explanation", "explanation", [s and s.explanation for s in judged],
                       "by a language model", text),
                Column("score", "score", [s and s.score for s in judged],
                       "how clear its contexts are, 1 to 5", "integer"),
                Column("detection", "detection", [s and s.detection for s in judged],
                       "balanced accuracy of its explanation on other contexts; 0.5 is chance",
                       percent),
            ]  # fmt: skip
        if len(columns) == 2:
            telling = fired & (frequency <= DENSE) & (meter.fired >= INTERESTING)
            interest = torch.where(telling, found.lens.kurtosis, torch.nan)
            columns.append(
                Column("interest", "interest", _list(interest),
                       "kurtosis of its logits, of what is not dense and fired "
                       f"{INTERESTING} times: how few tokens it speaks for", number)
            )  # fmt: skip
        return columns + numbers

    def _opening(self, columns: list[Column]) -> tuple[str, list[int]]:
        """What the index opens sorted by, and the best by it, of unlike facts."""
        of = {column.key: column.values for column in columns}
        key = next(key for key in ("concept_f1", "detection", "interest") if key in of)
        values = [v if isinstance(v, int | float) else -math.inf for v in of[key]]
        chosen: dict[Any, int] = {}
        for j in sorted(range(len(values)), key=lambda j: -values[j]):
            if values[j] > -math.inf and len(chosen) < START:
                told = str(of["concept"][j]).split(":")[0] if key == "concept_f1" else j
                chosen.setdefault(told, j)
        return key, list(chosen.values())

    def _sparklines(self) -> list[list[int]]:
        n_bins = self.density.shape[1]
        width = -(-n_bins // SPARK)
        padded = np.pad(self.density, ((0, 0), (0, -n_bins % width)))
        made: list[list[int]] = padded.reshape(len(padded), -1, width).sum(2).tolist()
        return made

    def _bands(self, latent: int) -> Iterator[tuple[str, Windows]]:
        top, sampled = self.contexts.windows(latent)
        if not len(top):
            return
        yield "strongest", top.pick(slice(self.top))
        sizes = sampled.values[torch.arange(len(sampled)), sampled.peak].abs()
        sampled = sampled.pick(sizes >= FLOOR * float(self.meter.largest[latent]))
        for name, part in zip(ORDER, torch.arange(len(sampled)).tensor_split(BANDS), strict=True):
            if not len(part) or not self.per_band:
                continue
            n = min(self.per_band, len(part))
            shown = sampled.pick(part[torch.linspace(0, len(part) - 1, n).round().long()])
            ends = [float(sampled.values[i, sampled.peak[i]]) for i in (part[-1], part[0])]
            yield f"{name} fifth of random firings: {ends[0]:.3g} to {ends[1]:.3g}", shown

    def _latents(self) -> Iterator[Latent]:
        lens = self.found.lens
        directions = self.found.directions.cpu()
        tops, bottoms = (
            (ids.tolist(), values.tolist())
            for ids, values in (
                (lens.top_ids, lens.top_values),
                (lens.bottom_ids, lens.bottom_values),
            )
        )
        names = {i: token_text(self.run.lm.tokenizer, i) for i in
                 torch.cat([lens.top_ids, lens.bottom_ids]).unique().tolist()}  # fmt: skip
        for j, bands in enumerate(self.bands):
            defined = bool(lens.std[j].isfinite())
            yield Latent(
                [Band(title, self._windows(windows)) for title, windows in bands],
                self.density[j].tolist(),
                _named(names, tops[0][j], tops[1][j]) if defined else [],
                _named(names, bottoms[0][j], bottoms[1][j]) if defined else [],
                (float(lens.low[j]), float(lens.high[j]), lens.counts[j].tolist())
                if defined
                else None,
                _coordinates(directions[j]),
                self.cosine[j],
                self._related(j),
                self.ablations.get(j),
                self.curves[j],
                self.known.scores.get(j),
                self.known.concepts.get(j, []),
            )

    def _windows(self, windows: Windows) -> list[Window]:
        made = []
        for row, start, length, peak, _, values in zip(*(t.tolist() for t in windows), strict=True):
            fires = [(i, v) for i, v in enumerate(values[:length]) if v != 0]
            made.append(Window(self.pool.at(row, start), length, peak, fires))
        return made

    def _related(self, latent: int) -> list[Related]:
        return [
            Related(other, jaccard, joint, pearson)
            for other, jaccard, joint, pearson in zip(
                *(t[latent].tolist() for t in self.near), strict=True
            )
            if other >= 0
        ]


def _encoder_cosine(run: EvalRun, found: DirectionStats) -> list[float | None]:
    """Cosine of what each latent reads, the column of a linear encoder, and what it writes."""
    encoder = run.head.encoder if isinstance(run.head, SAE) else None
    if not isinstance(encoder, LinearEncoder | FrozenLinearEncoder):
        return [None] * run.head.d_sae
    reads = encoder.W_enc.detach().T
    cosine = torch.nn.functional.cosine_similarity(reads, found.directions, dim=1)
    return _list(torch.where(found.directions.isfinite().all(1), cosine, torch.nan))


def _coordinates(direction: Float[Tensor, " d_model"]) -> list[tuple[int, float, float]]:
    """The largest ones of a direction."""
    if not direction.isfinite().all() or not direction.any():
        return []
    share = direction.abs() / direction.abs().sum()
    best = share.topk(min(COORDINATES, len(share)))
    return [
        (i, float(direction[i]), s)
        for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _named(
    names: Mapping[int, str], ids: list[int], values: list[float]
) -> list[tuple[str, float]]:
    return [(names[i], v) for i, v in zip(ids, values, strict=True)]


def _list(values: Float[Tensor, " n"]) -> list[Any]:
    return [v if math.isfinite(v) else None for v in values.tolist()]
