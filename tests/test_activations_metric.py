"""Activations against NumPy on all values at once."""

import numpy as np
import pytest
import torch

from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.measures.metrics import Activations
from kanllama_lightning.types import DenseCodes

M, N = 6, 4000


def latents(signed=False):
    """Latent 0 never fires, latent 1 on every token, the rest sometimes; sizes over 8 octaves."""
    g = torch.Generator().manual_seed(0)
    z = torch.exp2(torch.randn(N, M, generator=g) * 1.5)
    if signed:
        z *= torch.randn(N, M, generator=g).sign()
    share = torch.tensor([0, 1, 0.5, 0.11, 0.05, 0.002])
    return z * (torch.rand(N, M, generator=g) < share)


def metric(z, pieces=1, sparse=True):
    made = Activations(M)
    for part in z.chunk(pieces):
        made.update(DenseCodes(part).sparse() if sparse else DenseCodes(part))
    return made


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_equals_numpy(signed, sparse):
    z = latents(signed)
    got, sizes = metric(z, 7, sparse), z.abs().double().numpy()
    np.testing.assert_allclose(got.frequency(), (sizes > 0).mean(0))
    assert got.mean()[0].isnan()
    assert all(got.quantile(q)[0].isnan() for q in (0, 0.5, 1))
    assert got.largest[0] == 0
    for j in range(1, M):
        fires = sizes[:, j][sizes[:, j] > 0]
        assert got.fired[j] == len(fires)
        assert got.mean()[j].item() == pytest.approx(fires.mean(), rel=1e-6)
        assert got.largest[j].item() == pytest.approx(fires.max(), rel=1e-6)
        for q in (0.01, 0.5, 0.99):
            want = np.quantile(fires, q, method="inverted_cdf")
            assert got.quantile(q)[j].item() == pytest.approx(want, rel=2 ** (1 / 8) - 1 + 1e-6)
        assert got.quantile(1.0)[j].item() == pytest.approx(fires.max(), rel=0.0906)
        assert got.quantile(1.0)[j] <= got.largest[j]


@pytest.mark.parametrize("pieces", [1, 3, N])
def test_how_the_set_is_cut_does_not_matter(pieces):
    z = latents()[:300]
    a, b = metric(z, min(pieces, 300)), metric(z, 11)
    for name in ("n", "fired", "largest", "histogram"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    torch.testing.assert_close(a.total, b.total)


def test_shares_of_the_common_latents():
    z = latents()
    found = metric(z).compute()
    fired = (z != 0).sum(0).double()
    common = fired / N > 0.01
    dense = fired / N > 0.1
    assert found == {
        "n_tokens": N,
        "dead_frac": 1 / M,
        "dense_frac": pytest.approx(3 / M),
        "dense_firings_frac": pytest.approx(float(fired[dense].sum() / fired.sum())),
        "over_1pct_frac": pytest.approx(4 / M),
        "over_1pct_firings_frac": pytest.approx(float(fired[common].sum() / fired.sum())),
    }


def test_beyond_the_bins_the_outermost_count():
    got = Activations(2)
    values = torch.tensor([1e-9, 1e9])
    got.update(SparseCodes(values, torch.tensor([0, 0]), torch.tensor([0, 1]), 1, 2))
    assert got.histogram[0, 0] == got.histogram[1, -1] == 1
    assert got.quantile(0.5)[0].item() == pytest.approx(1e-9)  # no more than the largest
    assert 512 < got.quantile(0.5)[1] <= 1024


def test_kept_zeros_do_not_fire():
    got = Activations(2)
    codes = torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), torch.tensor([0, 1])
    got.update(SparseCodes(*codes, 1, 2))
    assert got.fired.tolist() == [0, 1]
    assert got.histogram.sum() == 1


def test_nothing_seen():
    got = Activations(3)
    assert got.frequency().tolist() == [0, 0, 0]
    assert got.quantile(0.5).isnan().all()
    assert got.mean().isnan().all()
    got.update(DenseCodes(torch.zeros(0, 3)))
    assert got.compute() == {}


def test_two_ranks_add_up():
    whole, a, b = (metric(z) for z in (latents(), latents()[:999], latents()[999:]))
    reduce = a._reductions
    for name in ("n", "fired", "total", "histogram", "largest"):
        both = torch.stack([getattr(a, name), getattr(b, name)])
        torch.testing.assert_close(reduce[name](both), getattr(whole, name))
