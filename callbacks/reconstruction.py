"""How much of the activations comes back."""

from typing import Any

from callbacks.meter import ValidationMeter
from kanllama_lightning.metrics import Reconstruction as ReconstructionMetric
from kanllama_lightning.types import ValidationBatch


class Reconstruction(ValidationMeter):
    """FVU and EV (about the mean of all validation tokens), MSE, cosine, norm ratio, bias."""

    def make(self, pl_module: Any) -> ReconstructionMetric:
        """A fresh metric."""
        return ReconstructionMetric(pl_module.head.d_model)

    def measure(
        self, meter: ReconstructionMetric, batch: ValidationBatch, pl_module: Any
    ) -> dict[str, Any]:
        """Add one batch."""
        meter.update(batch.x, batch.out.x_hat)
        return {}
