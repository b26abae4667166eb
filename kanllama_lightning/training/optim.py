"""Adam at full speed for weights that are stored transposed."""

from typing import Any

import torch
from torch import Tensor

EPS = 1e-12
"""The eps of every Adam here, far below any gradient. The loss has no unit, so gradients are
small: at d_model 2,048 those of a latent that rarely fires are below torch's default of 1e-8."""


class Adam(torch.optim.Adam):
    """`torch.optim.Adam`; transposed matrices go to its kernels as what they are in memory.

    The encoders are stored as [d_sae, d_model], as their sparse gradients come, and seen as
    [d_model, d_sae]. Adam works element by element, so it may as well see the stored form; given
    the transposed one, torch 2.13's fused CPU kernel first copies every gradient, which at
    16,384 x 2,048 costs 84 of 99 ms and 128 MiB (LOG.md). The numbers are the same bit for bit.
    """

    def __init__(self, params: Any, eps: float = EPS, **kwargs: Any) -> None:
        super().__init__(params, eps=eps, **kwargs)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        has_complex: bool = super()._init_group(group, *lists)
        for tensors in lists[:4]:  # parameters, gradients, first and second moments
            tensors[:] = [_as_stored(tensor) for tensor in tensors]
        return has_complex


def _as_stored(tensor: Tensor) -> Tensor:
    if tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous():
        return tensor.T
    return tensor
