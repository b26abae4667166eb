"""The features of a KAN layer at kept activations, differentiable by the activations."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kanllama_lightning.functional.splines import spline_bases, spline_slopes


def lifted_planes(
    u: Float[Tensor, " nnz"], grid_size: int, order: int = 3
) -> Float[Tensor, "nnz planes"]:
    """SiLU and the B-splines of a grid on [0, 1] at u, less what they are at 0; linear tails.

    So that 0 has no features: any weights of these planes give a curve through the origin
    (METHODS B5 iii).

    Args:
        u: Activations over their reach, fp32.
        grid_size: Cells between 0 and 1.
        order: Degree of the pieces; 3 is cubic.
    """
    at_zero: Tensor = _Bases.apply(u.new_zeros(1), grid_size, order)
    bases: Tensor = _Bases.apply(u, grid_size, order)
    return torch.cat([F.silu(u)[:, None], bases - at_zero], dim=1)


class _Bases(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Float[Tensor, " n"], grid_size: int, order: int
    ) -> Float[Tensor, "n bases"]:
        ctx.save_for_backward(u)
        ctx.grid = grid_size, order
        return spline_bases(u[:, None], 0, 1, grid_size, order, linear_tails=True).squeeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "n bases"]) -> tuple[Tensor | None, ...]:
        (u,) = ctx.saved_tensors
        slopes = spline_slopes(u[:, None], 0, 1, *ctx.grid, linear_tails=True).squeeze(2)
        return (grad * slopes).sum(1), None, None
