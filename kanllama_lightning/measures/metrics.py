"""Every number about a head, once: summed states in fp64, divided at the end.

Formulas: METHODS C. None of them depends on how a set is cut into batches.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from kanllama_lightning.functional.bootstrap import interval
from kanllama_lightning.types import Codes


class _Sums(Metric):
    """States that are summed over batches and ranks."""

    full_state_update = False
    higher_is_better = None

    def _sum_state(self, name: str, shape: tuple[int, ...] = (), integer: bool = False) -> None:
        dtype = torch.int64 if integer else torch.float64
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def set_dtype(self, dst_type: Any) -> "_Sums":
        """Stay in fp64 whatever the module is cast to."""
        return self


class SparsityMetric(_Sums):
    """L0 and firing frequencies.

    Args:
        d_sae: Number of latents.
    """

    l0_counts: Tensor
    fired: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self._sum_state("l0_counts", (d_sae + 1,), integer=True)
        self._sum_state("fired", (d_sae,), integer=True)

    def update(self, codes: Codes) -> None:
        """Count a batch's codes."""
        l0 = codes.l0()
        self.l0_counts.index_add_(0, l0, torch.ones_like(l0))
        self.fired += codes.fired()

    def compute(self) -> dict[str, float]:
        """L0 statistics in latents per token, shares of latents, and the tokens seen."""
        tokens = int(self.l0_counts.sum())
        if not tokens:
            return {}
        values = torch.arange(len(self.l0_counts), device=self.l0_counts.device)
        below = self.l0_counts.cumsum(0).double() / tokens

        def quantile(q: float) -> float:
            return float(
                torch.searchsorted(below, torch.tensor(q, dtype=below.dtype, device=below.device))
            )

        frequency = self.fired.double() / tokens
        return {
            "l0": float((self.l0_counts * values).sum()) / tokens,
            "l0_median": quantile(0.5),
            "l0_p5": quantile(0.05),
            "l0_p95": quantile(0.95),
            "dead_frac": float((self.fired == 0).double().mean()),
            "dense_frac": float((frequency > 0.1).double().mean()),
            "sparsity_tokens": float(tokens),
        }

    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each latent fires."""
        return self.fired.double() / self.l0_counts.sum().clamp_min(1)


class ReconstructionMetric(_Sums):
    """FVU and EV about the mean of all tokens, cosine, norm ratio and bias.

    Args:
        d_model: Width of the activations.
    """

    n: Tensor
    sum_x: Tensor
    sum_x2: Tensor
    sum_e2: Tensor
    sum_cosine: Tensor
    sum_ratio: Tensor
    sum_hat2: Tensor
    sum_dot: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self._sum_state("sum_x", (d_model,))
        for name in ("n", "sum_x2", "sum_e2", "sum_cosine", "sum_ratio", "sum_hat2", "sum_dot"):
            self._sum_state(name)

    def update(self, x: Float[Tensor, "tok d_model"], x_hat: Float[Tensor, "tok d_model"]) -> None:
        """Add a batch, in the LM's units."""
        x, x_hat = x.double(), x_hat.double()
        x2, hat2, dot = x.square().sum(1), x_hat.square().sum(1), (x * x_hat).sum(1)
        tiny = torch.finfo(torch.float64).tiny
        self.n += len(x)
        self.sum_x += x.sum(0)
        self.sum_x2 += x2.sum()
        self.sum_e2 += (x - x_hat).square().sum()
        self.sum_cosine += (dot / (x2 * hat2).sqrt().clamp_min(tiny)).sum()
        self.sum_ratio += (hat2.sqrt() / x2.sqrt().clamp_min(tiny)).sum()
        self.sum_hat2 += hat2.sum()
        self.sum_dot += dot.sum()

    def compute(self) -> dict[str, float]:
        """`fvu`, `ev` = 1 - fvu, `mse` (sum over d_model), `cosine`, `l2_ratio`, `bias`."""
        n = float(self.n)
        if not n:
            return {}
        variance = float(self.sum_x2) / n - float((self.sum_x / n).square().sum())
        mse = float(self.sum_e2) / n
        fvu = mse / variance if variance > 0 else float("nan")
        dot = float(self.sum_dot)
        return {
            "fvu": fvu,
            "ev": 1 - fvu,
            "mse": mse,
            "cosine": float(self.sum_cosine) / n,
            "l2_ratio": float(self.sum_ratio) / n,
            "bias": float(self.sum_hat2) / dot if dot else float("nan"),
        }


class SplicedLossMetric(_Sums):
    """Next-token losses of the LM with its activations replaced, against the untouched LM.

    An ablation may be run on a part of the positions (all of them in the same part): what it adds
    to the untouched loss there is added to the untouched loss of all.

    Args:
        vocab_size: Token ids that the LM knows: a uniform guess costs ln of that.
        runs: What was run beside `clean`; of `zero` and `mean` none is needed (see `score`).
    """

    RUNS = ("clean", "recon", "zero", "mean")
    GROUPS = 4096
    """Documents are put into so many groups by their number; intervals resample the groups."""
    n: Tensor
    n_ablated: Tensor
    clean_ablated: Tensor
    documents: Tensor

    def __init__(self, vocab_size: int, runs: Sequence[str] = RUNS[1:]) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self._sum_state("n", integer=True)
        # of the positions that were ablated: how many, and the untouched LM's loss there
        self._sum_state("n_ablated", integer=True)
        self._sum_state("clean_ablated")
        # of every group of documents: positions, and what the reconstruction adds to their loss
        self._sum_state("documents", (self.GROUPS, 2))
        self._sum_state("ce_clean")
        for run in runs:
            self._sum_state(f"ce_{run}")
            self._sum_state(f"kl_{run}")

    def update(
        self,
        ce: Mapping[str, Float[Tensor, " n"]],
        kl: Mapping[str, Float[Tensor, " n"]],
        doc: Int[Tensor, " n"],
    ) -> None:
        """Add the losses of n positions.

        Args:
            ce: -log P(next token) of every run and of `clean`, nats.
            kl: KL(P_clean || P_run) of every run, nats.
            doc: Document that each position is of.
        """
        self.n += len(doc)
        if any(name in ce for name in ABLATIONS):
            self.n_ablated += len(doc)
            self.clean_ablated += ce["clean"].double().sum()
        for name, value in _sums(ce, kl).items():
            state: Tensor = getattr(self, name)
            state += value
        added = (ce["recon"].double() - ce["clean"].double()).to(self.documents.device)
        pairs = torch.stack([torch.ones_like(added), added], 1)
        self.documents.index_add_(0, (doc % self.GROUPS).to(self.documents.device), pairs)

    def compute(self) -> dict[str, float]:
        """`score` of the means; `ce_uniform` = ln V; `delta_ce_low`, `_high`: a 95 % interval.

        The interval is a bootstrap over documents; NaN for fewer than two of them.
        """
        n = int(self.n)
        if not n:
            return {}
        known = [k for k in self._defaults if k.startswith(("ce_", "kl_"))]
        sums = {k: float(getattr(self, k)) for k in known}
        found = score(pooled(sums, n, int(self.n_ablated), float(self.clean_ablated)), n)
        found["ce_uniform"] = math.log(self.vocab_size)
        counts, added = self.documents[self.documents[:, 0] > 0].cpu().unbind(1)
        found["delta_ce_low"], found["delta_ce_high"] = interval(added, counts)
        return found


def _sums(ce: Mapping[str, Tensor], kl: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Summed losses by name, fp64 nats."""
    sums = {f"ce_{name}": value.double().sum() for name, value in ce.items()}
    return sums | {f"kl_{name}": value.double().sum() for name, value in kl.items()}


def mean_losses(
    ce: Mapping[str, Float[Tensor, " n"]], kl: Mapping[str, Float[Tensor, " n"]]
) -> dict[str, float]:
    """Mean losses of n positions by name (`ce_<run>`, `kl_<run>`), nats; NaN of none."""
    n = len(ce["clean"])
    return {k: float(v) / n if n else math.nan for k, v in _sums(ce, kl).items()}


ABLATIONS = ("zero", "mean")
"""Runs whose losses need no head; a part of the positions is enough for them."""


def pooled(
    sums: Mapping[str, float], n: int, n_ablated: int, clean_ablated: float
) -> dict[str, float]:
    """Mean losses, nats per token, of sums where the ablations are of a part of the positions.

    An ablation's loss is the untouched one of all positions and what the ablation adds to it on
    its own part; NaN without such a part.

    Args:
        sums: Summed losses, `ce_<run>` and `kl_<run>`.
        n: Positions that `clean` and `recon` are summed over.
        n_ablated: Positions that `zero` and `mean` are summed over.
        clean_ablated: The untouched LM's summed loss at those.
    """
    means = {}
    for key, value in sums.items():
        kind, run = key.split("_")
        if run not in ABLATIONS:
            means[key] = value / n if n else math.nan
        elif not n_ablated:
            means[key] = math.nan
        elif kind == "kl" or n_ablated == n:
            means[key] = value / n_ablated
        else:
            means[key] = sums["ce_clean"] / n + (value - clean_ablated) / n_ablated
    return means


LEAST_COST = 0.01
"""Nats per token that an ablation must cost for a share of that cost to mean anything."""


def score(means: Mapping[str, float], n: int) -> dict[str, float]:
    """Scores from pooled mean losses (`ce_<run>`, `kl_<run>`, nats per token).

    `delta_ce` = recon - clean is what the reconstruction costs, in nats per token. `delta_ce_share`
    = delta_ce / (mean - clean) is that as a share of what mean ablation costs: 0 is perfect, 1 no
    better than the mean. `ce_score` = (zero - recon) / (zero - clean) is the field's older score:
    1 is perfect, < 0 worse than zeros; zeros may cost more than a uniform guess (ln V), which
    flatters it. `kl_score` = 1 - KL_recon / KL_zero. Nothing is clipped; a share of what costs less
    than `LEAST_COST`, or was not run, is NaN.

    Args:
        means: Of `clean`, `recon` and, as far as they were run, `zero` and `mean`.
        n: Positions they are means of.
    """

    def share(top: float, cost: float) -> float:
        return top / cost if cost >= LEAST_COST else math.nan

    clean, recon = means["ce_clean"], means["ce_recon"]
    zero, mean = means.get("ce_zero", math.nan), means.get("ce_mean", math.nan)
    return {
        **means,
        "delta_ce": recon - clean,
        "delta_ce_share": share(recon - clean, mean - clean),
        "ce_score": share(zero - recon, zero - clean),
        "kl_score": 1 - share(means["kl_recon"], means.get("kl_zero", math.nan)),
        "ce_tokens": float(n),
    }


NOT_MEANINGFUL = "not meaningful"
"""What tables say in the place of a share that means nothing."""
NOT_MEANINGFUL_WHY = (
    f"{NOT_MEANINGFUL}: FVU is above 1 (the mean reconstructs better), or mean ablation costs less "
    f"than {LEAST_COST} nats per token"
)


def meaningful(share: float | None, fvu: float | None) -> bool:
    """Whether a share of an ablation's cost says anything of a head with this FVU.

    It does not where the ablation costs next to nothing (the share is NaN, see `score`) or the
    head reconstructs worse than the mean (FVU above 1). What is missing or NaN says nothing.
    """
    return share is not None and math.isfinite(share) and fvu is not None and fvu <= 1


class Activations(_Sums):
    """How often and how strongly each latent fires, and quantiles of that.

    Sizes are those of z at z != 0, in the head's own units; of signed codes (PCA, the dense KAN
    heads) |z|. Quantiles come from a histogram of 8 bins an octave, so they are exact to 9 %
    between 2^-14 and 2^10 (6e-5 and 1024); what lies beyond counts in the outermost bins.

    Args:
        d_sae: Number of latents.
    """

    PER_OCTAVE, LOWEST, OCTAVES = 8, -14, 24
    n: Tensor
    fired: Tensor
    total: Tensor
    largest: Tensor
    histogram: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self._sum_state("n", integer=True)
        self._sum_state("fired", (d_sae,), integer=True)
        self._sum_state("total", (d_sae,))
        self._sum_state("histogram", (d_sae, self.PER_OCTAVE * self.OCTAVES), integer=True)
        none = torch.zeros(d_sae, dtype=torch.float64)
        self.add_state("largest", none, dist_reduce_fx="max")

    def update(self, codes: Codes) -> None:
        """Add a batch's codes."""
        kept = codes.sparse()
        fires = kept.values != 0
        size, latents = kept.values[fires].detach().abs(), kept.latents[fires]
        self.n += kept.n_rows
        self.fired += kept.fired()
        self.total.index_add_(0, latents, size.double())
        self.largest.scatter_reduce_(0, latents, size.double(), "amax")
        n_bins = self.histogram.shape[1]
        octave = size.float().log2() - self.LOWEST
        bins = (octave * self.PER_OCTAVE).floor().clamp(0, n_bins - 1).long()
        one = torch.ones_like(bins)
        self.histogram.view(-1).index_add_(0, latents * n_bins + bins, one)

    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each latent fires."""
        return self.fired.double() / self.n.clamp_min(1)

    def mean(self) -> Float[Tensor, " d_sae"]:
        """Mean size over the tokens on which a latent fires; NaN if it never did."""
        return self.total / self.fired

    def quantile(self, q: float) -> Float[Tensor, " d_sae"]:
        """Quantile of the sizes of each latent, exact to 9 %; NaN if it never fired.

        Args:
            q: From 0 to 1; interpolated within a bin, in the logarithm.
        """
        below = self.histogram.cumsum(1).double()
        wanted = (q * self.fired.double()).clamp_min(1e-9).unsqueeze(1)
        bins = torch.searchsorted(below, wanted).clamp_max(below.shape[1] - 1)
        inside = self.histogram.gather(1, bins)
        share = (wanted - below.gather(1, bins) + inside) / inside
        value = torch.exp2(self.LOWEST + (bins + share) / self.PER_OCTAVE).squeeze(1)
        return torch.where(self.fired > 0, value.minimum(self.largest), torch.nan)

    def compute(self) -> dict[str, float]:
        """Shares of latents, and of all firings those latents have: dead, > 10 %, > 1 %."""
        if not int(self.n):
            return {}
        frequency, firings = self.frequency(), self.fired.sum().clamp_min(1)
        dense, common = frequency > 0.1, frequency > 0.01
        return {
            "n_tokens": float(self.n),
            "dead_frac": float((self.fired == 0).double().mean()),
            "dense_frac": float(dense.double().mean()),
            "dense_firings_frac": float(self.fired[dense].sum() / firings),
            "over_1pct_frac": float(common.double().mean()),
            "over_1pct_firings_frac": float(self.fired[common].sum() / firings),
        }
