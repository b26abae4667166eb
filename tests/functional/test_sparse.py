"""Selection against a brute-force sort, sparse decoding against the dense product."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kanllama_lightning.functional import sparse
from kanllama_lightning.functional.sparse import largest_positive, sparse_decode


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


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 8))
def test_decode_is_the_dense_product_with_all_gradients(seed, tok, d_sae):
    kept = (random(seed, tok, d_sae) > 0.3).nonzero()  # rows without any, and none at all, too
    rows, latents = kept.unbind(1)
    values = random(seed + 1, len(rows)).double().requires_grad_()
    dictionary = random(seed + 2, d_sae, 5).double().requires_grad_()
    seen_by = random(seed + 3, tok, 5).double()

    sparse_out = sparse_decode(values, rows, latents, dictionary, tok)
    dense = torch.zeros(tok, d_sae).double().index_put((rows, latents), values)
    torch.testing.assert_close(sparse_out, dense @ dictionary)
    got = torch.autograd.grad((sparse_out * seen_by).sum(), (values, dictionary))
    want = torch.autograd.grad((dense @ dictionary * seen_by).sum(), (values, dictionary))
    torch.testing.assert_close(got, want)


def test_decode_by_hand():
    rows, latents = torch.tensor([0, 0, 2]), torch.tensor([1, 0, 1])
    dictionary = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    out = sparse_decode(torch.tensor([2.0, 3.0, 4.0]), rows, latents, dictionary, 4)
    assert out.tolist() == [[3.0, 20.0], [0.0, 0.0], [0.0, 40.0], [0.0, 0.0]]


def test_decode_in_another_number_format():
    """Under bf16 autocast values come in bf16; the dictionary stays fp32, and so does the sum."""
    out = sparse_decode(
        torch.ones(1).bfloat16(), torch.zeros(1).long(), torch.zeros(1).long(), torch.ones(1, 2), 1
    )
    assert out.dtype == torch.float32
