"""What the LM loses when it has to make do with the reconstruction."""

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from callbacks.meter import ValidationMeter
from kanllama_lightning.metrics import SplicedLoss as SplicedLossMetric
from kanllama_lightning.metrics import mean_losses, score
from kanllama_lightning.splice import SplicedLosses, ablated, put, spliced_losses
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
        rows = {f"recon of {name}": batch.out.x_hat for name, batch in batches.items()}
        ablations = ablated(first.x, pl_module.head.x_mean)
        every = spliced(pl_module.lm, first, rows | ablations)
        doc = first.tokens.doc[every.where]
        found: dict[str, dict[str, Any]] = {}
        for name in batches:
            own = every.of(f"recon of {name}", tuple(ablations))
            meters[name].update(own.ce, own.kl, doc)
            values = score(mean_losses(own.ce, own.kl), len(doc))
            found[name] = {"n_targets": len(doc)} | {key: values[key] for key in COLUMNS}
            found[name]["ce_uniform"] = math.log(pl_module.lm.vocab_size)
        return found


def spliced(
    lm: Any, batch: ValidationBatch, rows: Mapping[str, Float[Tensor, "tok d_model"]]
) -> SplicedLosses:
    """Losses of a batch with each of `rows` in the place of its activations, and of none."""
    runs = {name: put(batch.prefix.acts, batch.mask, value) for name, value in rows.items()}
    return spliced_losses(lm, batch.prefix, batch.tokens, runs)
