"""What the LM loses when it has to make do with the reconstruction."""

import math
from collections.abc import Mapping
from typing import Any

from kanllama_lightning.callbacks.meter import ValidationMeter
from kanllama_lightning.lm.splice import ablated, losses_by_head
from kanllama_lightning.measures.metrics import SplicedLossMetric, mean_losses, score
from kanllama_lightning.types import ValidationBatch

COLUMNS = (
    *("ce_clean", "ce_recon", "ce_zero", "ce_mean", "delta_ce", "kl_recon", "kl_zero", "kl_mean"),
    *("delta_ce_share", "ce_score"),
)


class SplicedLoss(ValidationMeter):
    """Next-token loss: original, reconstruction, zero and mean ablation; delta CE, KL.

    Per batch in `losses.csv`. All runs go on from the same pass up to the hook point; heads side by
    side share those that are not of a head. Positions that are BOS, EOS, PAD or sinks keep their
    own activation in every run. Intervals are over documents.
    """

    file = "losses.csv"
    columns = ("n_targets", *COLUMNS, "ce_uniform")

    def make(self, head: Any, pl_module: Any) -> SplicedLossMetric:
        """A fresh metric."""
        return SplicedLossMetric(pl_module.lm.vocab_size)

    def measure(
        self, meters: Mapping[str, Any], batches: Mapping[str, ValidationBatch], pl_module: Any
    ) -> dict[str, dict[str, Any]]:
        """Run the LM on from the hook: untouched, with zeros and the mean, and with each head."""
        first = next(iter(batches.values()))
        x_hats = {name: batch.out.x_hat for name, batch in batches.items()}
        ablations = ablated(first.x, pl_module.head.x_mean)
        found: dict[str, dict[str, Any]] = {}
        for name, own in losses_by_head(pl_module.lm, first, x_hats, ablations).items():
            doc = first.tokens.doc[own.where]
            meters[name].update(own.ce, own.kl, doc)
            values = score(mean_losses(own.ce, own.kl), len(doc))
            found[name] = {"n_targets": len(doc)} | {key: values[key] for key in COLUMNS}
            found[name]["ce_uniform"] = math.log(pl_module.lm.vocab_size)
        return found
