"""Losses against hand formulas, NumPy and SciPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import rel_entr
from torch.nn import functional as F

from kanllama_lightning.functional.losses import (
    auxk,
    cross_entropy,
    fvu,
    geometric_median,
    kl_divergence,
    next_token_targets,
)
from kanllama_lightning.heads.sae import unexplained

SEEDS = st.integers(0, 10_000)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_unexplained_share_by_hand():
    x, x_hat = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    share = unexplained(x, x_hat, torch.tensor(2.0))
    assert share.item() == (1 + 9) / 2 / 2  # sum over d_model, mean over tokens


def test_fvu_by_hand():
    x, x_hat = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert fvu(x, x_hat).item() == pytest.approx(2 / 10)
    assert fvu(x, x).item() == 0
    assert fvu(x, x.mean(0).expand_as(x)).item() == 1


def test_auxk_by_hand():
    """Target rows (1, 0) and (3, 0): mean (2, 0), variance 2."""
    target = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert auxk(target, torch.zeros(2, 2)).item() == 5.0
    assert auxk(target, target.mean(0).expand_as(target)).item() == 1.0
    assert auxk(target, target).item() == 0.0


@given(SEEDS)
def test_auxk_is_squared_error_over_the_variance_of_its_target(seed):
    e, e_hat = random(seed, 7, 3), random(seed + 1, 7, 3)
    a, b = e.double().numpy(), e_hat.double().numpy()
    want = ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    assert auxk(e, e_hat).item() == pytest.approx(want, rel=1e-5)


def test_auxk_does_not_train_its_target():
    e, e_hat = random(0, 5, 3).requires_grad_(), random(1, 5, 3).requires_grad_()
    auxk(e, e_hat).backward()
    assert e.grad is None
    centred = e.detach() - e.detach().mean(0)
    want = 2 * (e_hat.detach() - e.detach()) / centred.square().sum()
    torch.testing.assert_close(e_hat.grad, want)


def test_auxk_without_an_error_is_zero_and_not_nan():
    e_hat = torch.zeros(4, 3, requires_grad=True)
    loss = auxk(torch.zeros(4, 3), e_hat)
    loss.backward()
    assert loss.item() == 0
    assert not e_hat.grad.any()


@pytest.mark.parametrize("rows", [1, 4])
def test_auxk_of_a_constant_error_is_finite(rows):
    """Nothing to explain: METHODS A3 sets the undefined ratio to 0."""
    e_hat = torch.full((rows, 3), 4.0, requires_grad=True)
    loss = auxk(torch.ones(rows, 3), e_hat)
    loss.backward()
    assert loss.isfinite()
    assert e_hat.grad.isfinite().all()


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(3, 40))
def test_geometric_median_has_the_least_summed_distance(seed, d, n):
    x = random(seed, n, d) * torch.linspace(0.2, 3, d) + 5
    x[0] += 100  # an outlier, which drags the mean along

    def summed(point):
        return np.linalg.norm(x.double().numpy() - point, axis=1).sum()

    options = {"xatol": 1e-9, "fatol": 1e-9, "maxiter": 20_000, "maxfev": 20_000}
    start = x.double().median(0).values.numpy()
    best = minimize(summed, start, method="Nelder-Mead", options=options).fun
    found = geometric_median(x, iterations=1000, tolerance=1e-8)
    assert found.dtype == torch.float32
    assert summed(found.double().numpy()) <= best * (1 + 1e-4)
    assert summed(found.double().numpy()) < summed(x.double().mean(0).numpy())


def test_geometric_median_of_most_rows_at_one_point_is_that_point():
    x = torch.tensor([[1.0, 2.0]] * 5 + [[9.0, 9.0]] * 2)
    torch.testing.assert_close(geometric_median(x), torch.tensor([1.0, 2.0]), atol=1e-3, rtol=0)


def test_next_token_targets_by_hand():
    """BOS a b EOS | BOS c d, with document 7 and then 8; then a row that ends in padding."""
    ids = torch.tensor([[0, 5, 6, 1, 0, 8, 9], [0, 5, 0, 0, 0, 0, 0]])
    keep = torch.tensor([[0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0]]).bool()
    doc = torch.tensor([[7, 7, 7, 7, 8, 8, 8], [7, 7, -1, -1, -1, -1, -1]])
    targets, counts = next_token_targets(ids, keep, doc)
    assert targets[0, :-1].tolist() == [5, 6, 1, 0, 8, 9]
    assert counts.tolist() == [
        [True, True, False, False, True, True, False],
        [True, False, False, False, False, False, False],
    ]


def test_no_position_predicts_another_document_even_where_no_special_token_parts_them():
    ids = torch.tensor([[0, 5, 6, 7, 8]])
    keep = torch.tensor([[False, True, True, True, True]])
    doc = torch.tensor([[1, 1, 1, 2, 2]])
    assert next_token_targets(ids, keep, doc)[1].tolist() == [[True, True, False, True, False]]


def test_the_last_position_never_counts():
    """Rolled around, its target would be the first token, here real text of the same document."""
    ids = torch.tensor([[4, 5, 6]])
    counts = next_token_targets(ids, torch.ones(1, 3).bool(), torch.zeros(1, 3).long())[1]
    assert counts.tolist() == [[True, True, False]]


def test_cross_entropy_is_fp32_and_per_row():
    logits = random(0, 6, 11).bfloat16()
    targets = torch.arange(6)
    got = cross_entropy(logits, targets)
    assert got.dtype == torch.float32
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(got.numpy(), -np.log(p[np.arange(6), np.arange(6)]), rtol=1e-5)


def test_kl_divergence_is_scipys():
    log_p, log_q = F.log_softmax(random(0, 6, 11), -1), F.log_softmax(random(1, 6, 11), -1)
    want = rel_entr(log_p.double().exp().numpy(), log_q.double().exp().numpy()).sum(1)
    np.testing.assert_allclose(kl_divergence(log_p, log_q).numpy(), want, rtol=1e-4)
    assert not kl_divergence(log_p, log_p).any()
