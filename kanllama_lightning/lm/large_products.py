"""Large products of a frozen LM by the faster of two libraries."""

from typing import Any

from torch import Tensor, nn

from kanllama_lightning.functional.onednn import LARGE, by_onednn, linear


class LargeLinear(nn.Linear):
    """`nn.Linear`, by oneDNN where no gradient goes through: equal to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """Shape [..., in_features] to [..., out_features]."""
        if by_onednn(input, self.weight):
            return linear(input, self.weight, self.bias)
        return super().forward(input)


def multiply_faster_(model: Any) -> None:
    """Make the large `nn.Linear`s of a frozen model `LargeLinear`s.

    Weights stay where they are and as they are.
    """
    for part in model.modules():
        if type(part) is nn.Linear and part.weight.numel() >= LARGE:
            part.__class__ = LargeLinear
