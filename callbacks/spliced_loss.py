"""What the LM loses when it has to make do with the reconstruction."""

from typing import Any

import torch

from callbacks.meter import ValidationMeter
from kanllama_lightning.metrics import SplicedLoss as SplicedLossMetric
from kanllama_lightning.splice import put, spliced_losses
from kanllama_lightning.types import ValidationBatch


class SplicedLoss(ValidationMeter):
    """Next-token loss: original, reconstruction, zero and mean ablation; delta CE, score, KL.

    Per batch in `losses.csv`. All runs go on from the same pass up to the hook point. Positions
    that are BOS, EOS, PAD or sinks keep their own activation in every run.
    """

    file = "losses.csv"
    columns = (
        "n_targets",
        "ce_clean",
        "ce_recon",
        "ce_zero",
        "ce_mean",
        "delta_ce",
        "kl_recon",
        "kl_zero",
        "kl_mean",
    )

    def make(self, pl_module: Any) -> SplicedLossMetric:
        """A fresh metric."""
        return SplicedLossMetric()

    def measure(
        self, meter: SplicedLossMetric, batch: ValidationBatch, pl_module: Any
    ) -> dict[str, Any]:
        """Run the LM on from the hook four times."""
        sums, n = splice_sums(
            pl_module.lm,
            batch,
            {
                "recon": batch.out.x_hat,
                "zero": torch.zeros_like(batch.x),
                "mean": pl_module.head.x_mean.expand_as(batch.x),
            },
        )
        meter.update(sums, n)
        means = {name: float(value) / n if n else float("nan") for name, value in sums.items()}
        return {"n_targets": n, "delta_ce": means["ce_recon"] - means["ce_clean"], **means}


def splice_sums(
    lm: Any, batch: ValidationBatch, rows: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], int]:
    """Summed `ce_<run>` and `kl_<run>` (fp64 nats) of a batch, and the number of positions."""
    acts = batch.prefix.acts
    runs = {name: put(acts, batch.mask, value) for name, value in rows.items()}
    losses = spliced_losses(lm, batch.prefix, batch.tokens, runs)
    sums = {f"ce_{name}": value.double().sum() for name, value in losses.ce.items()}
    sums |= {f"kl_{name}": value.double().sum() for name, value in losses.kl.items()}
    return sums, len(losses.ce["clean"])
