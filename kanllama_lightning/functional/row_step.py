"""Adam for rows that keep norm 1: projection, clipping, step and norm in one pass over memory.

Step by step that is four passes (the projection, the clipping, Adam, the norm) of which each reads
and writes the whole dictionary or its gradient. In one, a row is read once with its gradient and
moments, and written once; the clipping needs the norm of all gradients before, which `square_rows`
finds in a pass that only reads. On CUDA devices both are kernels.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.functional import kernels

NAME = "row_step"


def fits(weight: Tensor, beta1: float, beta2: float) -> bool:
    """Whether the kernels can step these rows: fp32, contiguous, of at most 16,384 numbers."""
    return (
        weight.dim() == 2
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and 0 < weight.shape[1] <= kernels.LONGEST_ROW
        and 0 < beta1 < 1
        and 0 < beta2 < 1
        and kernels.on(NAME, weight.device)
    )


def squared_norm(
    weight: Float[Tensor, "rows n"], grad: Float[Tensor, "rows n"]
) -> Float[Tensor, ""]:
    """||g - (g . w) w||^2, summed over the rows: the gradient that a row of norm 1 follows."""
    if weight.device.type == "cpu":
        along = (grad * weight).sum(1, keepdim=True)
        return (grad - along * weight).square().sum()
    squares = weight.new_empty(len(weight))
    kernels.square_rows(weight, grad.contiguous(), squares)
    return squares.sum()


def step_rows_(
    weight: Float[Tensor, "rows n"],
    grad: Float[Tensor, "rows n"],
    first: Float[Tensor, "rows n"],
    second: Float[Tensor, "rows n"],
    steps: Float[Tensor, ""],
    factor: Float[Tensor, ""],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    shadow: Float[Tensor, "rows n"] | None = None,
) -> None:
    """Project the gradient, shorten it, step Adam, renormalise; the gradient stays as it was.

    Args:
        weight: Rows of norm 1, which have norm 1 again afterwards.
        grad: Their gradient.
        first: First moments, updated.
        second: Second moments, updated.
        steps: This step's number, from 1; on the device of the rows.
        factor: What the projected gradient is multiplied by; likewise.
        lr: Learning rate.
        betas: Decay of the moments, both above 0 and below 1.
        eps: Added to the root of the second moment.
        shadow: A copy of the rows in another format, such as bf16, to be written too.
    """
    tensors = weight, grad.contiguous(), first, second
    if weight.device.type == "cpu":
        _by_torch_(*tensors, steps, factor, lr, betas, eps, shadow)
        return
    logs = math.log(betas[0]), math.log(betas[1])
    kernels.step_rows(*tensors, shadow, steps, factor, lr, *betas, *logs, eps)


def _by_torch_(
    weight: Float[Tensor, "rows n"],
    grad: Float[Tensor, "rows n"],
    first: Float[Tensor, "rows n"],
    second: Float[Tensor, "rows n"],
    steps: Float[Tensor, ""],
    factor: Float[Tensor, ""],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    shadow: Float[Tensor, "rows n"] | None,
) -> None:
    """The same by torch's operations, in the precision of the tensors."""
    grad = (grad - (grad * weight).sum(1, keepdim=True) * weight) * factor
    first.lerp_(grad, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    unbiased1, unbiased2 = (1 - beta ** steps.double() for beta in betas)
    step = (lr / unbiased1).to(weight.dtype)
    root = (second / unbiased2.to(weight.dtype)).sqrt_().add_(eps)
    weight.sub_(step * first / root)
    weight.div_(weight.norm(dim=1, keepdim=True))
    if shadow is not None:
        shadow.copy_(weight)


@kernels.checked(NAME)
def check(device: torch.device) -> float:
    """Largest error of both kernels after three steps, over the tolerance.

    Gradients from large to small, one of them along its row in part; against fp64.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 70, generator=generator)
    weight /= weight.norm(dim=1, keepdim=True)
    rows, first, second = (weight.double(), *torch.zeros(2, 5, 70, dtype=torch.float64))
    exact = rows, first, second
    found = [tensor.to(device, torch.float32) for tensor in exact]
    shadow = torch.empty_like(found[0], dtype=torch.bfloat16)
    errors = [0.0]
    for number in range(1, 4):
        grad = torch.randn(5, 70, generator=generator) * torch.logspace(2, -6, 5)[:, None]
        grad[1] += 3 * rows[1].float()
        steps, factor = torch.tensor(float(number)), torch.tensor(0.7)
        scalars, betas = (steps.to(device), factor.to(device)), (0.9, 0.999)
        squares = torch.empty(5, device=device)
        kernels.square_rows(found[0], grad.to(device), squares)
        along = (grad * rows).sum(1, keepdim=True)
        expected = (grad - along * rows).square().sum(1)
        errors.append(_worst(squares.sqrt(), expected.sqrt(), kernels.FP32))
        logs = math.log(betas[0]), math.log(betas[1])
        arguments = (*scalars, 1e-3, *betas, *logs, 1e-12)
        kernels.step_rows(found[0], grad.to(device), found[1], found[2], shadow, *arguments)
        _by_torch_(
            rows, grad.double(), first, second, steps, factor, 1e-3, betas, 1e-12, shadow=None
        )
        errors += [_worst(a, b, kernels.FP32) for a, b in zip(found, exact, strict=True)]
        errors.append(_worst(shadow, rows, kernels.BF16))
    return max(errors)


def _worst(found: Tensor, exact: Tensor, tolerance: float) -> float:
    off = (found.double().cpu() - exact).norm() / exact.norm()
    return float(off) / tolerance if off.isfinite() else math.inf
