"""PCA against NumPy's SVD."""

import numpy as np
import pytest
import torch

from kanllama_lightning.heads import PCA, SAEHead
from kanllama_lightning.measures.metrics import ReconstructionMetric
from kanllama_lightning.types import InputError

D = 6


def rows(n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, D, generator=g) * torch.linspace(0.3, 4, D)
    return mixed @ torch.linalg.qr(torch.randn(D, D, generator=g))[0] + 5


def ev(x, x_hat):
    metric = ReconstructionMetric(D)
    metric.update(x, x_hat)
    return metric.compute()["ev"]


@pytest.fixture(params=[1, 3, D])
def pca(request):
    head = PCA(D, request.param)
    head.start_(rows())
    return head


def test_is_the_truncated_svd(pca):
    x = rows().double().numpy()
    mean = x.mean(0)
    _, _, v = np.linalg.svd(x - mean, full_matrices=False)
    v = v[: pca.d_sae]
    np.testing.assert_allclose(pca(rows()).x_hat, (x - mean) @ v.T @ v + mean, atol=1e-4)
    signs = np.sign((pca.components.numpy() * v).sum(1, keepdims=True))
    np.testing.assert_allclose(pca.components.numpy(), v * signs, atol=1e-4)


def test_explained_variance_is_that_of_the_singular_values(pca):
    x = rows().double().numpy()
    s = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    assert ev(rows(), pca(rows()).x_hat) == pytest.approx(s[: pca.d_sae].sum() / s.sum(), abs=1e-6)


def test_no_other_projection_of_the_same_rank_explains_more(pca):
    x = rows()
    best = ev(x, pca(x).x_hat)
    g = torch.Generator().manual_seed(1)
    for step in (1.0, 0.1, 0.01):
        for _ in range(10):
            tilted = pca.components.T + step * torch.randn(D, pca.d_sae, generator=g)
            q = torch.linalg.qr(tilted)[0]
            assert ev(x, (x - x.mean(0)) @ q @ q.T + x.mean(0)) <= best + 1e-6


def test_codes_are_all_the_coordinates(pca):
    x = rows(7, seed=3)
    out = pca(x)
    assert out.codes.l0().tolist() == [pca.d_sae] * 7
    assert torch.equal(out.codes.dense(), pca.encode(x))
    torch.testing.assert_close(out.x_hat, pca.decode(pca.encode(x)))
    assert (pca.encode(x) < 0).any()
    if pca.d_sae == D:
        torch.testing.assert_close(out.x_hat, x, atol=1e-4, rtol=0)


def test_saved_and_loaded(pca, tmp_path):
    pca.save(tmp_path)
    loaded = SAEHead.load(tmp_path)
    assert torch.equal(loaded(rows()).x_hat, pca(rows()).x_hat)
    assert pca.n_parameters() == 0


def test_refuses_more_components_than_coordinates():
    with pytest.raises(InputError, match=r"head\.d_sae=7: PCA has at most d_model=6"):
        PCA(D, D + 1)
