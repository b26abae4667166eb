"""What the LM loses when it has to make do with the reconstruction."""

from collections.abc import Mapping
from typing import Any

import torch

from callbacks.meter import ValidationMeter
from kanllama_lightning.metrics import SplicedLoss as SplicedLossMetric
from kanllama_lightning.splice import put, spliced_losses
from kanllama_lightning.types import ValidationBatch

COLUMNS = ("ce_clean", "ce_recon", "ce_zero", "ce_mean", "kl_recon", "kl_zero", "kl_mean")


class SplicedLoss(ValidationMeter):
    """Next-token loss: original, reconstruction, zero and mean ablation; delta CE, score, KL.

    Per batch in `losses.csv`. All runs go on from the same pass up to the hook point; heads side by
    side share those that are not of a head. Positions that are BOS, EOS, PAD or sinks keep their
    own activation in every run.
    """

    file = "losses.csv"
    columns = ("n_targets", *COLUMNS[:4], "delta_ce", *COLUMNS[4:])

    def make(self, head: Any) -> SplicedLossMetric:
        """A fresh metric."""
        return SplicedLossMetric()

    def measure(
        self, meters: Mapping[str, Any], batches: Mapping[str, ValidationBatch], pl_module: Any
    ) -> dict[str, dict[str, Any]]:
        """Run the LM on from the hook: untouched, with zeros and the mean, and with each head."""
        first = next(iter(batches.values()))
        rows = {f"recon of {name}": batch.out.x_hat for name, batch in batches.items()}
        rows |= {
            "zero": torch.zeros_like(first.x),
            "mean": pl_module.head.x_mean.expand_as(first.x),
        }
        sums, n = splice_sums(pl_module.lm, first, rows)
        found: dict[str, dict[str, Any]] = {}
        for name in batches:
            own = {k: v for k, v in sums.items() if " of " not in k}
            own |= {f"{of}_recon": sums[f"{of}_recon of {name}"] for of in ("ce", "kl")}
            meters[name].update(own, n)
            means = {key: float(own[key]) / n if n else float("nan") for key in COLUMNS}
            delta = means["ce_recon"] - means["ce_clean"]
            found[name] = {"n_targets": n, "delta_ce": delta, **means}
        return found


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
