"""The curves of every KAN head: against brute force, against autograd, and against its outputs."""

import pytest
import torch

from kanllama_lightning.functional.curves import line_residual
from kanllama_lightning.functional.sparse import Pattern
from kanllama_lightning.heads import (
    BatchTopK,
    BentDictionary,
    KANDirect,
    KANEncoder,
    KANReLUDense,
    MLPEncoder,
    OnlyKAN,
    SplineHidden,
    SplineInput,
    SplineLatent,
    TopK,
)
from kanllama_lightning.types import InputError, StepContext
from tests.heads.test_heads import D, M, rows, started, train_

KINDS = {
    KANEncoder: ["edge", "hidden unit", "input"],
    KANDirect: ["edge", "latent", "input"],
    SplineHidden: ["hidden unit"],
    SplineInput: ["input"],
    SplineLatent: ["latent"],
    OnlyKAN: ["edge", "latent", "input", "decoder latent"],
    BentDictionary: ["decoder latent"],
    KANReLUDense: ["edge", "hidden unit", "input", "decoder edge"],
}
LINES_AT_FIRST = [KANDirect, SplineInput, SplineLatent, OnlyKAN, BentDictionary]
DECODERS = [OnlyKAN, BentDictionary, KANReLUDense]
every_kan_head = pytest.mark.parametrize("kind", KINDS)
every_decoder = pytest.mark.parametrize("kind", DECODERS)


def bent(kind, **args):
    """A head that has learned something, its curves included."""
    head = started(kind, **args)
    train_(head, rows(256), 30, StepContext(torch.zeros(0, dtype=torch.int64), 0.5, 0.1), lr=3e-2)
    head.calibrate_(rows(500))
    return head


@every_kan_head
@pytest.mark.parametrize("training", [True, False])
def test_shapes_ranks_and_ranges(kind, training):
    head, x = bent(kind).train(training), rows(200, seed=3)
    found = head.curves(x, top=5)
    assert head.training is training
    assert [c.kind for c in found] == KINDS[kind]
    for c in found:
        n = len(c.names)
        assert 0 < n <= 5
        assert len(set(c.names)) == n
        assert c.points.shape == c.values.shape == c.density.shape == (n, 101)
        assert c.bend.shape == c.size.shape == c.out_of_grid.shape == (n,)
        assert all(t.isfinite().all() for t in c[3:9])
        assert not any(t.requires_grad for t in c[3:9])
        torch.testing.assert_close(c.density.sum(1), torch.ones(n))
        assert (c.points.diff(dim=1) >= 0).all()
        rank = c.size * c.bend.sqrt()
        assert rank[0] > 0
        assert (rank.diff() <= 1e-6).all()
        for share in (c.bend, c.out_of_grid, torch.tensor([c.mean_bend, c.mean_out_of_grid])):
            assert ((share >= 0) & (share <= 1)).all()
    again = head.curves(x, top=5)
    assert [c.names for c in again] == [c.names for c in found]


@pytest.mark.parametrize("kind", [TopK, BatchTopK, MLPEncoder])
def test_a_head_without_curves(kind):
    assert started(kind).curves(rows(20)) == []


@every_kan_head
def test_refused_arguments(kind):
    with pytest.raises(InputError, match="top=0"):
        started(kind).curves(rows(20), top=0)
    with pytest.raises(InputError, match=r"x=\[0, 8\]"):
        started(kind).curves(rows(0))


@pytest.mark.parametrize("kind", LINES_AT_FIRST)
def test_lines_at_the_start(kind):
    for c in started(kind).curves(rows(200)):
        assert c.bend.max() < 1e-9
        assert c.mean_bend < 1e-9
        assert c.size.max() > 0


@pytest.mark.parametrize("kind", [KANEncoder, SplineHidden])
def test_hidden_units_count_for_nothing_at_the_start(kind):
    for c in started(kind).curves(rows(200)):
        assert not c.size.any()
        assert not c.values.any()


def test_a_foreign_kan_layer_has_no_curves_that_we_know():
    head = started(KANEncoder, kan_class="torch.nn.Linear", kan_args={})
    assert head.curves(rows(20)) == []


def test_top_is_the_top_of_all():
    head, x = bent(KANDirect), rows(300)
    every = head.curves(x, top=10_000)
    assert [len(c.names) for c in every] == [D * M, M, D]
    for few, all_ in zip(head.curves(x, top=3), every, strict=True):
        assert few.names == all_.names[:3]
        torch.testing.assert_close(few.values, all_.values[:3])
        assert few.mean_bend == pytest.approx(all_.mean_bend)
    variance = [c.size.square() for c in every]
    shares = [((v * c.bend).sum() / v.sum()).item() for v, c in zip(variance, every, strict=True)]
    assert shares == pytest.approx([every[0].mean_bend] * 3, rel=1e-4)


def test_edges_of_a_kan_encoder_are_what_its_layer_adds_up():
    head, x = bent(KANEncoder), rows(300)
    z, gain = head.encoder.standardised(x * head.scale), head.encoder.U.norm(dim=1)
    edges, units, inputs = head.curves(x, top=10_000)
    parts = {}
    for i, name in enumerate(edges.names):
        _, source, _, _, target = name.split()
        parts[int(source), int(target)] = i
    assert len(parts) == D * D
    for (source, target), i in parts.items():
        y = head.encoder.units.kan.edge_curves(
            torch.tensor([target]), torch.tensor([source]), z[:, source]
        )
        size, bend, _ = line_residual(z[:, [source]], y.T * gain[target])
        assert edges.size[i].item() == pytest.approx(size.item(), rel=1e-4)
        assert edges.bend[i].item() == pytest.approx(bend.item(), rel=1e-3, abs=1e-7)
        at = edges.points[i]
        y = head.encoder.units.kan.edge_curves(torch.tensor([target]), torch.tensor([source]), at)[
            0
        ]
        torch.testing.assert_close(edges.values[i], y * gain[target], atol=1e-5, rtol=1e-4)
        outside = ((z[:, source] < -3) | (z[:, source] > 3)).float().mean()
        assert edges.out_of_grid[i] == outside
    for pool, axis in ((units, 1), (inputs, 0)):
        for i, name in enumerate(pool.names):
            words = name.split()
            own, most = int(words[1]), int(words[-1].rstrip(")"))
            mine = [e for key, e in parts.items() if key[axis] == own]
            assert pool.size[i].item() == pytest.approx(edges.size[mine].square().sum().sqrt())
            assert parts[(most, own) if axis else (own, most)] == min(mine)  # the first in rank
    assert edges.mean_out_of_grid == pytest.approx(((z < -3) | (z > 3)).float().mean().item())


def test_curves_of_hidden_units():
    head, x = bent(SplineHidden, d_hidden=6), rows(300)
    (c,) = head.curves(x)
    z = head.encoder.standardised(x * head.scale)
    h = head.encoder.units(z) * head.encoder.U.norm(dim=1)
    which = [int(name.split()[1]) for name in c.names]
    torch.testing.assert_close(c.size, h.std(0, correction=0)[which], rtol=1e-4, atol=1e-6)
    nearest = (c.points[0] - (z @ head.encoder.units.V)[:, which[0], None]).abs().argmin(1)
    inside = (nearest > 0) & (nearest < 100)
    off = (c.values[0][nearest] - h[:, which[0]])[inside].abs().max()
    assert off < 0.05 * c.values[0].abs().max()


def test_curves_of_inputs_hold_the_identity():
    head, x = bent(SplineInput), rows(300)
    (c,) = head.curves(x)
    which = [int(name.split()[1]) for name in c.names]
    [(branch, _)] = head.sums(x * head.scale).branches
    seen = (
        branch + head.b_dec - head.encoder.standardised.input_mean
    ) / head.encoder.standardised.input_std
    torch.testing.assert_close(c.size, seen.std(0, correction=0)[which], rtol=1e-4, atol=1e-5)
    assert ((c.values - c.points).abs().max(1).values > 0).all()
    torch.testing.assert_close(c.values, c.points, atol=2, rtol=1)


def test_curves_of_latents():
    head, x = bent(SplineLatent), rows(300)
    (c,) = head.curves(x)
    selection = head.eval().selection
    values, pattern = selection.kept(head.sums(x * head.scale))
    z = selection.activate(values, pattern)
    for i, name in enumerate(c.names):
        mine = pattern.latents == int(name.split()[1])
        size, bend, _ = line_residual(values[mine][:, None], z[mine][:, None])
        assert c.size[i].item() == pytest.approx(size.item(), rel=1e-3, abs=1e-6)
        assert c.bend[i].item() == pytest.approx(bend.item(), rel=1e-2, abs=1e-5)
        assert c.points[i, 0] == 0
        assert c.values[i, 0].abs() < 1e-6
    assert len(c.names) == len(pattern.latents.unique())


@pytest.mark.parametrize("kind", [SplineLatent, OnlyKAN, KANReLUDense])
def test_where_nothing_fires(kind):
    head = bent(kind)
    head.selection.threshold.fill_(1e9)
    kinds = [c.kind for c in head.curves(rows(30))]
    assert "decoder latent" not in kinds


def test_decoder_latents_are_judged_in_all_dimensions():
    head, x = bent(OnlyKAN).eval(), rows(300)
    c = head.curves(x, top=4)[-1]
    codes = head.encode(x)
    for i, name in enumerate(c.names):
        j = int(name.split()[1])
        z = codes[:, j][codes[:, j] > 0]
        made = head.decoder.curve(j, z)
        size, bend, _ = line_residual(z[:, None], made)
        total = size.square().sum()
        assert c.size[i].item() == pytest.approx(total.sqrt().item(), rel=1e-3)
        share = ((bend * size.square()).sum() / total).item()
        assert c.bend[i].item() == pytest.approx(share, rel=1e-2, abs=1e-6)
        assert c.points[i, 0] == 0
        assert c.values[i, 0].abs() < 1e-6
        assert c.values[i].norm() <= head.decoder.curve(j, c.points[i]).norm() * (1 + 1e-5)


# ------------------------------------------------------------- directions (METHODS B6)


def median(head, x):
    codes = head.encode(x)
    which = (codes > 0).any(0).nonzero().squeeze(1)
    at = torch.stack([codes[:, j][codes[:, j] > 0].median() for j in which])
    return which, at


@every_decoder
def test_secants_are_the_curves_over_their_activation(kind):
    head, x = bent(kind).eval(), rows(200)
    which, at = median(head, x)
    found = head.decoder.secant(which, at)
    for j, a, D_j in zip(which.tolist(), at, found, strict=True):
        torch.testing.assert_close(D_j, head.decoder.curve(j, a[None])[0] / a, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="positive"):
        head.decoder.secant(which, at * 0)


def test_a_line_is_a_direction_and_a_bent_curve_is_not():
    head = started(OnlyKAN).eval()
    which = torch.arange(M)
    torch.testing.assert_close(head.straightness(which, head.decoder.reach), torch.ones(M))
    secants = head.decoder.secant(which, head.decoder.reach)
    torch.testing.assert_close(
        secants / secants.norm(dim=1, keepdim=True), secants, atol=1e-4, rtol=0
    )
    mean, spread = head.decoder.mean_jacobian(head.encode(rows(500)), torch.arange(M))
    fires = mean[:, 0].isfinite()
    torch.testing.assert_close(mean[fires], secants[fires], atol=1e-4, rtol=1e-3)
    assert spread[fires].max() < 1e-6
    with torch.no_grad():  # turn the upper half of one curve into another direction
        head.decoder.psi[3, 4:] = head.decoder.psi[3, 4:].roll(1, dims=1)
    bent_straightness = head.straightness(which, head.decoder.reach)
    assert bent_straightness[3] < 0.995
    assert bent_straightness[:3].min() > 0.9999


@every_decoder
def test_straightness_in_blocks_is_the_same(kind, monkeypatch):
    head = bent(kind).eval()
    which, upto = median(head, rows(200))
    whole = head.straightness(which, upto)
    monkeypatch.setattr("kanllama_lightning.heads.decoders.CURVES_AT_ONCE", 3)
    torch.testing.assert_close(head.straightness(which, upto), whole, atol=1e-5, rtol=1e-5)
    assert ((whole > 0) & (whole <= 1 + 1e-6)).all()


@every_decoder
def test_tangents_are_autograds(kind):
    """Of the whole decoder, at codes in which other latents fire too."""
    head, x = bent(kind).eval(), rows(6)
    codes = head.encode(x)
    j = int((codes > 0).sum(0).argmax())
    fires = codes[codes[:, j] > 0]
    found = head.decoder.tangent(fires, j)
    for row, want in zip(fires, found, strict=True):
        flat = row.nonzero().squeeze(1)
        step = 1e-3 * row[j]

        def made(z, flat=flat):
            return head.decoder.kept(z[flat], Pattern(flat, 1, M))[0].detach()

        ahead, behind = row.clone(), row.clone()
        ahead[j] += step
        behind[j] -= step
        slope = (made(ahead) - made(behind)) / (2 * step)
        torch.testing.assert_close(want, slope, atol=2e-2 * slope.abs().max().item(), rtol=0)


@every_decoder
def test_mean_jacobian_and_its_dispersion(kind):
    head, x = bent(kind), rows(200)
    codes = head.encode(x)
    which = torch.arange(M)
    mean, spread = head.decoder.mean_jacobian(head.encode(x), which)
    for j in range(M):
        fires = codes[codes[:, j] > 0]
        if not len(fires):
            assert mean[j].isnan().all()
            assert spread[j].isnan()
            continue
        J = head.decoder.tangent(fires, j)
        torch.testing.assert_close(mean[j], J.mean(0), atol=1e-5, rtol=1e-4)
        want = (J - J.mean(0)).square().sum() / J.square().sum()
        assert spread[j].item() == pytest.approx(want.item(), rel=1e-3, abs=1e-6)
        assert 0 <= spread[j] <= 1
