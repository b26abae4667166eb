"""What a head makes of the activations of a token batch: the same for training and evaluation."""

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from kanllama_lightning.heads.base import SAEHead
from kanllama_lightning.lm import overflow_hint
from kanllama_lightning.types import InputError, Prefix, TokenBatch, ValidationBatch

SINK_RATIO = 10.0
"""Rows whose norm is so many times the median are attention sinks (METHODS 0.5)."""


def sink_limit(norms: Float[Tensor, " tok"]) -> Float[Tensor, ""]:
    """The norm from which on an activation is an attention sink, from those of a sample."""
    return SINK_RATIO * norms.median()


def regular(rows: Float[Tensor, "*tok d_model"], norm_limit: Tensor) -> Bool[Tensor, "*tok"]:
    """False where an activation is an attention sink (METHODS 0.5); NaN and infinity are none."""
    return within(rows.float().norm(dim=-1), norm_limit)


def within(sizes: Float[Tensor, "*tok"], norm_limit: Tensor) -> Bool[Tensor, "*tok"]:
    """`regular`, from the norms of the activations."""
    return ~(sizes > norm_limit) | ~sizes.isfinite()


def view(
    prefix: Prefix,
    tokens: TokenBatch,
    set_name: str,
    head: SAEHead,
    norm_limit: Tensor | None = None,
) -> ValidationBatch:
    """A batch as a head sees it.

    Args:
        prefix: The LM's run up to the hook point.
        tokens: The batch, on the LM's device.
        set_name: Name of the set it belongs to.
        head: As at inference if it is in evaluation mode.
        norm_limit: Rows with a larger norm do not count; left out, the head's own.

    Raises:
        InputError: An activation that counts is NaN or infinite.
    """
    limit = head.norm_limit if norm_limit is None else norm_limit
    mask = tokens.keep & regular(prefix.acts, limit)
    x = prefix.acts[mask].float()
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite().all(1)).sum())
        raise InputError(
            f"text {set_name!r}: on {bad:,} of {len(x):,} tokens the LM's activations are NaN or "
            f"infinite. {overflow_hint(prefix.acts.dtype)}Give an undamaged model"
        )
    return ValidationBatch(set_name, tokens, prefix, mask, x, head(x))


def views(
    prefix: Prefix, tokens: TokenBatch, set_name: str, heads: Mapping[str, SAEHead]
) -> dict[str, ValidationBatch]:
    """A batch as each of the heads trained side by side sees it; they share mask and rows.

    Args:
        prefix: The LM's run up to the hook point.
        tokens: The batch, on the LM's device.
        set_name: Name of the set it belongs to.
        heads: By name; of one run, so that they have one sink limit.
    """
    found: dict[str, ValidationBatch] = {}
    for name, head in heads.items():
        if not found:
            found[name] = first = view(prefix, tokens, set_name, head)
        else:
            found[name] = first._replace(out=head(first.x))
    return found
