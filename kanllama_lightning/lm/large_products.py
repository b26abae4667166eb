"""Products of large weights on a CPU of the x86 kind, by oneDNN in the place of MKL."""

import platform
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 1 << 18
"""Numbers of a weight from which on oneDNN pays; below, calling it costs more than it saves."""


class LargeLinear(nn.Linear):
    """`nn.Linear` in fp32 on a CPU by oneDNN, where nn.Linear takes MKL: equal to rounding.

    On an EPYC it is faster by 6 to 57 % (LOG.md). Anywhere else, and where a gradient goes
    through, it is `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Shape [..., in_features] to [..., out_features]."""
        plain = input.device.type == "cpu" and input.dtype == self.weight.dtype == torch.float32
        if not plain or (input.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.weight, self.bias, "none", [], ""
        )
        return out


def multiply_faster_(model: Any) -> None:
    """Make the large `nn.Linear`s of a frozen model `LargeLinear`s, where torch has both libraries.

    Weights stay where they are and as they are.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return
    for part in model.modules():
        if type(part) is nn.Linear and part.weight.numel() >= LARGE:
            part.__class__ = LargeLinear
