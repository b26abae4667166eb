"""Matching of latents and facts, against scikit-learn and by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_fscore_support, roc_auc_score
from torch import Tensor

from kanllama_lightning.functional.matching import (
    Columns,
    dense_columns,
    judge,
    match,
    sparse_columns,
)


def columns_of(dense: Tensor) -> Columns:
    rows, latents = dense.nonzero(as_tuple=True)
    return sparse_columns(dense[rows, latents], rows, latents, *dense.shape)


def case(seed: int, signed: bool = False, n: int = 50) -> tuple[Tensor, Tensor]:
    """Latents with many ties and facts, the last two dead, constant or alike."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randint(-4 if signed else 0, 4, (n, 7), generator=g) / 4
    latents *= torch.rand(n, 7, generator=g) < 0.5
    latents[:, 5], latents[:, 6] = 0, 0.5
    facts = torch.rand(n, 6, generator=g) < torch.rand(6, generator=g)
    facts[:, 4], facts[:, 5] = False, True
    return latents, facts


def best_by_trying(values: Tensor, fact: Tensor, floor: float) -> tuple[float, float]:
    """F1 and largest threshold by trying all of them with scikit-learn."""
    tried = [(0.0, math.inf)]
    for t in sorted({v for v in values.tolist() if v > floor}, reverse=True):
        score = f1_score(fact.numpy(), (values >= t).numpy(), zero_division=0)
        if score > tried[-1][0] + 1e-12:
            tried.append((float(score), t))
    return tried[-1]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_every_pair_against_scikit_learn(seed: int, signed: bool, dense: bool) -> None:
    latents, facts = case(seed, signed)
    found = match(dense_columns(latents) if dense else columns_of(latents), facts)
    for f in range(facts.shape[1]):
        for j in range(latents.shape[1]):
            values, fact = latents[:, j], facts[:, f]
            score, threshold = best_by_trying(values, fact, -math.inf if dense else 0.0)
            assert found.f1[f, j] == pytest.approx(score, abs=1e-12)
            assert found.threshold[f, j] == threshold
            assert found.hits[f, j] == (fact & (values > 0)).sum()
            if fact.any() and not fact.all():
                auroc = roc_auc_score(fact.numpy(), values.numpy())
                assert found.auroc[f, j] == pytest.approx(auroc, abs=1e-12)
            else:
                assert found.auroc[f, j].isnan()


@pytest.mark.parametrize("dense", [False, True])
def test_choice_is_judged_on_other_tokens_as_by_scikit_learn(dense: bool) -> None:
    make = dense_columns if dense else columns_of
    (latents, facts), (other, holds) = case(3, dense), case(4, dense)
    found = match(make(latents), facts)
    best = found.f1.max(1).indices
    threshold = found.threshold.gather(1, best[:, None]).squeeze(1)
    got = judge(make(other), holds, best, threshold)
    for f in range(facts.shape[1]):
        fact, values = holds[:, f].numpy(), other[:, best[f]]
        precision, recall, f1, _ = precision_recall_fscore_support(
            fact, (values >= threshold[f]).numpy(), average="binary", zero_division=0
        )
        assert got.precision[f] == pytest.approx(precision, abs=1e-12)
        assert got.recall[f] == pytest.approx(recall, abs=1e-12)
        assert got.f1[f] == pytest.approx(f1, abs=1e-12)
        if fact.any() and not fact.all():
            assert got.auroc[f] == pytest.approx(roc_auc_score(fact, values.numpy()), abs=1e-12)
        else:
            assert got.auroc[f].isnan()


def test_by_hand() -> None:
    """Three of four tokens with the fact fire, at 3, 2 and 1; a token without it at 2."""
    values = torch.tensor([[3.0], [2], [2], [1], [0], [0]])
    fact = torch.tensor([[True], [True], [False], [True], [True], [False]])
    found = match(columns_of(values), fact)
    # from 1 on: 3 true of 4 said, 4 hold; from 2 on: 2 of 3; from 3 on: 1 of 1
    assert found.f1.item() == pytest.approx(2 * 3 / (4 + 4))
    assert found.threshold.item() == 1
    # 8 pairs: 3 beats 2, 0; 2 ties 2, beats 0; 1 beats 0; 0 ties 0
    assert found.auroc.item() == pytest.approx((2 + 1.5 + 1 + 0.5) / 8)


def test_largest_of_equally_good_thresholds() -> None:
    """Two of two said and four of six said: F1 0.5 both; the first says less."""
    values = torch.tensor([6.0, 5, 4, 3, 2, 1])[:, None]
    fact = torch.tensor([True, False, False, True, False, False])[:, None]
    found = match(dense_columns(values), fact)
    assert found.f1.item() == pytest.approx(2 * 1 / (1 + 2))
    assert found.threshold.item() == 6


def test_zeros_are_no_threshold_for_sparse_codes() -> None:
    """A fact that holds everywhere: a sparse latent may not claim its zeros, a dense one may."""
    values = torch.tensor([[1.0], [0], [0], [0]])
    fact = torch.ones(4, 1, dtype=torch.bool)
    assert match(columns_of(values), fact).f1.item() == pytest.approx(2 / 5)
    assert match(dense_columns(values), fact).f1.item() == 1


def test_listed_zeros_are_as_if_not_listed() -> None:
    latents, facts = case(5)
    rows, columns = torch.ones_like(latents).nonzero(as_tuple=True)
    listed = sparse_columns(latents.reshape(-1), rows, columns, *latents.shape)
    for a, b in zip(match(listed, facts), match(columns_of(latents), facts), strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


@pytest.mark.parametrize("dense", [False, True])
def test_nothing_fires(dense: bool) -> None:
    make = dense_columns if dense else columns_of
    facts = torch.tensor([[True], [False], [True]])
    found = match(make(torch.zeros(3, 2)), facts)
    assert found.f1.tolist() == [[0.8, 0.8] if dense else [0, 0]]
    assert found.threshold.tolist() == [[0, 0] if dense else [math.inf, math.inf]]
    assert found.auroc.tolist() == [[0.5, 0.5]]
    judged = judge(
        columns_of(torch.zeros(3, 2)), facts, torch.tensor([1]), torch.tensor([torch.inf])
    )
    assert [t.item() for t in judged] == [0, 0, 0, 0.5]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 400), st.booleans())
def test_blocks_change_nothing(seed: int, block: int, dense: bool) -> None:
    latents, facts = case(seed, signed=dense, n=20)
    columns = dense_columns(latents) if dense else columns_of(latents)
    for a, b in zip(match(columns, facts, block), match(columns, facts), strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def test_no_pairs_at_all() -> None:
    """No token with a fact; no latent that fires."""
    found = match(columns_of(torch.zeros(4, 3)), torch.zeros(4, 2, dtype=torch.bool))
    assert found.f1.shape == (2, 3)
    assert not found.f1.any()


def test_no_facts_at_all() -> None:
    found = match(columns_of(torch.ones(4, 3)), torch.zeros(4, 0, dtype=torch.bool))
    assert all(table.shape == (0, 3) for table in found)
