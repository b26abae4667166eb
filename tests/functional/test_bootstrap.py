"""Intervals of ratios of sums: against NumPy, and against what they should cover."""

import math

import numpy as np
import pytest
import torch

from kanllama_lightning.functional import bootstrap
from kanllama_lightning.functional.bootstrap import (
    contrast,
    difference,
    group_difference,
    holm,
    interval,
    two_sided,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def documents(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and sizes of documents of unequal length, whose true ratio is 2."""
    g = generator(seed)
    size = torch.randint(5, 200, (n,), generator=g).double()
    return size * (2 + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)), size


def brute_force(tops: np.ndarray, bottoms: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The ratios one resample at a time, by picking documents out."""
    drawn = torch.randint(len(tops), (resamples, len(tops)), generator=generator(seed)).numpy()
    return np.array([tops[i].sum(0) / bottoms[i].sum(0) for i in drawn])


@pytest.mark.parametrize("block", [7, 1000, 2**21])
def test_equals_numpy_whatever_the_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "BLOCK", block)
    top, size = documents(40)
    ends = np.quantile(brute_force(top.numpy(), size.numpy(), 300, 3), [0.025, 0.975])
    assert interval(top, size, 300, 3) == pytest.approx(tuple(ends), rel=1e-12)


def test_differences_equal_numpy_over_the_same_documents() -> None:
    a, size = documents(40)
    b = a * 1.1 + documents(40, 1)[0] * 0.01
    tops, sizes = (torch.stack(t, 1).numpy() for t in ((a, b), (size, size * 2)))
    draws = brute_force(tops, sizes, 300, 5)
    ends = np.quantile(draws[:, 0] - draws[:, 1], [0.025, 0.975])
    found = difference(a, size, b, size * 2, 300, 5)
    assert found[0] == pytest.approx(float(a.sum() / size.sum() - b.sum() / size.sum() / 2))
    assert found[1:3] == pytest.approx(tuple(ends), rel=1e-12)


def test_pairing_takes_out_what_is_hard_about_a_document() -> None:
    a, size = documents(100)
    value, low, high, _ = difference(a, size, a + 0.01 * size, size)
    assert (value, low, high) == pytest.approx((-0.01, -0.01, -0.01))
    apart = interval(a, size)
    assert apart[1] - apart[0] > 0.1


def test_repeats_for_a_seed_only() -> None:
    top, size = documents(30)
    assert interval(top, size, 200, 1) == interval(top, size, 200, 1)
    assert interval(top, size, 200, 1) != interval(top, size, 200, 2)
    before = torch.get_rng_state()
    difference(top, size, size, size)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [0, 1])
def test_one_document_has_no_interval(n: int) -> None:
    top, size = documents(1)
    assert all(math.isnan(end) for end in interval(top[:n], size[:n]))


def test_documents_without_a_denominator_are_harmless() -> None:
    size = torch.tensor([0.0, 0.0, 4.0])  # of three drawn, often none counts
    low, high = interval(torch.tensor([0.0, 0.0, 2.0]), size)
    assert (low, high) == (0.5, 0.5)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    ends = [interval(*documents(60, seed), 400, seed) for seed in range(200)]
    covered = np.mean([low <= 2 <= high for low, high in ends])
    assert 0.89 <= covered <= 0.99


@pytest.mark.parametrize("seed_spread", [0.0, 0.02, 0.2])
def test_differences_of_three_seeds_cover_the_truth(seed_spread: float) -> None:
    """Truth: no difference. Documents alone would claim one far too often."""
    g, hits, naive, n = generator(), 0, 0, 200
    for trial in range(n):
        shared = torch.randn(50, 1, generator=g) * 0.3
        own = torch.randn(50, 6, generator=g) * 0.1 + torch.randn(1, 6, generator=g) * seed_spread
        a, b = (1 + shared + own).split(3, 1)
        ones = torch.ones_like(a)
        _, low, high, _ = group_difference(a, ones, b, ones, 400, trial)
        hits += low <= 0 <= high
        _, low, high, _ = difference(a[:, 0], ones[:, 0], b[:, 0], ones[:, 0], 400, trial)
        naive += low <= 0 <= high
    assert hits / n >= 0.9
    assert seed_spread < 0.2 or naive / n < 0.5


def test_a_single_run_borrows_the_spread_of_a_group() -> None:
    whole = torch.tensor([1.0, 1.2, 1.4], dtype=torch.float64)
    draws = whole.expand(2000, 3)
    one = (torch.tensor([1.2], dtype=torch.float64), torch.full((2000, 1), 1.2).double())
    value, low, high, p = contrast(whole, draws, *one)
    assert value == pytest.approx(0)
    # t with 2 degrees of freedom: 4.30 standard errors of 0.2 sqrt(1 + 1/3)
    assert high == pytest.approx(4.30 * 0.2 * math.sqrt(4 / 3), rel=0.15)
    assert low == pytest.approx(-high, rel=0.25)
    assert p > 0.9


def test_p_agrees_with_the_interval() -> None:
    """Below 5 % where the 95 % interval leaves zero out."""
    g = generator()
    for shift in (-0.5, -0.06, -0.03, 0.0, 0.03, 0.06, 0.5):
        a = 1 + torch.randn(40, 3, generator=g) * 0.2
        b, ones = a + shift + torch.randn(40, 3, generator=g) * 0.1, torch.ones(40, 3)
        found = group_difference(a, ones, b, ones)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0), found
    assert found.p == 2 / 2001


def test_p_of_no_draws_is_unknown() -> None:
    assert math.isnan(two_sided(torch.full((5,), math.nan)))
    assert two_sided(torch.zeros(5)) == 1


def test_holm() -> None:
    """The example is worked by hand: 4 x 0.01, 3 x 0.02, 2 x 0.03 (not below), 1 x 0.04."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
    unknown, known = holm([math.nan, 0.01])
    assert math.isnan(unknown)
    assert known == pytest.approx(0.02)


def test_holm_claims_too_much_as_seldom_as_it_says() -> None:
    """Twenty comparisons without a difference: any is called one in at most 5 % of families."""
    p = torch.rand(4000, 20, generator=generator(3))
    family = [min(holm(row)) < 0.05 for row in p.tolist()]
    assert 0.035 < np.mean(family) < 0.065
    assert np.mean((p < 0.05).any(1).numpy()) > 0.5
