"""Readings, bends and straightness against curves that are known, and against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kanllama_lightning.functional.curves import (
    POINTS,
    along_first,
    densities,
    edge_bends,
    kept_covariances,
    line_residual,
    plane_covariances,
    pooled,
    ranked,
    reading,
    secant,
    straightness,
)
from kanllama_lightning.functional.splines import kan_planes

PLANTED = {
    "linear": lambda x: 0.3 - 2 * x,
    "quadratic": lambda x: x.square() - 0.4 * x,
    "hinge": lambda x: (x - 0.37).relu() * 1.7 + 0.2,
    "saturating": lambda x: -3 * torch.tanh((x - 0.2) / 0.45),
    "bump": lambda x: 5 + (-((x + 0.4) / 0.5).square() / 2).exp(),
}


def grid(n=4000, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    points, density = densities([x])
    return points[0], density[0]


@pytest.mark.parametrize("family", PLANTED)
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_planted_curve_is_read(family, noise):
    x, density = grid()
    y = PLANTED[family](x)
    y = y + noise * y.std() * torch.randn(len(x), generator=torch.Generator().manual_seed(1))
    name, r2 = reading(x, y, density)
    assert name == family
    assert r2 == pytest.approx(1, abs=1e-3 + 10 * noise**2)
    assert r2 <= 1 + 1e-12


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(PLANTED)),
    st.floats(-1e3, 1e3),
    st.floats(0.01, 100),
    st.sampled_from([-1, 1]),
    st.floats(1e-3, 1e3),
)
def test_units_do_not_change_a_reading(family, offset, size, sign, unit):
    x, density = (a.double() for a in grid())
    y = PLANTED[family](x)
    name, r2 = reading(unit * x + offset, sign * size * y + offset, density)
    assert name == family
    assert r2 == pytest.approx(reading(x, y, density)[1], abs=1e-4)


def test_what_fits_no_family_is_none():
    x, density = grid()
    name, r2 = reading(x, torch.sin(6 * x), density)
    assert name == "none"
    assert 0 < r2 < 0.9


def test_a_line_is_no_richer_family():
    """Every family holds lines, or nearly: the simplest is named."""
    x, density = grid()
    assert reading(x, 2 * x, density) == ("linear", pytest.approx(1))
    assert reading(x, torch.full_like(x, 3.3), density) == ("linear", 1.0)
    assert reading(torch.zeros(POINTS), x, density) == ("linear", 1.0)


def test_half_a_bump_is_no_bump():
    x, density = grid()
    half = (-((x - x[-1]) / 2).square() / 2).exp()
    assert reading(x, half, density)[0] != "bump"
    assert reading(x, torch.nn.functional.silu(-x), density)[0] != "bump"


def test_where_no_data_is_a_curve_may_do_anything():
    x, density = grid()
    far = (x > 2).float()
    assert reading(x, x + 100 * far, density * (1 - far))[0] == "linear"


def test_densities():
    points, density = densities([torch.tensor([0.0, 1, 1, 4])] * 2, n=5)
    assert density.sum(1).tolist() == [1, 1]
    assert density[0].tolist() == [0.25, 0.5, 0, 0, 0.25]
    assert points[0].tolist() == pytest.approx([0, 1, 2, 3, 4], abs=0.02)
    from_zero = densities([torch.tensor([2.0, 2.0])], start=0.0, n=3)
    assert from_zero[0].tolist() == [[0, 1, 2]]
    assert from_zero[1].tolist() == [[0, 0, 1]]


def test_line_residual():
    x = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0)).double()
    y = torch.cat([3 * x + 1, x.square(), x + x.square(), torch.ones_like(x)], dim=1)
    size, bend, slope = line_residual(x, y)
    assert size.tolist() == pytest.approx(y.std(0, correction=0).tolist())
    assert slope[0].item() == pytest.approx(3)
    explained = [torch.corrcoef(torch.stack([x[:, 0], y[:, i]]))[0, 1] ** 2 for i in range(3)]
    assert bend[:3].tolist() == pytest.approx([1 - e.item() for e in explained], abs=1e-9)
    assert (size[3], bend[3]) == (0, 0)


def features(x):
    return kan_planes(x, -1.0, 1.0, 5, linear_tails=True)


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
def test_edge_bends_are_those_of_every_edge_by_itself(monkeypatch, block):
    monkeypatch.setattr("kanllama_lightning.functional.curves.BLOCK", block)
    own = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=own)
    x[:, 3] = 0.5  # an input that never changes
    weight = torch.randn(6, 9, 4, generator=own)
    size, bend = edge_bends(weight, plane_covariances(features, x))
    curves = torch.einsum("tpi,opi->toi", features(x.double()), weight.double())
    for o in range(6):
        want = line_residual(x, curves[:, o])
        torch.testing.assert_close(size[o], want[0].float(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(bend[o, :3], want[1][:3].float(), atol=1e-6, rtol=1e-5)
    assert size[:, 3].max() < 1e-6
    assert ((bend >= 0) & (bend <= 1)).all()


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_kept_covariances_are_those_of_each_latents_own_values(monkeypatch, block):
    monkeypatch.setattr("kanllama_lightning.functional.curves.BLOCK", block)
    own = torch.Generator().manual_seed(0)
    values, latents = torch.rand(400, generator=own), torch.randint(0, 3, (400,), generator=own)
    planes = features(values[:, None]).squeeze(2)
    every, bent = kept_covariances(values, planes, latents, 4)
    for j in range(3):
        some = latents == j
        want = plane_covariances(features, values[some][:, None])
        torch.testing.assert_close(every[j], want[0][0], atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(bent[j], want[1][0], atol=1e-7, rtol=1e-5)
    assert not every[3].any()
    assert not bent[3].any()


def test_ranks_and_pools():
    size, bend = torch.tensor([1.0, 10, 3]), torch.tensor([1.0, 0.0001, 0.25])
    assert ranked(size, bend, 2).tolist() == [2, 0]  # 1.5 and 1 off their lines; 0.1 the other
    assert len(ranked(size, bend, 10)) == 3
    joint = pooled(size, bend)
    assert joint[0].item() == pytest.approx(math.sqrt(110))
    assert joint[1].item() == pytest.approx((1 + 0.01 + 2.25) / 110)
    assert pooled(torch.zeros(3), bend)[1] == 0
    torch.testing.assert_close(pooled(size[None], bend[None], 0)[1], bend)


def test_straightness():
    t = torch.linspace(0, 1, 32)
    line = t[:, None] * torch.tensor([1.0, -2.0, 0.5])
    corner = torch.stack([(2 * t).clamp_max(1), (2 * t - 1).clamp_min(0)], dim=1)
    pad = torch.nn.functional.pad(corner, (0, 1))
    found = straightness(torch.stack([line, pad, torch.zeros(32, 3)]))
    assert found[0].item() == pytest.approx(1)
    assert 0.5 < found[1] < 0.95
    assert found[2] == 1
    singular = torch.linalg.svdvals(corner)
    assert found[1].item() == pytest.approx((singular[0] ** 2 / (singular**2).sum()).item())


def test_a_line_looks_like_itself_along_its_direction():
    t = torch.linspace(0, 2, 20)
    line = t[:, None] * torch.tensor([0.6, -0.8])
    torch.testing.assert_close(along_first(line), t)


def test_secant():
    at = torch.tensor([2.0, 4.0])
    f = torch.tensor([[4.0, 2], [16, 4]])
    assert secant(f, at).tolist() == [[2, 1], [4, 1]]
