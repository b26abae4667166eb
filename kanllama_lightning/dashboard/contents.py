"""What the dashboard shows; plain data, made by the report and packed by the page."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """A stretch of text around a firing."""

    start: int
    """Where it begins in the pool."""
    length: int
    peak: int
    """Place, within the window, of the token it was taken for."""
    values: list[tuple[int, float]]
    """(place within the window, activation) of every token on which the latent fires."""


class Band(NamedTuple):
    """Windows of a latent that belong together, under a heading."""

    title: str
    """Such as "strongest" or "activations of 0.31 to 0.52 (third tenth)"."""
    windows: list[Window]


class Related(NamedTuple):
    """Another latent that fires on the same tokens."""

    latent: int
    jaccard: float
    """|i and j| / |i or j|, over the tokens on which each fires."""
    joint: int
    """|i and j|, tokens."""
    pearson: float | None
    """Correlation of the activations; None where it was not asked for."""


class Ablation(NamedTuple):
    """What becomes of the next token when the latent is set to zero where it fires most."""

    n: int
    """Positions."""
    kl: float
    """Mean KL(as it was || without it), nats."""
    delta_ce: float
    """Mean rise of the loss on the token that follows, nats."""
    raised: list[tuple[str, float]]
    """Tokens that become likelier without it, with the mean change of their log-probability."""
    lowered: list[tuple[str, float]]


class Curve(NamedTuple):
    """A learned curve that has to do with the latent."""

    title: str
    x_axis: str
    y_axis: str
    x: list[float]
    y: list[float]
    density: list[float]
    """Share of what the curve sees nearest to each x; adds up to 1."""


class Scores(NamedTuple):
    """What a language model says of the latent."""

    explanation: str
    category: str
    score: int | None
    """Rubric, 1 to 5; None if the judge failed."""
    detection: float | None
    """Balanced accuracy on held-out windows, 0.5 is chance; None if the judge failed."""
    judge: str
    """Name of the model that judged."""


class Concept(NamedTuple):
    """A known fact whose best latent this one is."""

    fact: str
    f1: float
    precision: float
    recall: float


class Latent(NamedTuple):
    """Everything about one latent but its row in the index."""

    bands: list[Band]
    """Empty for a latent that never fired."""
    density: list[int]
    """Firings per bin of `Dashboard.density_edges`."""
    boosted: list[tuple[str, float]]
    """Tokens whose logit it raises most, with the logit per unit; empty without a direction."""
    suppressed: list[tuple[str, float]]
    lens: tuple[float, float, list[int]] | None
    """Histogram of those logits over the vocabulary: lower end, upper end, counts."""
    coordinates: list[tuple[int, float, float]]
    """Largest coordinates of what it writes: index, value, share of the L1 norm."""
    encoder_cosine: float | None
    """Cosine of what it reads and what it writes; None where it reads through no one direction."""
    related: list[Related]
    ablation: Ablation | None
    """None where it was not asked for, or the latent never fired."""
    curve: Curve | None
    scores: Scores | None
    concepts: list[Concept]


class Column(NamedTuple):
    """A column of the index."""

    key: str
    """Short name, such as `kurtosis`."""
    title: str
    """For people."""
    values: list[float | int | str | None]
    """One per latent; None sorts last, whichever way."""
    help: str
    """One sentence: what it is, in which unit."""
    form: str
    """How numbers are shown: "percent", "integer", "number" (3 digits); "text" for words."""


class Dashboard(NamedTuple):
    """The whole page."""

    title: str
    about: list[str]
    """Paragraphs for the top of the page: over which text, in which units, what is approximate."""
    columns: list[Column]
    """Columns of the index; `kind` ("alive", "dense", "dead") is always among them."""
    labels: list[list[str]]
    """Per latent: the tokens shown in the index (those it fires on most, then those it raises)."""
    sparklines: list[list[int]]
    """Per latent: the density of its activations in a few bins, for the index."""
    density_edges: list[float]
    """Edges of the bins of `Latent.density`, activations."""
    texts: list[str]
    """Table of the pieces of text that tokens add; "" for a token inside a character."""
    pool: np.ndarray
    """int32: which of `texts` each token of the pool is; windows are stretches of the pool."""
    latents: Iterable[Latent]
    """In order of their number; made one after the other, so that they never exist all at once."""
    order: str = "latent"
    """Key of the column that the index opens sorted by, the largest first; "latent": by number."""
    start: Sequence[int] = ()
    """Latents to look at first."""
