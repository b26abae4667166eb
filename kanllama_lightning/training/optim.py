"""Adam at full speed: for weights that are stored transposed, and for rows that keep norm 1."""

from typing import Any

import torch
from torch import Tensor, nn

from kanllama_lightning.functional.row_step import fits, step_rows_

EPS = 1e-12
"""The eps of every Adam here, far below any gradient. The loss has no unit, so gradients are
small: at d_model 2,048 those of a latent that rarely fires are below torch's default of 1e-8."""


class RowPass:
    """Rows of norm 1 that Adam projects, clips, steps and renormalises in one pass.

    Args:
        weight: The rows.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.factor = torch.ones((), device=weight.device)
        """What clipping multiplies the gradient of the next step by."""
        self.shadow: Tensor | None = None
        """A copy of the rows in another number format, written by every step, if there is one."""


class Adam(torch.optim.Adam):
    """`torch.optim.Adam`; transposed matrices go to its kernels as what they are in memory.

    The encoders are stored as [d_sae, d_model], as their sparse gradients come, and seen as
    [d_model, d_sae]. Adam works element by element, so it may as well see the stored form; given
    the transposed one, torch 2.13's fused CPU kernel first copies every gradient, which at
    16,384 x 2,048 costs 84 of 99 ms and 128 MiB (LOG.md). The numbers are the same bit for bit.

    Rows that were handed over (`hand_over`) it also projects, clips and renormalises.
    """

    row_passes: tuple[RowPass, ...] = ()

    def __init__(self, params: Any, eps: float = EPS, **kwargs: Any) -> None:
        super().__init__(params, eps=eps, **kwargs)

    def hand_over(self, weight: nn.Parameter) -> RowPass | None:
        """Leave projection, clipping and norm of these rows to every step from now on.

        Returns:
            Where the factor of the clipping goes; None where the steps cannot do it: there is no
            kernel for it on that device, or the optimizer does more than plain Adam.
        """
        for group in self.param_groups:
            plain = not (group["weight_decay"] or group["amsgrad"] or group["maximize"])
            mine = any(p is weight for p in group["params"])
            if mine and plain and fits(weight, *group["betas"]):
                handed = RowPass(weight)
                self.row_passes += (handed,)
                return handed
        return None

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        has_complex: bool = super()._init_group(group, *lists)
        for handed in self.row_passes:
            place = next((i for i, p in enumerate(lists[0]) if p is handed.weight), None)
            if place is not None:
                weight, grad, first, second = (tensors.pop(place) for tensors in lists[:4])
                steps = lists[5].pop(place).add_(1)
                number = steps.to(weight.device)
                settings = float(group["lr"]), group["betas"], group["eps"], handed.shadow
                step_rows_(weight, grad, first, second, number, handed.factor, *settings)
        for tensors in lists[:4]:  # parameters, gradients, first and second moments
            tensors[:] = [_as_stored(tensor) for tensor in tensors]
        return has_complex


def _as_stored(tensor: Tensor) -> Tensor:
    if tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous():
        return tensor.T
    return tensor
