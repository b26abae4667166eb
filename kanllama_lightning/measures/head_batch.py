"""What a head makes of the activations of a token batch: the same for training and evaluation."""

from collections.abc import Mapping

from torch import Tensor

from kanllama_lightning.functional.sinks import regular
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import overflow_hint
from kanllama_lightning.types import InputError, Prefix, TokenBatch, ValidationBatch


def run_head(
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
        norm_limit: Rows with a larger norm do not count (default: the head's own).

    Raises:
        InputError: An activation that counts is NaN or infinite.
    """
    limit = head.norm_limit if norm_limit is None else norm_limit
    mask = tokens.keep & regular(prefix.acts, limit)
    rows = prefix.rows[mask].float()
    if not bool(rows.isfinite().all()):
        bad = int((~rows.isfinite().all(1)).sum())
        raise InputError(
            f"text {set_name!r}: on {bad:,} of {len(rows):,} tokens the LM's activations are NaN "
            f"or infinite. {overflow_hint(prefix.acts.dtype)}Give an undamaged model"
        )
    return ValidationBatch(set_name, tokens, prefix, mask, rows, head(rows))


def run_heads(
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
            found[name] = first = run_head(prefix, tokens, set_name, head)
        else:
            found[name] = first._replace(out=head(first.rows))
    return found
