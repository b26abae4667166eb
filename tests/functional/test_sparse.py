"""Selection against a brute-force sort, sparse decoding against the dense product."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kanllama_lightning.functional import sparse
from kanllama_lightning.functional.sparse import (
    Pattern,
    kept_products,
    largest_positive,
    sparse_decode,
)


def brute_force(values, count):
    """The `count` largest positive values by a stable sort: ties go to the lowest position."""
    flat = values.double().numpy().ravel()
    order = np.argsort(-flat, kind="stable")
    order = order[flat[order] > 0]
    return np.sort(order[:count])


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 9), st.integers(1, 70), st.booleans()
)
def test_is_the_brute_force_selection(seed, tok, d_sae, count, tied):
    values = random(seed, tok, d_sae)
    if tied:
        values = values.round()  # many equal ones, at the cut-off too
    positions, cutoff = largest_positive(values, count)
    want = brute_force(values, count)
    assert positions.tolist() == want.tolist()
    if (values > 0).sum() > count:
        assert cutoff == values.reshape(-1)[torch.from_numpy(want)].min()
    elif (values > 0).sum() < count:
        assert cutoff == 0


def test_by_hand():
    values = torch.tensor([[1.0, 3.0, -5.0], [2.0, 2.0, 0.0]])
    assert largest_positive(values, 2)[0].tolist() == [1, 3]  # of the equal twos the first
    assert largest_positive(values, 2)[1] == 2
    positions, cutoff = largest_positive(values, 6)
    assert positions.tolist() == [0, 1, 3, 4]
    assert cutoff == 0
    assert largest_positive(-values.abs(), 1)[0].tolist() == []


def test_cutoff_where_exactly_count_values_are_positive():
    assert largest_positive(torch.tensor([[1.0, 3.0, -5.0]]), 2)[1] == 1


@pytest.mark.parametrize("count", [1, 40, 900, 5_000, 40_000])
@pytest.mark.parametrize("kind", ["normal", "tied", "few positive", "one latent", "misleading"])
def test_large_inputs_too(count, kind):
    values = random(count, 130, 1021)
    assert values.numel() > sparse.SMALL
    if kind == "tied":
        values = (values * 4).round()
    elif kind == "few positive":
        values = torch.where(values > 3, values, -values.abs())
    elif kind == "one latent":
        values = torch.where(torch.arange(1021) == 3, values.abs(), -values.abs())
    elif kind == "misleading":  # what the sample sees is not what the rest is like
        values = values.reshape(-1)
        values[:: sparse.SAMPLE_STRIDE] += 10
        values = values.reshape(130, 1021)
    assert largest_positive(values, count)[0].tolist() == brute_force(values, count).tolist()


@given(
    st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 9), st.integers(1, 70), st.booleans()
)
def test_of_fixed_size_is_the_same_filled_up(seed, tok, d_sae, count, tied):
    """What a GPU does instead: it has the same positive values, ties included, and others."""
    values = random(seed, tok, d_sae)
    if tied:
        values = values.round()
    count = min(count, values.numel())
    positions, cutoff = sparse._largest_fixed(values, count)
    assert len(positions) == count
    assert (positions.diff() > 0).all()
    kept = positions[values.reshape(-1)[positions] > 0]
    assert kept.tolist() == brute_force(values, count).tolist()
    assert cutoff == values.reshape(-1)[positions].min().clamp_min(0)


@pytest.mark.parametrize("bad", [[0], [0, 3], list(range(6))])
def test_of_fixed_size_stays_inside_where_there_is_nan(bad):
    """An index beyond the end would end the process on a GPU, before anyone could say why."""
    values = torch.arange(6.0).view(2, 3)
    values.view(-1)[bad] = torch.nan
    positions, _ = sparse._largest_fixed(values, 4)
    assert len(positions) == 4
    assert ((positions >= 0) & (positions < 6)).all()


@pytest.mark.parametrize(("tok", "few"), [(20, False), (200, True)])
def test_large_inputs_are_sampled_first(tok, few, monkeypatch):
    """The tensor that is searched has few values where a sample could be taken."""
    searched = []
    topk = torch.Tensor.topk

    def spy(self, *args, **kwargs):
        searched.append(self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", spy)
    values = random(0, tok, 1021)
    largest_positive(values, 16 * tok)
    positive = int((values > 0).sum())
    assert (searched[-1] < positive / 10) == few
    assert len(searched) == 1 + few


def kept_at_random(seed, tok, d_sae):
    """Rows and latents without any, and none at all, too."""
    flat = (random(seed, tok, d_sae) > 0.3).reshape(-1).nonzero().squeeze(1)
    return Pattern(flat, tok, d_sae)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 8))
def test_decode_is_the_dense_product_with_all_gradients(seed, tok, d_sae):
    pattern = kept_at_random(seed, tok, d_sae)
    values = random(seed + 1, len(pattern.flat)).double().requires_grad_()
    dictionary = random(seed + 2, d_sae, 5).double().requires_grad_()
    seen_by = random(seed + 3, tok, 5).double()

    sparse_out = sparse_decode(values, pattern, dictionary)
    where = pattern.rows, pattern.latents
    dense = torch.zeros(tok, d_sae).double().index_put(where, values)
    torch.testing.assert_close(sparse_out, dense @ dictionary)
    got = torch.autograd.grad((sparse_out * seen_by).sum(), (values, dictionary))
    want = torch.autograd.grad((dense @ dictionary * seen_by).sum(), (values, dictionary))
    torch.testing.assert_close(got, want)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 8), st.booleans())
def test_kept_products_have_the_gradients_of_the_dense_ones(seed, tok, d_sae, transposed):
    pattern = kept_at_random(seed, tok, d_sae)
    shapes = [(d_sae,), (tok, 5), (5, d_sae), (tok, 3), (3, d_sae)]
    bias, *leaves = (
        random(seed + i, *shape).double().requires_grad_() for i, shape in enumerate(shapes)
    )
    branches = [
        (inputs, weights.T.contiguous().T if transposed else weights)
        for inputs, weights in (leaves[:2], leaves[2:])
    ]
    dense = sum(inputs @ weights for inputs, weights in branches) + bias
    want = dense.reshape(-1)[pattern.flat]
    kept = kept_products(want.detach(), pattern, bias, branches)
    assert torch.equal(kept, want)
    seen_by = random(seed + 9, len(want)).double()
    everything = [bias, *leaves]
    got = torch.autograd.grad((kept * seen_by).sum(), everything)
    torch.testing.assert_close(got, torch.autograd.grad((want * seen_by).sum(), everything))


def test_a_weight_stored_transposed_gets_its_gradient_in_the_same_layout():
    weights = torch.nn.Parameter(torch.randn(7, 5).T)
    pattern = Pattern(torch.tensor([1, 8]), 2, 7)
    kept_products(
        torch.ones(2), pattern, torch.zeros(7), [(torch.ones(2, 5), weights)]
    ).sum().backward()
    assert weights.grad.stride() == weights.stride() == (1, 5)


def test_gradients_that_are_not_wanted_are_not_made():
    x = torch.ones(2, 5)
    weights = torch.ones(5, 7, requires_grad=True)
    kept = kept_products(
        torch.ones(2), Pattern(torch.tensor([1, 8]), 2, 7), torch.zeros(7), [(x, weights)]
    )
    assert len(torch.autograd.grad(kept.sum(), weights)) == 1
    assert x.grad is None


def test_a_pattern_by_hand():
    pattern = Pattern(torch.tensor([1, 2, 7]), 3, 3)  # row 0: latents 1, 2; row 2: latent 1
    assert pattern.rows.tolist() == [0, 0, 2]
    assert pattern.latents.tolist() == [1, 2, 1]
    assert pattern.row_starts.tolist() == [0, 2, 2]
    assert pattern.latent_starts.tolist() == [0, 0, 2]
    order, rows = pattern.by_latent
    assert order.tolist() == [0, 2, 1]
    assert rows.tolist() == [0, 2, 0]


def test_decode_by_hand():
    pattern = Pattern(torch.tensor([0, 1, 5]), 4, 2)
    dictionary = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    out = sparse_decode(torch.tensor([3.0, 2.0, 4.0]), pattern, dictionary)
    assert out.tolist() == [[3.0, 20.0], [0.0, 0.0], [0.0, 40.0], [0.0, 0.0]]


def test_decode_in_another_number_format():
    """Under bf16 autocast values come in bf16; the dictionary stays fp32, and so does the sum."""
    pattern = Pattern(torch.zeros(1).long(), 1, 1)
    out = sparse_decode(torch.ones(1).bfloat16(), pattern, torch.ones(1, 2))
    assert out.dtype == torch.float32


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_read_beside_a_pass_are_in_its_gradient(in_place, monkeypatch):
    """Whoever adds them, and however often backward is asked for."""
    tok, d_sae, d = 6, 9, 4
    pattern = kept_at_random(0, tok, d_sae)
    dictionary = random(1, d_sae, d).requires_grad_()
    values, which = random(2, len(pattern.flat)).requires_grad_(), torch.tensor([7, 0, 4])
    to_rows = random(3, 3, d)
    with monkeypatch.context() as patch:
        if in_place:
            patch.setattr(sparse, "COUNTED_ON", ())
        made = sparse_decode(values, pattern, dictionary)
        rows = sparse.rows_of(dictionary, which, made)
        assert torch.equal(rows, dictionary[which])
        assert ("RowsOf" in rows.grad_fn.name()) == in_place
        loss = made.square().sum() + (rows * to_rows).sum()
        found = [torch.autograd.grad(loss, dictionary, retain_graph=True)[0] for _ in range(2)]
        alone = torch.autograd.grad((rows * to_rows).sum(), dictionary)[0]
    assert not sparse.ROWS_READ
    dense = torch.zeros(tok * d_sae).index_put((pattern.flat,), values.detach()).view(tok, d_sae)
    want = 2 * dense.T @ (dense @ dictionary.detach())
    want[which] += to_rows
    for got in found:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, torch.zeros(d_sae, d).index_put((which,), to_rows))


def test_rows_that_no_pass_takes_in_are_found(monkeypatch):
    """`HeadTrainer.clip_` stops then: their gradient would be lost."""
    monkeypatch.setattr(sparse, "COUNTED_ON", ())
    weight = random(0, 3, 2).requires_grad_()
    after = (weight * 2).sum(1)
    sparse.rows_of(weight, torch.tensor([1]), after).sum().backward()
    assert sparse.ROWS_READ.pop(weight)
