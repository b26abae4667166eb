"""Every metric against plain NumPy on the whole set."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kanllama_lightning.functional.bootstrap import interval
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.measures import cells
from kanllama_lightning.measures.metrics import (
    NOT_MEANINGFUL,
    ReconstructionMetric,
    SparsityMetric,
    SplicedLossMetric,
    meaningful,
    score,
)

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")

SEEDS = st.integers(0, 10_000)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cuts(n):
    """Places to cut n rows at; some parts are empty."""
    return st.lists(st.integers(0, n), max_size=6).map(lambda at: [0, *sorted(at), n])


def codes_of(dense):
    rows, latents = dense.nonzero(as_tuple=True)
    return SparseCodes(dense[rows, latents], rows, latents, *dense.shape)


def merged(metric, parts):
    """One metric per part, their states summed, as a reduction over ranks does."""
    into = metric()
    for part in parts:
        for name in into._defaults:
            setattr(into, name, getattr(into, name) + getattr(part, name))
    return into


# ------------------------------------------------------------------ Reconstruction


def reconstruction_by_numpy(x, x_hat):
    x, x_hat = x.double().numpy(), x_hat.double().numpy()
    norm, norm_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    error = ((x - x_hat) ** 2).sum(1)
    fvu = error.sum() / ((x - x.mean(0)) ** 2).sum()
    return {
        "fvu": fvu,
        "ev": 1 - fvu,
        "mse": error.mean(),
        "cosine": ((x * x_hat).sum(1) / norm / norm_hat).mean(),
        "l2_ratio": (norm_hat / norm).mean(),
        "bias": (norm_hat**2).mean() / (x * x_hat).sum(1).mean(),
    }


def reconstruction(x, x_hat, at=None):
    metric = ReconstructionMetric(x.shape[1])
    for a, b in zip(at or [0], (at or [0, len(x)])[1:], strict=False):
        metric.update(x[a:b], x_hat[a:b])
    return metric.compute()


@settings(max_examples=30)
@given(SEEDS, cuts(20))
def test_reconstruction_is_numpys_however_the_set_is_cut(seed, at):
    x = random(seed, 20, 5) * torch.tensor([1.0, 2, 3, 4, 5]) + 10
    x_hat = x + random(seed + 1, 20, 5)
    want = pytest.approx(reconstruction_by_numpy(x, x_hat), rel=1e-9)
    assert reconstruction(x, x_hat, at) == want
    assert reconstruction(x, x_hat, [0, 20]) == want


def test_explained_variance_by_hand():
    x = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    x_hat = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    got = reconstruction(x, x_hat, [0, 2])
    assert got["ev"] == pytest.approx(0.8)
    assert got["mse"] == 1.0  # summed over d_model
    assert reconstruction(x, x_hat, [0, 1, 2])["ev"] == pytest.approx(0.8)


def test_explained_variance_of_the_mean_is_0_and_of_itself_1():
    x = random(0, 50, 4) + 3
    assert reconstruction(x, x.mean(0).expand_as(x), [0, 20, 50])["ev"] == pytest.approx(0)
    perfect = reconstruction(x, x, [0, 20, 50])
    assert perfect["ev"] == 1
    assert perfect["cosine"] == pytest.approx(1)
    assert (perfect["l2_ratio"], perfect["bias"]) == (1, 1)


def test_variance_is_about_the_mean_even_where_it_is_far_away():
    """In fp32 the two sums would cancel to nothing."""
    x = random(0, 400, 3).double() + 1e5
    x_hat = x + 0.1 * random(1, 400, 3)
    want = reconstruction_by_numpy(x, x_hat)["ev"]
    assert 0.98 < want < 1
    assert reconstruction(x, x_hat, [0, 100, 400])["ev"] == pytest.approx(want, abs=1e-4)


def test_a_shrunken_reconstruction_has_a_bias_below_1():
    x = random(0, 50, 4)
    got = reconstruction(x, 0.8 * x, [0, 50])
    assert got["bias"] == pytest.approx(0.8)
    assert got["l2_ratio"] == pytest.approx(0.8)


def test_zero_rows_give_no_nan():
    got = reconstruction(torch.eye(3) * torch.tensor([1.0, 1, 0]), torch.zeros(3, 3), [0, 3])
    assert (got["cosine"], got["l2_ratio"]) == (0, 0)
    assert math.isnan(got["bias"])  # 0 / 0: no prediction at all


def test_one_constant_row_has_no_fvu():
    assert math.isnan(reconstruction(torch.ones(2, 2), torch.zeros(2, 2), [0, 2])["fvu"])


# ----------------------------------------------------------------------- Sparsity


def sparsity_by_numpy(dense):
    on = dense.numpy() != 0
    l0, frequency = on.sum(1), on.mean(0)

    def percentile(p):
        """The smallest value that p % of the tokens do not exceed, in whole numbers."""
        return np.sort(l0)[-(-p * len(l0) // 100) - 1]

    return {
        "l0": l0.mean(),
        "l0_median": percentile(50),
        "l0_p5": percentile(5),
        "l0_p95": percentile(95),
        "dead_frac": (frequency == 0).mean(),
        "dense_frac": (frequency > 0.1).mean(),
        "sparsity_tokens": len(l0),
    }


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 60), st.floats(-1, 3), st.data())
def test_sparsity_is_numpys_however_the_set_is_cut(seed, n, sparse, data):
    dense = random(seed, n, 9)
    dense = torch.where(dense > sparse + torch.linspace(-1, 2, 9), dense.abs(), 0)
    at = data.draw(cuts(n))
    metric = SparsityMetric(9)
    for a, b in zip(at, at[1:], strict=False):
        metric.update(codes_of(dense[a:b]))
    assert metric.compute() == pytest.approx(sparsity_by_numpy(dense))
    np.testing.assert_allclose(metric.frequency(), (dense.numpy() != 0).mean(0))


def test_percentile_that_falls_on_a_token():
    """Of 20 tokens with L0 0 to 19, one (5 %) does not exceed 0."""
    dense = (torch.arange(20)[None] < torch.arange(20)[:, None]).float()
    metric = SparsityMetric(20)
    metric.update(codes_of(dense))
    assert sparsity_by_numpy(dense)["l0_p5"] == 0
    assert metric.compute() == pytest.approx(sparsity_by_numpy(dense))


def test_sparsity_by_hand():
    """Latents on 2, 1, 0 and 1 of 4 tokens; L0 is 3, 1, 0, 0."""
    metric = SparsityMetric(4)
    metric.update(codes_of(torch.tensor([[5.0, 1, 0, 2], [1, 0, 0, 0], [0] * 4, [0] * 4])))
    assert metric.compute() == {
        "l0": 1.0,
        "l0_median": 0.0,
        "l0_p5": 0.0,
        "l0_p95": 3.0,
        "dead_frac": 0.25,
        "dense_frac": 0.75,
        "sparsity_tokens": 4.0,
    }
    assert metric.frequency().tolist() == [0.5, 0.25, 0, 0.25]


def test_negative_codes_count_and_stored_zeros_do_not():
    index = torch.tensor([0, 1])
    metric = SparsityMetric(2)
    metric.update(SparseCodes(torch.tensor([-1.0, 0.0]), index, index, 2, 2))
    assert metric.compute()["l0"] == 0.5
    assert metric.compute()["dead_frac"] == 0.5


# -------------------------------------------------------------------- SplicedLoss

RUNS = ("recon", "zero", "mean")
NAMES = ["ce_clean", *(f"{of}_{run}" for of in ("ce", "kl") for run in RUNS)]


def per_token(seed, n):
    """Losses of n positions, and the documents they are of."""
    ce = {run: random(seed + i, n).abs() for i, run in enumerate(("clean", *RUNS))}
    kl = {run: random(seed + 10 + i, n).abs() for i, run in enumerate(RUNS)}
    doc = torch.randint(5000, (n,), generator=torch.Generator().manual_seed(seed)) % 9 + 4093
    return ce, kl, doc


def add(metric, ce, kl, doc, part=slice(None)):
    def cut(losses):
        return {name: value[part] for name, value in losses.items()}

    metric.update(cut(ce), cut(kl), doc[part])


@settings(max_examples=20, deadline=None)
@given(SEEDS, cuts(30))
def test_spliced_loss_is_numpys_however_the_set_is_cut(seed, at):
    ce, kl, doc = per_token(seed, 30)
    metric = SplicedLossMetric(50)
    for a, b in zip(at, at[1:], strict=False):
        add(metric, ce, kl, doc, slice(a, b))
    means = {f"ce_{run}": value.double().numpy().mean() for run, value in ce.items()}
    means |= {f"kl_{run}": value.double().numpy().mean() for run, value in kl.items()}
    clean, recon = means["ce_clean"], means["ce_recon"]
    zero, mean = means["ce_zero"], means["ce_mean"]

    def share(top, cost):
        return top / cost if cost >= 0.01 else math.nan

    added = (ce["recon"].double() - ce["clean"].double()).numpy()
    # documents 4096 to 4101 follow 4093 to 4095 in the order of their groups: 0 to 5, 4093 ...
    own = [doc.numpy() == d for d in [*range(4096, 4102), *range(4093, 4096)]]
    sums = [(added[o].sum(), o.sum()) for o in own if o.any()]
    low, high = interval(*(torch.tensor(column).double() for column in zip(*sums, strict=True)))
    assert metric.compute() == pytest.approx(
        means
        | {
            "ce_uniform": math.log(50),
            "delta_ce": recon - clean,
            "delta_ce_low": low,
            "delta_ce_high": high,
            "delta_ce_share": share(recon - clean, mean - clean),
            "ce_score": share(zero - recon, zero - clean),
            "kl_score": 1 - share(means["kl_recon"], means["kl_zero"]),
            "ce_tokens": 30,
        },
        rel=1e-9,
        nan_ok=True,
    )


def test_an_ablation_of_a_part_counts_by_what_it_adds_there():
    """Zero ablation adds 3 nats wherever it is run; the untouched loss differs between parts."""
    metric = SplicedLossMetric(50)
    for clean, run in ((1.0, True), (5.0, False)):
        ce = {"clean": torch.full((8,), clean), "recon": torch.full((8,), clean + 0.5)}
        kl = {"recon": torch.full((8,), 0.25)}
        if run:
            ce |= {"zero": ce["clean"] + 3, "mean": ce["clean"] + 2}
            kl |= {"zero": torch.full((8,), 2.0), "mean": torch.full((8,), 1.0)}
        metric.update(ce, kl, torch.arange(8))
    found = metric.compute()
    want = {"ce_clean": 3, "ce_zero": 6, "ce_mean": 5, "kl_zero": 2, "kl_mean": 1}
    want |= {"delta_ce": 0.5, "delta_ce_share": 0.25, "kl_score": 1 - 0.25 / 2}
    assert {key: found[key] for key in want} == pytest.approx(want)


def test_one_document_has_no_interval():
    ce, kl, _ = per_token(0, 12)
    metric = SplicedLossMetric(50)
    metric.update(ce, kl, torch.full((12,), 7))
    found = metric.compute()
    assert math.isnan(found["delta_ce_low"])
    assert math.isnan(found["delta_ce_high"])


def test_the_interval_is_of_documents_and_not_of_tokens():
    """40 documents of 25 equal tokens: as sure as 40 numbers, not as 1,000."""
    of_document = random(3, 40)
    recon = of_document.repeat_interleave(25) + 5
    doc = torch.arange(40).repeat_interleave(25)
    ce = {"clean": torch.full((1000,), 4.0), "recon": recon}
    metric = SplicedLossMetric(50, ("recon",))
    metric.update(ce, {"recon": recon}, doc)
    found = metric.compute()
    error = float(of_document.double().std() / 40**0.5)
    width = found["delta_ce_high"] - found["delta_ce_low"]
    assert width == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found["delta_ce_low"] < 1 + float(of_document.mean()) < found["delta_ce_high"]


def losses(clean=2.0, recon=2.5, zero=6.0, mean=4.0, kl_recon=0.5, kl_zero=5.0, kl_mean=2.0):
    values = (clean, recon, zero, mean, kl_recon, kl_zero, kl_mean)
    return dict(zip(NAMES, values, strict=True))


def test_score_by_hand():
    got = score(losses(), 10)
    assert got == losses() | {
        "delta_ce": 0.5,
        "delta_ce_share": 0.25,
        "ce_score": 3.5 / 4,
        "kl_score": 0.9,
        "ce_tokens": 10.0,
    }


def test_scores_are_not_clipped():
    worse = score(losses(recon=8.0, kl_recon=10.0), 1)
    assert (worse["ce_score"], worse["delta_ce_share"], worse["kl_score"]) == (-0.5, 3.0, -1.0)
    better = score(losses(recon=1.0), 1)
    assert (better["ce_score"], better["delta_ce"]) == (1.25, -1.0)


@pytest.mark.parametrize("zero", [2.0, 2.0099, 1.0, math.nan])
def test_a_share_of_what_costs_next_to_nothing_is_nan(zero):
    got = score(losses(zero=zero, kl_zero=0.0), 1)
    assert math.isnan(got["ce_score"])
    assert math.isnan(got["kl_score"])
    assert got["delta_ce_share"] == 0.25
    assert math.isnan(score(losses(mean=zero), 1)["delta_ce_share"])


def test_scores_of_ablations_that_were_not_run_are_nan():
    got = score({k: v for k, v in losses().items() if "zero" not in k and "mean" not in k}, 1)
    assert got["delta_ce"] == 0.5
    assert all(math.isnan(got[key]) for key in ("delta_ce_share", "ce_score", "kl_score"))


@pytest.mark.parametrize(
    ("share", "fvu", "says"),
    [
        (0.25, 0.5, True),
        (0.25, 1.0, True),
        (0.0, 2662.6, False),  # constant activations
        (-0.5558, 2.4e17, False),  # a run that diverged
        (0.25, math.nan, False),
        (math.nan, 0.5, False),
        (math.inf, 0.5, False),
        (None, 0.5, False),
        (0.25, None, False),
    ],
)
def test_when_a_share_means_something(share, fvu, says):
    assert meaningful(share, fvu) is says
    shown = cells.share({"delta_ce": 0.1, "delta_ce_share": share, "fvu": fvu})
    assert (shown != NOT_MEANINGFUL) is says
    assert bool(cells.footnote([shown])) is not says


def test_ratios_are_pooled_and_not_averaged():
    """Two batches of unlike size and unlike gap."""
    metric = SplicedLossMetric(50)
    for n, zero in ((1, 6.0), (9, 2.6)):
        values = {k: torch.full((n,), v) for k, v in losses(zero=zero).items()}
        ce = {k.removeprefix("ce_"): v for k, v in values.items() if k.startswith("ce_")}
        kl = {k.removeprefix("kl_"): v for k, v in values.items() if k.startswith("kl_")}
        metric.update(ce, kl, torch.arange(n))
    zero = (6.0 + 9 * 2.6) / 10
    assert metric.compute()["ce_score"] == pytest.approx((zero - 2.5) / (zero - 2.0))


# ------------------------------------------------------------------ all of them


def updated(kind, seed, n=15):
    if kind is SparsityMetric:
        metric = SparsityMetric(6)
        metric.update(codes_of(random(seed, n, 6).relu()))
    elif kind is ReconstructionMetric:
        metric = ReconstructionMetric(6)
        metric.update(random(seed, n, 6) + 1, random(seed + 100, n, 6))
    else:
        metric = SplicedLossMetric(50)
        add(metric, *per_token(seed, n))
    return metric


EMPTY = {
    SparsityMetric: lambda: SparsityMetric(6),
    ReconstructionMetric: lambda: ReconstructionMetric(6),
}
EMPTY[SplicedLossMetric] = lambda: SplicedLossMetric(50)
every_metric = pytest.mark.parametrize("kind", EMPTY)


@every_metric
def test_ranks_are_merged_by_summing_states(kind):
    a, b = updated(kind, 0, 15), updated(kind, 1, 4)
    assert all(fx.__name__ == "dim_zero_sum" for fx in a._reductions.values())
    both = merged(EMPTY[kind], [a, b]).compute()
    one = EMPTY[kind]()
    if kind is SparsityMetric:
        one.update(codes_of(random(0, 15, 6).relu()))
        one.update(codes_of(random(1, 4, 6).relu()))
    elif kind is ReconstructionMetric:
        one.update(random(0, 15, 6) + 1, random(100, 15, 6))
        one.update(random(1, 4, 6) + 1, random(101, 4, 6))
    else:
        for seed, n in ((0, 15), (1, 4)):
            add(one, *per_token(seed, n))
    assert both == pytest.approx(one.compute(), nan_ok=True)
    assert both != pytest.approx(a.compute())


@every_metric
def test_nothing_measured_is_nothing(kind):
    assert EMPTY[kind]().compute() == {}


@every_metric
def test_reset_forgets(kind):
    metric = updated(kind, 0)
    assert metric.compute()
    metric.reset()
    assert metric.compute() == {}


@every_metric
@pytest.mark.parametrize("cast", ["half", "float", "bfloat16"])
def test_sums_stay_in_double_precision(kind, cast):
    metric = getattr(torch.nn.ModuleList([updated(kind, 0)]), cast)()[0]
    metric.set_dtype(torch.float32)
    dtypes = {getattr(metric, name).dtype for name in metric._defaults}
    assert dtypes <= {torch.float64, torch.int64}
    assert metric.compute() == pytest.approx(updated(kind, 0).compute(), rel=0, abs=0, nan_ok=True)
