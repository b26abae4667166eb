"""Losses of the heads, and next-token losses of the LM, as pure functions."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from kanllama_lightning.functional import ranks


def fvu(x: Float[Tensor, "tok d_model"], x_hat: Float[Tensor, "tok d_model"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained in one batch; 0 is perfect, 1 is predicting the mean.

    Of several processes (`ranks.pooled`) that of all rows.
    """
    return ranks.total((x - x_hat).square().sum()) / ranks.summed_squares(x)


def auxk(
    error: Float[Tensor, "tok d_model"], error_hat: Float[Tensor, "tok d_model"]
) -> Float[Tensor, ""]:
    """How badly the dead latents explain what the live ones missed; 1 is predicting the mean.

    AuxK of Gao et al. 2024 (arXiv 2406.04093), divided by the variance of its target. The target
    is detached here: the live latents must not learn to leave work to the dead ones. 0 where the
    target does not vary. The variance is that of all processes' rows (`ranks.pooled`), so that the
    mean over processes is the AuxK of all rows.
    """
    target = error.detach()
    variance = ranks.summed_squares(target) / ranks.world()
    known = variance > 0
    return (target - error_hat).square().sum() * known / torch.where(known, variance, 1.0)


def geometric_median(
    x: Float[Tensor, "tok d_model"], iterations: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " d_model"]:
    """The point with the least summed distance to the rows, by Weiszfeld's iteration.

    Args:
        x: Rows.
        iterations: At most this many steps.
        tolerance: Stop when a step moves less than this share of the rows' mean distance.
    """
    x = x.double()
    guess = x.mean(0)
    for _ in range(iterations):
        distance = (x - guess).norm(dim=1).clamp_min(1e-6)
        weight = distance.reciprocal()
        new = (weight[:, None] * x).sum(0) / weight.sum()
        moved, guess = (new - guess).norm(), new
        if moved <= tolerance * distance.mean():
            break
    return guess.float()


def next_token_targets(
    ids: Int[Tensor, "batch pos"], keep: Bool[Tensor, "batch pos"], doc: Int[Tensor, "batch pos"]
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """What each position has to predict, and which positions count.

    A position counts when the next token is real text (not BOS, EOS, PAD) of the same document;
    the last position of a row has no target and never counts.
    """
    targets = ids.roll(-1, dims=1)
    counts = keep.roll(-1, dims=1) & (doc == doc.roll(-1, dims=1))
    counts[:, -1] = False
    return targets, counts


def cross_entropy(
    logits: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """-log P(target) of every row, nats, in fp32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def kl_divergence(
    log_p: Float[Tensor, "*n vocab"], log_q: Float[Tensor, "*n vocab"]
) -> Float[Tensor, "*n"]:
    """KL(P || Q) of every row, nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
