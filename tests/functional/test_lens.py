"""The logit lens against SciPy on the whole matrix, whatever the blocks."""

import numpy as np
import pytest
import torch
from scipy import stats

from kanllama_lightning.functional.lens import (
    largest_cosine,
    logit_lens,
    pearson,
    random_unit,
    spearman,
)

N, D, V = 23, 12, 301


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def given():
    heavy = drawn(D, V, seed=1) * drawn(D, V, seed=2).square()
    return drawn(N, D), drawn(D, seed=3).abs() + 0.1, heavy


def test_equals_scipy_on_the_whole_matrix(given):
    w, gain, unembedding = given
    found = logit_lens(w, gain, unembedding, top=7)
    logits = w.double().numpy() @ (gain[:, None] * unembedding).double().numpy()
    np.testing.assert_allclose(found.mean, logits.mean(1), atol=1e-5)
    np.testing.assert_allclose(found.std, logits.std(1), rtol=1e-5)
    np.testing.assert_allclose(found.skewness, stats.skew(logits, axis=1), atol=1e-4)
    np.testing.assert_allclose(
        found.kurtosis, stats.kurtosis(logits, axis=1, fisher=False), rtol=1e-4
    )
    order = logits.argsort(1)
    np.testing.assert_array_equal(found.top_ids, order[:, ::-1][:, :7])
    np.testing.assert_array_equal(found.bottom_ids, order[:, :7])
    np.testing.assert_allclose(found.top_values, np.sort(logits, 1)[:, ::-1][:, :7], atol=1e-4)
    np.testing.assert_allclose(found.bottom_values, np.sort(logits, 1)[:, :7], atol=1e-4)


def test_histogram_equals_numpy(given):
    w, gain, unembedding = given
    found = logit_lens(w, gain, unembedding, block=5, bins=11)
    logits = (w * gain) @ unembedding
    for j, row in enumerate(logits.numpy()):
        counts, edges = np.histogram(row, 11)
        # a logit on an edge may fall on either side of it
        assert np.abs(counts - found.counts[j].numpy()).sum() <= 2
        np.testing.assert_allclose([found.low[j], found.high[j]], edges[[0, -1]], rtol=1e-4)
    assert found.counts.sum(1).tolist() == [V] * N


@pytest.mark.parametrize("block", [1, 5, 23, 1000])
def test_blocks_do_not_matter(given, block):
    for a, b in zip(logit_lens(*given, block=block), logit_lens(*given, block=8), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(largest_cosine(given[0], block), largest_cosine(given[0], 8))


def test_low_precision_unembeddings_are_widened(given):
    w, gain, unembedding = given
    narrow = unembedding.bfloat16()
    want = logit_lens(w, gain, narrow.float())
    for a, b in zip(logit_lens(w, gain, narrow), want, strict=True):
        assert torch.equal(a, b)


def test_nothing_that_is_given_is_written_to(given):
    before = [a.clone() for a in given]
    logit_lens(*given)
    largest_cosine(given[0])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_the_shape_does_not_depend_on_the_length(given):
    w, gain, unembedding = given
    a, b = logit_lens(w, gain, unembedding), logit_lens(3 * w, gain, unembedding)
    torch.testing.assert_close(b.std, 3 * a.std)
    torch.testing.assert_close(b.kurtosis, a.kurtosis)
    assert torch.equal(b.top_ids, a.top_ids)


@pytest.mark.parametrize("bad", [0.0, torch.nan])
def test_what_is_no_direction_has_no_moments(given, bad):
    w, gain, unembedding = given
    w[4] = bad
    found = logit_lens(w, gain, unembedding)
    others = torch.arange(N) != 4
    for value in (found.mean, found.std, found.skewness, found.kurtosis):
        assert value[4].isnan()
        assert value[others].isfinite().all()
    assert found.top_values[4].isnan().all()
    assert found.bottom_values[4].isnan().all()
    cosines = largest_cosine(w)
    assert cosines[4].isnan()
    torch.testing.assert_close(cosines[others], largest_cosine(w[others]))


def test_edges():
    gain, unembedding = torch.ones(D), drawn(D, 5)
    none = logit_lens(torch.zeros(0, D), gain, unembedding, top=3)
    assert [tuple(a.shape) for a in none] == [(0,)] * 4 + [(0, 3)] * 4 + [(0,), (0,), (0, 0)]
    assert logit_lens(drawn(2, D), gain, unembedding, top=10).top_ids.shape == (2, 5)
    assert logit_lens(drawn(2, D), gain, unembedding, top=0).top_ids.shape == (2, 0)
    for wrong in ({"top": -1}, {"block": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            logit_lens(drawn(2, D), gain, unembedding, **wrong)


def test_random_directions_are_their_own_and_always_the_same(given):
    _, gain, unembedding = given
    before = torch.random.get_rng_state()
    a, b = (random_unit(gain, unembedding, n=40) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.kurtosis, b.kurtosis)
    assert len(a.kurtosis) == 40
    assert not torch.equal(random_unit(gain, unembedding, n=40, seed=1).kurtosis, a.kurtosis)


def test_random_directions_on_a_normal_vocabulary_are_normal():
    found = random_unit(torch.ones(64), drawn(64, 20_000), n=50)
    assert found.skewness.mean().item() == pytest.approx(0, abs=0.02)
    assert found.kurtosis.mean().item() == pytest.approx(3, abs=0.03)
    assert found.std.mean().item() == pytest.approx(1, abs=0.03)


def test_largest_cosine_by_brute_force():
    w = drawn(N, D)
    unit = (w / w.norm(dim=1, keepdim=True)).double().numpy()
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -9)
    np.testing.assert_allclose(largest_cosine(w, 4), cosines.max(1), atol=1e-6)
    assert largest_cosine(w[:1]).isnan().all()
    opposite = torch.tensor([[1.0, 0], [-2, 0]])
    assert largest_cosine(opposite).tolist() == [-1, -1]


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_equal_scipys(ties):
    x, y = drawn(80, seed=5), drawn(80, seed=6)
    y = y + x
    if ties:
        x, y = x.mul(2).round(), y.mul(2).round()
    x[3], y[7] = torch.nan, -torch.inf
    both = x.isfinite() & y.isfinite()
    a, b = x[both].numpy(), y[both].numpy()
    assert pearson(x, y) == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-6)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-9)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_correlation_to_speak_of(n):
    for correlation in (pearson, spearman):
        assert np.isnan(correlation(torch.ones(n), torch.arange(float(n))))
