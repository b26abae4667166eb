"""How much of the activations comes back."""

from collections.abc import Mapping
from typing import Any

from kanllama_lightning.callbacks.meter import ValidationMeter
from kanllama_lightning.measures.metrics import ReconstructionMetric
from kanllama_lightning.types import ValidationBatch


class Reconstruction(ValidationMeter):
    """FVU and EV (about the mean of all validation tokens), MSE, cosine, norm ratio, bias."""

    def make(self, head: Any, pl_module: Any) -> ReconstructionMetric:
        """A fresh metric."""
        return ReconstructionMetric(head.d_model)

    def measure(
        self, meters: Mapping[str, Any], batches: Mapping[str, ValidationBatch], pl_module: Any
    ) -> dict[str, dict[str, Any]]:
        """Add one batch."""
        for name, batch in batches.items():
            meters[name].update(batch.x, batch.out.x_hat)
        return {}
