"""Neighbours against NumPy on whole matrices, whichever way they are counted."""

import numpy as np
import pytest
import torch

from kanllama_lightning.functional import cofiring
from kanllama_lightning.functional.cofiring import neighbours
from kanllama_lightning.functional.sparse import SparseCodes

N, D = 600, 30


def codes_of(z):
    rows, latents = z.nonzero(as_tuple=True)
    return SparseCodes(z[rows, latents], rows, latents, *z.shape)


def drawn(density, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(N, D, generator=g) * (torch.rand(N, D, generator=g) < density)
    z[:, 3] = 2 * z[:, 2] * (torch.rand(N, generator=g) < 0.9)  # a close neighbour
    z[:, 7] = 0  # dead
    z[:, 8] = -z[:, 9]  # signed codes exist
    return z


@pytest.mark.parametrize("density", [0.03, 0.6])
@pytest.mark.parametrize("cells", [1, 200, 1 << 22])
def test_against_numpy(monkeypatch, density, cells):
    monkeypatch.setattr(cofiring, "CELLS", cells)
    z = drawn(density)
    found = neighbours(*codes_of(z), top=4, least=5)
    on = (z != 0).double().numpy()
    joint = on.T @ on
    either = on.sum(0)[:, None] + on.sum(0) - joint
    jaccard = np.where(joint >= 5, joint / np.maximum(either, 1), -1)
    np.fill_diagonal(jaccard, -1)
    with np.errstate(invalid="ignore"):
        pearson = np.corrcoef(z.double().numpy().T)
    best = -np.sort(-jaccard, axis=1)[:, :4]
    np.testing.assert_allclose(found.jaccard, np.maximum(best, 0), rtol=1e-12)
    listed = 0
    for i in range(D):
        for j, jac, both, r in zip(*(t[i].tolist() for t in found), strict=True):
            if j < 0:
                assert jac == both == r == 0
                continue
            listed += 1
            assert (jaccard[i, j], joint[i, j]) == (jac, both)
            np.testing.assert_allclose(r, pearson[i, j], atol=1e-12)
    assert listed == (best >= 0).sum() > 0
    assert found.latent[2, 0] == 3
    assert found.latent[7].tolist() == [-1] * 4
    assert float(found.pearson[8][found.latent[8] == 9]) == pytest.approx(-1)


def test_edges():
    none = neighbours(*codes_of(torch.zeros(0, 3)))
    assert none.latent.tolist() == [[-1, -1]] * 3
    assert neighbours(*codes_of(torch.ones(4, 1))).latent.shape == (1, 0)
