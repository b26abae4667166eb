"""JumpReLU: zero up to a threshold, the identity above it, with a gradient for the threshold."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def jump_relu(
    p: Float[Tensor, "*rows n"], theta: Float[Tensor, " n"], bandwidth: Float[Tensor, ""] | float
) -> Float[Tensor, "*rows n"]:
    """z = p 1[p > theta], with straight-through gradients in a window around the threshold.

    The true gradient of the jump is zero nearly everywhere, so theta would never learn. With
    K = 1[|p - theta| < bandwidth / 2] the estimator is (METHODS A5, the Anthropic form, in which
    it also reaches p; DeepMind's, arXiv 2407.14435, gives it to theta alone)

        dz/dp     = 1[p > theta] + theta / bandwidth K
        dz/dtheta =              - theta / bandwidth K

    Args:
        p: Pre-activations.
        theta: Threshold of each column, >= 0.
        bandwidth: Width of the window, > 0, in the units of p.
    """
    z: Tensor = _Jump.apply(p, theta, bandwidth)
    return z


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        p: Float[Tensor, "*rows n"],
        theta: Float[Tensor, " n"],
        bandwidth: Float[Tensor, ""] | float,
    ) -> Float[Tensor, "*rows n"]:
        ctx.save_for_backward(p, theta)
        ctx.bandwidth = bandwidth
        return torch.where(p > theta, p, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "*rows n"]) -> tuple[Tensor | None, ...]:
        p, theta = ctx.saved_tensors
        # one pass each, without masks: these keep a gradient where lower < value < upper (K), and
        # where value > lower, and are 0 elsewhere; their bounds are numbers of the host, so the
        # distance is taken in bandwidths
        above = (p - theta).div_(ctx.bandwidth)
        near = torch.ops.aten.hardtanh_backward(grad, above, -0.5, 0.5)
        slope = theta / ctx.bandwidth
        to_p = to_theta = None
        if ctx.needs_input_grad[0]:
            to_p = torch.ops.aten.threshold_backward(grad, above, 0.0).addcmul_(near, slope)
        if ctx.needs_input_grad[1]:
            to_theta = -slope * near.sum_to_size(theta.shape)
        return to_p, to_theta, None
