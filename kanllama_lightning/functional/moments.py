"""Statistics of samples too large to be copied into another precision whole."""

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_ROWS = 16_384
"""Rows that exist in higher precision at once."""


def norms(x: Float[Tensor, "tok d_model"]) -> Float[Tensor, " tok"]:
    """Euclidean norm of every row, fp32."""
    return torch.cat([chunk.float().norm(dim=1) for chunk in x.split(CHUNK_ROWS)])


def mean_and_std(
    x: Float[Tensor, "tok d_model"],
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Mean and (n - 1) standard deviation of every coordinate, fp64, in two passes."""
    chunks = x.split(CHUNK_ROWS)
    mean = torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0) / len(x)
    squares = torch.stack([(chunk.double() - mean).square().sum(0) for chunk in chunks]).sum(0)
    return mean, (squares / max(1, len(x) - 1)).sqrt()
