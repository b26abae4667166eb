"""Dictionaries that bend: against plain sums, and on activations that do bend."""

import numpy as np
import pytest
import torch

from kanllama_lightning.functional.splines import spline_bases
from kanllama_lightning.heads import BatchTopK, BentDictionary
from kanllama_lightning.types import InputError
from tests.heads.test_heads import D, K, M, rows, started, train_

SHAPES = ["spline", "hinges", "powers"]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def bent(shape="spline", **args):
    """A head whose latents bend, all of them differently."""
    head = started(BentDictionary, shape=shape, **args)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        head.decoder.bend.copy_(torch.randn(head.decoder.bend.shape, generator=generator))
    return head


def curve(shape, u, coefficients, grid_size=5):
    """g(u), written down once more, in numpy."""
    inside, beyond = min(u, 1.0), max(u - 1, 0.0)
    if shape == "powers":
        return sum(c * (inside**n + n * beyond) for n, c in zip((2, 3), coefficients, strict=True))
    order = 3 if shape == "spline" else 1
    bases = spline_bases(
        torch.tensor([[u], [0.0]]).double(), 0, 1, grid_size, order, linear_tails=True
    ).squeeze(2)
    return float((bases[0] - bases[1]) @ torch.as_tensor(coefficients).double())


@every_shape
def test_what_a_latent_writes_is_a_line_and_a_bend(shape):
    head, x = bent(shape).eval(), rows(40)
    out, d = head(x), head.decoder
    codes = out.codes.dense()
    for t in range(0, 40, 7):
        written = head.b_dec.detach().double().clone()
        for j in codes[t].nonzero().squeeze(1).tolist():
            z, R = codes[t, j].item(), d.reach[j].item()
            g = curve(shape, z / R, d.bend[j].detach().double().numpy())
            written += z * d.W_dec[j].detach().double() + R * g * d.W_bend[j].detach().double()
        torch.testing.assert_close(
            (out.x_hat[t] * head.scale).double(), written, rtol=1e-4, atol=1e-5
        )


@every_shape
def test_a_curve_starts_at_0_and_is_straight_beyond_its_reach(shape):
    d = bent(shape).decoder
    own = torch.zeros(4, dtype=torch.int64)
    assert d.bends(torch.zeros(4), own).abs().max() == 0
    far = d.bends(torch.tensor([1.0, 1.5, 2.0, 2.5]).double(), own)
    assert (far.diff().diff().abs() <= 1e-6 * far.abs().max()).all()
    near = d.bends(torch.tensor([0.0, 0.3, 0.6, 0.9]), own)
    assert near.diff().diff().abs().max() > 1e-2


@every_shape
def test_it_starts_as_the_linear_head(shape):
    head, twin = started(BentDictionary, shape=shape).eval(), started(BatchTopK).eval()
    x = rows(60)
    assert torch.equal(head(x).x_hat, twin(x).x_hat)


@every_shape
def test_rows_keep_their_norm_and_bends_are_trained(shape):
    head = started(BentDictionary, shape=shape)
    train_(head, rows(400), steps=20)
    for weight in (head.decoder.W_dec, head.decoder.W_bend):
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(M), rtol=1e-5, atol=0)
    assert head.decoder.bend.abs().max() > 1e-3


def test_it_costs_a_second_row_and_a_few_coefficients():
    have = sum(p.numel() for p in BentDictionary(d_model=D, d_sae=M, target_l0=K).parameters())
    flat = sum(p.numel() for p in BatchTopK(d_model=D, d_sae=M, target_l0=K).parameters())
    assert have - flat == M * (D + 8)


def parabola(n):
    """Rows along one parabola z u + 2 z^2 v, z from 0 to 1, off the origin."""
    u, v, origin = torch.randn(3, D, generator=torch.Generator().manual_seed(9))
    z = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    return origin + z * u + 2 * z.square() * v


@every_shape
def test_it_follows_what_bends(shape):
    """One number per row is enough for a parabola; a direction leaves what is across it."""
    x, left = parabola(1000), {}
    for kind, args in ((BatchTopK, {}), (BentDictionary, {"shape": shape})):
        head = kind(d_model=D, d_sae=1, target_l0=1, seed=0, **args)
        head.start_(x)
        train_(head, x, steps=800, lr=1e-2)
        e = (head.train()(x).x_hat - x).detach()
        left[kind] = float(e.square().sum() / (x - x.mean(0)).square().sum())
    assert left[BentDictionary] < 0.3 * left[BatchTopK]


@pytest.mark.parametrize(
    ("given", "said"),
    [({"grid_size": 0}, "grid_size=0"), ({"shape": "waves"}, "shape='waves'")],
)
def test_what_it_cannot_be_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        BentDictionary(d_model=D, d_sae=M, target_l0=K, **given)


def test_hinges_of_two_cells_are_a_second_direction_above_half_the_reach():
    d = bent("hinges", grid_size=2).decoder
    u = torch.linspace(0, 1, 9)
    found = d.bends(u, torch.zeros(9, dtype=torch.int64)).detach().numpy()
    below, above = np.diff(found[:5]), np.diff(found[4:])
    assert np.ptp(below) < 1e-6
    assert np.ptp(above) < 1e-6
    assert abs(below[0] - above[0]) > 1e-3
