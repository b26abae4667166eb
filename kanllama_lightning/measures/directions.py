"""What a head's latents write, in words of the LM: one look, for the callback and for the report.

The logit lens reads a direction as if it went straight from the hook point into the final norm and
the unembedding. At block 0 that is only the direct path: what later blocks make of it is left out.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kanllama_lightning.console.phase import Phase
from kanllama_lightning.functional.lens import (
    LensStatistics,
    largest_cosine,
    logit_lens,
    pearson,
    random_unit,
    spearman,
)
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.measures.metrics import Activations

STRAIGHT = 0.95
"""Straightness from which on what a latent writes is a direction (METHODS B6)."""
RANDOM = 1024
"""Random unit directions that the latents' are compared with."""
OPERATING_POINT, END = 0.5, 0.99
"""Quantiles of a latent's activations: where its direction is taken, where its curve ends."""


class DirectionStats(NamedTuple):
    """Per latent; NaN where a latent has no direction, or never fired where that is needed."""

    directions: Float[Tensor, "d_sae d_model"]
    """What each latent writes, per unit of its activation."""
    norm: Float[Tensor, " d_sae"]
    """Norm of the direction: LM units written per LM unit of activation."""
    max_cosine: Float[Tensor, " d_sae"]
    """Largest cosine of its direction with another latent's."""
    straightness: Float[Tensor, " d_sae"]
    """1 for heads without a KAN decoder; also NaN for latents that were not judged."""
    lens: LensStatistics
    """Logits per head unit of activation, before the final norm's 1 / rms."""
    random: LensStatistics
    """The moments of random unit directions."""
    counted: Bool[Tensor, " d_sae"]
    """Which latents the figures are about: those that fired and have a direction."""
    figures: dict[str, float]
    """Finite or NaN; the same names for every head."""


@torch.no_grad()
def read_directions(
    head: SAEHead,
    lm: FrozenLM,
    activations: Activations,
    x: Float[Tensor, "tok d_model"],
    top: int = 10,
    block: int = 256,
    judged: int | None = None,
    bins: int = 0,
    shown: bool = True,
) -> DirectionStats:
    """The logit lens and the geometry of a head's directions.

    At 16,384 latents, width 2,048 and 128,256 tokens it takes 8.6 TFLOP: a second on a GPU, a
    minute or two on two CPU cores.

    Args:
        head: In evaluation mode, on the LM's device.
        lm: Loaded.
        activations: Activations of the head, over as much text as there is.
        x: Raw activations, a few thousand: over which latents that mix in the decoder are judged.
        top: Tokens listed per latent at either end.
        block: Latents worked on at once.
        judged: Most latents whose straightness is found, evenly spread (default: all).
        bins: Bins of the histogram of each direction's logits; 0 makes none.
        shown: Whether this process says how far it is.
    """
    with torch.autocast(x.device.type, enabled=False):
        directions = head.directions(activations.quantile(OPERATING_POINT).float(), x).float()
        straightness = _straightness(head, activations, judged)
        # the gain is no part of W_U, which may be tied to the embedding
        gain, unembedding = lm.model.model.norm.weight, lm.unembed()
        with Phase("logit lens", len(directions) + RANDOM, "directions", shown) as progress:
            lens = logit_lens(directions, gain, unembedding, top, block, bins, progress.add)
            random = random_unit(gain, unembedding, RANDOM, block=block, done=progress.add)
        max_cosine = largest_cosine(directions, block)
    counted = (activations.fired > 0) & lens.kurtosis.isfinite()
    figures = _figures(activations, counted, lens, random, max_cosine, straightness)
    norm = directions.norm(dim=1)
    return DirectionStats(
        directions, norm, max_cosine, straightness, lens, random, counted, figures
    )


def _straightness(
    head: SAEHead, activations: Activations, judged: int | None
) -> Float[Tensor, " d_sae"]:
    upto = activations.quantile(END).float()
    alive = (activations.fired > 0).nonzero().squeeze(1)
    if judged is not None and len(alive) > judged:
        spread = torch.linspace(0, len(alive) - 1, judged, device=alive.device)
        alive = alive[spread.round().long()]
    found = torch.full_like(upto, torch.nan)
    found[alive] = head.straightness(alive, upto[alive])
    return found


def _figures(
    activations: Activations,
    counted: Bool[Tensor, " d_sae"],
    lens: LensStatistics,
    random: LensStatistics,
    max_cosine: Float[Tensor, " d_sae"],
    straightness: Float[Tensor, " d_sae"],
) -> dict[str, float]:
    skewness, kurtosis = lens.skewness[counted], lens.kurtosis[counted]
    log_frequency = activations.frequency()[counted].log10()
    unusual = random.kurtosis.quantile(0.99)
    return {
        "n_alive": float((activations.fired > 0).sum()),
        "n_directions": float(counted.sum()),
        "curved_frac": _mean((straightness[straightness.isfinite()] < STRAIGHT).float()),
        "skewness_median": _median(skewness),
        "skewness_mean": _mean(skewness),
        "skewness_random": _median(random.skewness),
        "kurtosis_median": _median(kurtosis),
        "kurtosis_mean": _mean(kurtosis),
        "kurtosis_random": _median(random.kurtosis),
        "kurtosis_random_p99": float(unusual),
        "kurtosis_over_random_p99_frac": _mean((kurtosis > unusual).float()),
        "corr_skew_log_freq": pearson(skewness, log_frequency),
        "corr_skew_log_freq_spearman": spearman(skewness, log_frequency),
        "corr_kurtosis_log_freq": pearson(kurtosis, log_frequency),
        "corr_kurtosis_log_freq_spearman": spearman(kurtosis, log_frequency),
        "max_cosine_mean": _mean(max_cosine[counted]),
    }


FIGURES = (
    "n_alive",
    "n_directions",
    "curved_frac",
    "skewness_median",
    "skewness_mean",
    "skewness_random",
    "kurtosis_median",
    "kurtosis_mean",
    "kurtosis_random",
    "kurtosis_random_p99",
    "kurtosis_over_random_p99_frac",
    "corr_skew_log_freq",
    "corr_skew_log_freq_spearman",
    "corr_kurtosis_log_freq",
    "corr_kurtosis_log_freq_spearman",
    "max_cosine_mean",
)
"""Names of the figures of a look, in order."""


def _mean(values: Float[Tensor, " n"]) -> float:
    return float(values.double().mean()) if len(values) else math.nan


def _median(values: Float[Tensor, " n"]) -> float:
    return float(values.double().quantile(0.5)) if len(values) else math.nan
