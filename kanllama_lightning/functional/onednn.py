"""Products with large weights on a CPU, by oneDNN in the place of MKL, which x86 alone has."""

import torch
from jaxtyping import Float
from torch import Tensor

LARGE = 1 << 18
"""Numbers of a weight from which on oneDNN pays; below, calling it costs more than it saves."""


def by_onednn(x: Float[Tensor, "*n d_in"], weight: Float[Tensor, "d_out d_in"]) -> bool:
    """Whether `linear` is faster than torch's own here, and may be used: no gradient goes through.

    Args:
        x: Inputs.
        weight: As `torch.nn.functional.linear` takes it.
    """
    return (
        weight.numel() >= LARGE
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )


def linear(
    x: Float[Tensor, "*n d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "*n d_out"]:
    """`torch.nn.functional.linear` by oneDNN, where `by_onednn` says so: equal to rounding.

    On an EPYC it is 6 to 57 % faster (LOG.md).
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
