"""Attention sinks: activations so large that they say nothing about a text (METHODS 0.5)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
    return ~((sizes > norm_limit) & (sizes < torch.inf))
