"""Standard, Gated, JumpReLU: their formulas by hand and dense, and the control of their L0."""

import itertools
import logging
import math

import pytest
import torch

from kanllama_lightning.functional.losses import geometric_median
from kanllama_lightning.heads import controller as control
from kanllama_lightning.heads import penalties
from kanllama_lightning.heads.controller import SparsityController
from kanllama_lightning.heads.gated import Gated
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.heads.jump_relu import JumpReLU
from kanllama_lightning.heads.penalties import SHARPNESS
from kanllama_lightning.heads.standard import Standard
from kanllama_lightning.training.optim import Adam
from kanllama_lightning.types import DenseCodes, InputError, StepContext
from tests.conftest import rest_slow

D, M, K = 8, 24, 3
HEADS = [Standard, Gated, JumpReLU]
FREE = [Standard, JumpReLU]
NONE = torch.zeros(0, dtype=torch.int64)
NOTHING_DEAD = StepContext(NONE, 0.5, 0.1)

every_head = pytest.mark.parametrize("kind", HEADS)
free_norms = pytest.mark.parametrize("kind", FREE)


def rows(n=64, seed=0, d=D):
    """Raw activations, off the origin, of unlike spread per coordinate."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.5, 2, d) * 3 + 1


def started(kind, **args):
    head = kind(**({"d_model": D, "d_sae": M, "target_l0": K} | args))
    head.start_(rows(500, seed=99))
    return head


def train_(head, x, steps, context=NOTHING_DEAD, lr=1e-2):
    """Steps in the order of the module: the controller moves before the gradients are made."""
    optimizer = Adam(head.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        out = head(x)
        loss = torch.stack(list(head.losses(x, out, context).values())).sum()
        head.observe_(out, context)
        loss.backward()
        head.project_grad_()
        optimizer.step()
        head.project_()


def trained(kind, **args):
    """A head whose every parameter and statistic is off its start."""
    head = started(kind, **args)
    train_(head, rows(), 6)
    with torch.no_grad():
        for name in ("r_mag", "b_mag"):
            if hasattr(head.selection, name):
                getattr(head.selection, name).add_(torch.linspace(-0.3, 0.4, M))
        if hasattr(head.selection, "theta"):
            head.selection.theta.add_(torch.linspace(0.0, 2.0, M))
    head.zero_grad()
    return head


# ------------------------------------------------------------------------ by hand


def by_hand(kind, unit):
    head = kind(d_model=2, d_sae=3, target_l0=1)
    with torch.no_grad():
        head.encoder.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]))
        head.decoder.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        if not unit:
            head.decoder.W_dec.mul_(torch.tensor([[2.0], [0.5], [1.0]]))
        head.encoder.b_enc.copy_(torch.tensor([0.0, 0.0, 0.5]))
        head.b_dec.copy_(torch.tensor([1.0, 1.0]))
        head.selection.controller.coefficient.fill_(2.0)
    return head


def values(losses):
    return {name: value.item() for name, value in losses.items()}


@pytest.mark.parametrize("training", [True, False])
def test_standard_by_hand(training):
    """b_dec is not taken off at the input; pre-activations 3 2 1.5 | 2 0 2.5 | -1 -1 0.5."""
    head = by_hand(Standard, unit=False).train(training)
    x = torch.tensor([[3.0, 2.0], [2.0, 0.0], [-1.0, -1.0]])
    out = head(x)
    # z times the norms 2, 0.5, 1
    want = torch.tensor([[6.0, 1.0, 1.5], [4.0, 0.0, 2.5], [0.0, 0.0, 0.5]])
    torch.testing.assert_close(out.codes.dense(), want)
    torch.testing.assert_close(out.x_hat, torch.tensor([[7.9, 3.2], [6.5, 3.0], [1.3, 1.4]]))
    torch.testing.assert_close(head.decode(want), out.x_hat)
    # squared errors 4.9^2 + 1.2^2, 4.5^2 + 3^2, 2.3^2 + 2.4^2; latents sum to 8.5, 6.5, 0.5
    want = {"reconstruction": 65.75 / 3, "l1": 2 * 15.5 / 3}
    assert values(head.losses(x, out, NOTHING_DEAD)) == pytest.approx(want)


@pytest.mark.parametrize("training", [True, False])
def test_gated_by_hand(training):
    """u = 3 2 1 | 2 0 2 | -1 -1 0; an open gate without magnitude and the reverse both occur."""
    head = by_hand(Gated, unit=True).train(training)
    with torch.no_grad():
        head.encoder.b_enc.copy_(torch.tensor([0.0, 0.5, -1.5]))  # pi 3 2.5 -0.5 | 2 0.5 0.5 | < 0
        head.selection.r_mag[0] = math.log(2)
        head.selection.b_mag.copy_(torch.tensor([0.0, -1.0, 1.0]))  # mag 6 1 2 | 4 -1 3 | -2 -2 1
    x = torch.tensor([[4.0, 3.0], [3.0, 1.0], [0.0, 0.0]])
    out = head(x)
    want = torch.tensor([[6.0, 1.0, 0.0], [4.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(out.codes.dense(), want)
    assert out.codes.l0().tolist() == [2, 2, 0]
    torch.testing.assert_close(out.x_hat, torch.tensor([[7.0, 2.0], [6.8, 3.4], [1.0, 1.0]]))
    # of ReLU(pi): reconstructions 4 3.5 | 3.3 1.9 | 1 1
    want = {"reconstruction": 32.2 / 3, "l1": 2 * 8.5 / 3, "gate_aux": 3.15 / 3}
    assert values(head.losses(x, out, NOTHING_DEAD)) == pytest.approx(want)


@pytest.mark.parametrize("training", [True, False])
def test_jump_relu_by_hand(training):
    """b_dec is taken off at the input; p = 3 2 1.5 | 2 0 2.5 | -1 -1 0.5."""
    head = by_hand(JumpReLU, unit=False).train(training)
    head.selection.pre_act_coefficient, head.alpha_aux = 7e-8, 0.0
    with torch.no_grad():
        head.selection.theta.copy_(torch.tensor([2.5, 1.0, 0.5]))  # the last p is not above it
    x = torch.tensor([[4.0, 3.0], [3.0, 1.0], [0.0, 0.0]])
    out = head(x)
    want = torch.tensor([[6.0, 1.0, 1.5], [0.0, 0.0, 2.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(out.codes.dense(), want)
    torch.testing.assert_close(out.x_hat, torch.tensor([[7.9, 3.2], [2.5, 3.0], [1.0, 1.0]]))
    counted = sum(math.tanh(SHARPNESS * f) for f in (6.0, 1.0, 1.5, 2.5))
    # theta - p, positive parts: 0 0.5 3.5 of the first latent, 0 1 2 of the second
    short = 4.0 * 2.0 + 3.0 * 0.5
    want = {"reconstruction": 21.5 / 3, "tanh": 2 * counted / 3, "pre_act": 7e-8 * short / 3}
    dead = torch.tensor([1, 0])
    got = values(head.losses(x, out, NOTHING_DEAD._replace(dead=dead)))
    assert got == pytest.approx(want)


# ------------------------------------------------------------------------- formulas


def naive(head, x, dead):
    """Loss terms as METHODS A1, A2, A5 write them, dense."""
    x_n, weight = x * head.scale, head.selection.controller.coefficient
    unit = head.x_variance.sqrt()
    inputs = x_n if isinstance(head, Standard) else x_n - head.b_dec
    p = inputs @ head.encoder.W_enc + head.encoder.b_enc
    norm = head.decoder.W_dec.square().sum(1).sqrt()
    terms = {}
    if isinstance(head, Standard):
        z = p * (p > 0)
        terms["l1"] = weight * (z * norm).sum() / len(x) / unit
    elif isinstance(head, Gated):
        u = inputs @ head.encoder.W_enc
        mag = u * head.selection.r_mag.exp() + head.selection.b_mag
        z = (p > 0).float() * torch.relu(mag)
        terms["l1"] = weight * torch.relu(p).sum() / len(x) / unit
        gate = torch.relu(p) @ head.decoder.W_dec.detach() + head.b_dec.detach()
        terms["gate_aux"] = (x_n - gate).square().sum() / len(x) / unit**2
    else:
        width = head.bandwidth * unit
        k = ((p - head.selection.theta).abs() < width / 2).float()
        slope = (k * head.selection.theta / width).detach()
        # values cancel, gradients are those of METHODS A5
        window = slope * ((p - p.detach()) - (head.selection.theta - head.selection.theta.detach()))
        z = p * (p > head.selection.theta) + window
        terms["tanh"] = weight * torch.tanh(SHARPNESS * z * norm / unit).sum() / len(x)
        if len(dead):
            short = torch.relu(head.selection.theta - p) * norm.detach()
            terms["pre_act"] = head.pre_act_coefficient * short[:, dead].sum() / len(x) / unit
    x_hat = z @ head.decoder.W_dec + head.b_dec
    terms["reconstruction"] = (x_n - x_hat).square().sum() / len(x) / unit**2
    if len(dead) and head.alpha_aux:
        target = (x_n - x_hat).detach()
        acts = p[:, dead]  # without a ReLU, which has no gradient where a latent is dead
        ranks = (acts * norm[dead]).argsort(dim=1, descending=True).argsort(dim=1)
        e_hat = (acts * (ranks < min(D // 2, len(dead)))) @ head.decoder.W_dec[dead]
        variance = (target - target.mean(0)).square().sum()
        terms["auxk"] = head.alpha_aux * (target - e_hat).square().sum() / variance
    return terms


@every_head
@pytest.mark.parametrize("n_dead", [0, 2, 11, M])
def test_all_gradients_are_those_of_the_formula(kind, n_dead):
    args = {"pre_act_coefficient": 0.7} if kind is JumpReLU else {}
    head = trained(kind, alpha_aux=2.0, **args)
    x = rows(40, seed=3)
    dead = torch.randperm(M, generator=torch.Generator().manual_seed(1))[:n_dead]
    got = head.losses(x, head(x), NOTHING_DEAD._replace(dead=dead))
    want = naive(head, x, dead)
    assert got.keys() == want.keys()
    parameters = dict(head.named_parameters())
    for term in want:
        torch.testing.assert_close(got[term], want[term], rtol=1e-5, atol=1e-6)
    a = torch.autograd.grad(sum(got.values()), list(parameters.values()))
    b = torch.autograd.grad(sum(want.values()), list(parameters.values()))
    for name, p, q in zip(parameters, a, b, strict=True):
        torch.testing.assert_close(
            p, q, rtol=1e-4, atol=1e-5 * q.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_reconstruction_comes_first():
    for kind in HEADS:
        head = started(kind)
        assert next(iter(head.losses(rows(), head(rows()), NOTHING_DEAD))) == "reconstruction"


def test_gates_loss_stops_at_the_dictionary():
    head = trained(Gated)
    x = rows()
    head.losses(x, head(x), NOTHING_DEAD)["gate_aux"].backward()
    assert head.decoder.W_dec.grad is None
    assert head.selection.r_mag.grad is None
    assert head.selection.b_mag.grad is None
    assert head.encoder.W_enc.grad.any()
    assert head.encoder.b_enc.grad.any()


def test_the_gate_learns_nothing_from_the_reconstruction():
    head = trained(Gated)
    x = rows()
    head.losses(x, head(x), NOTHING_DEAD)["reconstruction"].backward()
    assert head.encoder.b_enc.grad.abs().max() < 1e-6 * head.selection.b_mag.grad.abs().max()
    assert head.selection.r_mag.grad.any()
    assert head.selection.b_mag.grad.any()


def test_gated_losses_do_not_need_what_was_decoded():
    head = trained(Gated)
    x = rows()
    out = head(x)
    bare = out._replace(codes=DenseCodes(out.codes.dense()))
    a, b = head.losses(x, out, NOTHING_DEAD), head.losses(x, bare, NOTHING_DEAD)
    assert values(a) == pytest.approx(values(b))


# -------------------------------------------------------------------------- the units


@free_norms
def test_norms_are_free_and_folded_away(kind):
    """W_dec rows times a, all that makes z divided by it: the same codes and the same loss."""
    head = trained(kind)
    x = rows()
    before = head(x)
    losses = values(head.losses(x, before, NOTHING_DEAD))
    a = torch.linspace(0.25, 4, M)
    with torch.no_grad():
        head.decoder.W_dec.mul_(a[:, None])
        head.encoder.W_enc.div_(a)
        head.encoder.b_enc.div_(a)
        if kind is JumpReLU:
            head.selection.theta.div_(a)
    after = head(x)
    torch.testing.assert_close(after.codes.dense(), before.codes.dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.x_hat, before.x_hat, atol=1e-4, rtol=1e-5)
    assert values(head.losses(x, after, NOTHING_DEAD)) == pytest.approx(losses, rel=1e-5)


@every_head
def test_without_the_scale(kind):
    """The folded head makes the same of raw activations (METHODS 0.1), its latents in raw units."""
    head = trained(kind).eval()
    folded, x = head.folded(), rows()
    assert head.scale != 1
    assert folded.scale == 1
    torch.testing.assert_close(folded(x).x_hat, head(x).x_hat, rtol=1e-4, atol=1e-4)
    want = head.encode(x) / head.scale
    torch.testing.assert_close(folded.encode(x), want, rtol=1e-4, atol=1e-4)


@free_norms
def test_reported_latents_are_lengths_along_unit_directions(kind):
    head = trained(kind).eval()
    latents = head.encode(rows())
    directions = head.decoder.W_dec / head.decoder.W_dec.norm(dim=1, keepdim=True)
    want = (latents @ directions + head.b_dec) / head.scale
    torch.testing.assert_close(head(rows()).x_hat, want)


@free_norms
def test_a_direction_of_no_length_is_no_number_and_no_error(kind):
    head = trained(kind)
    with torch.no_grad():
        head.decoder.W_dec[0] = 0
    out = head(rows())
    assert not out.codes.dense()[:, 0].any()
    torch.testing.assert_close(head.decode(out.codes.dense()), out.x_hat)
    sum(head.losses(rows(), out, NOTHING_DEAD).values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


@free_norms
def test_nothing_is_projected(kind):
    head = trained(kind)
    assert head.decoder.W_dec.norm(dim=1).std() > 1e-4
    sum(head.losses(rows(), head(rows()), NOTHING_DEAD).values()).backward()
    weights, gradient = head.decoder.W_dec.detach().clone(), head.decoder.W_dec.grad.clone()
    head.project_grad_()
    head.project_()
    assert torch.equal(head.decoder.W_dec, weights)
    assert torch.equal(head.decoder.W_dec.grad, gradient)


def test_standard_takes_nothing_off_at_the_input():
    head = trained(Standard)
    before = head.encode(rows())
    with torch.no_grad():
        head.b_dec.add_(5.0)
    assert torch.equal(head.encode(rows()), before)


def test_thresholds_stay_above_zero_and_come_back_from_there():
    head = started(JumpReLU, theta_init=0.5)
    with torch.no_grad():
        head.selection.theta.copy_(torch.linspace(-1, 1, M))
    head.project_()
    least = 0.005 * head.x_variance.sqrt().item()
    torch.testing.assert_close(
        head.selection.theta.detach(), torch.linspace(-1, 1, M).clamp_min(least)
    )
    with torch.no_grad():
        head.selection.theta.fill_(least)
    train_(head, rows(256), 50)
    assert head.selection.theta.max() > 10 * least


# ------------------------------------------------------------------------ the start


@every_head
def test_the_encoder_has_the_best_size_at_the_start(kind):
    head, x = started(kind, d_sae=64), rows(500, seed=99)

    def error(c):
        with torch.no_grad():
            p = head.pre_acts(x)
            if kind is JumpReLU:  # only what is above the threshold is scaled
                p = torch.where(
                    p > head.selection.theta,
                    head.selection.theta + c * (p - head.selection.theta),
                    p,
                )
            else:
                p = p * c
            return (
                (
                    (x * head.scale - head.b_dec)
                    - head.selection.first(p, head.decoder, head.x_variance)[0]
                )
                .square()
                .sum()
                .item()
            )

    assert error(1.0) < min(error(0.95), error(1.05))


@every_head
def test_b_dec_at_the_start(kind):
    head = started(kind)
    middle = geometric_median(rows(500, seed=99) * head.scale)
    want = torch.zeros(D) if kind is Standard else middle
    torch.testing.assert_close(head.b_dec.detach(), want)


@pytest.mark.parametrize(("limit", "share"), [(1e4, 0.5), (M / 4, 0.25), (M / 50, 0.02)])
def test_every_latent_fires_equally_often_at_the_start(limit, share, monkeypatch):
    monkeypatch.setattr("kanllama_lightning.heads.jump_relu.START_L0", limit)
    monkeypatch.setattr("kanllama_lightning.heads.jump_relu.LATENTS_AT_ONCE", 7)
    head = started(JumpReLU)
    fired = head(rows(500, seed=99)).codes.fired()
    assert (fired - share * 500).abs().max() <= 2


# ------------------------------------------------------------------------ dead latents


@pytest.mark.parametrize(("kind", "term"), [(kind, "auxk") for kind in HEADS])
def test_auxk_reaches_dead_latents_and_no_others(kind, term):
    """Though they have p <= -1 on every token, where a ReLU would let no gradient through."""
    head, x, dead = trained(kind), rows(), torch.tensor([1, 4])
    with torch.no_grad():
        head.encoder.b_enc[dead] -= head.pre_acts(x)[:, dead].max(0).values + 1
    head.zero_grad()
    head.losses(x, head(x), NOTHING_DEAD._replace(dead=dead))[term].backward()
    for per_latent in (head.encoder.W_enc.grad.abs().sum(0), head.decoder.W_dec.grad.abs().sum(1)):
        assert per_latent.nonzero().flatten().tolist() == [1, 4]


def test_the_pre_activation_loss_reaches_dead_latents_and_no_others():
    head = trained(JumpReLU, pre_act_coefficient=1e-6, alpha_aux=0.0)
    x, dead = rows(), torch.tensor([1, 4])
    with torch.no_grad():
        head.encoder.b_enc[dead] -= 100
    out = head(x)
    losses = head.losses(x, out, NOTHING_DEAD._replace(dead=dead))
    assert list(losses) == ["reconstruction", "tanh", "pre_act"]
    head.zero_grad()
    losses["pre_act"].backward()
    assert head.decoder.W_dec.grad is None  # else it would shrink them
    for g in (head.encoder.W_enc.grad.T, head.selection.theta.grad, head.encoder.b_enc.grad):
        assert g.reshape(M, -1).abs().sum(1).nonzero().flatten().tolist() == [1, 4]
    assert (head.selection.theta.grad[dead] > 0).all()  # the threshold comes down
    assert (head.encoder.b_enc.grad[dead] < 0).all()  # and the latent up


# ---------------------------------------------------------------------------- control

RATE = 1 / 20  # horizons of 20 steps
SOME = torch.tensor(1.0)


def plant(c, level, steepness, lag, steps=1200):
    """L0 = level * coefficient ** -steepness, answering with a lag; returns the L0 of all steps."""
    log_l0, found = math.log(level), []
    for step in range(steps):
        if c.coefficient > 0:
            settled = math.log(level) - steepness * math.log(c.coefficient.item())
            log_l0 += (min(settled, math.log(level) + 3) - log_l0) / lag
        found.append(math.exp(log_l0))
        c.update_(torch.tensor(found[-1]), SOME, step / steps, RATE)
    return found


PLANTS = list(itertools.product([0.5, 1.0, 1.5], [1, 20, 60], [4.0, 60.0, 300.0]))
"""Steepness; lag, up to three horizons; level."""
SOME_PLANTS = [PLANTS[i] for i in (0, 4, 8, 10, 14, 15, 20, 21, 25, 26)]
"""Any two of the values together, and all the largest."""


@pytest.mark.parametrize("planted", rest_slow(PLANTS, SOME_PLANTS), ids=str)
def test_l0_ends_at_its_target(planted):
    steepness, lag, level = planted
    c = SparsityController(1.0, 16, 0.05)
    found = plant(c, level, steepness, lag)
    assert found[-1] == pytest.approx(16, rel=0.03)
    assert max(found[-200:]) / min(found[-200:]) < 1.1  # and has come to rest


def test_reaction_is_monotone():
    """A larger L0, a larger coefficient, in every step."""
    found = []
    for l0 in (4.0, 12.0, 16.0, 20.0, 64.0):
        c = SparsityController(1.0, 16, 0.0)
        course = []
        for _ in range(30):
            c.update_(torch.tensor(l0), SOME, 0.3, RATE)
            course.append(c.coefficient.item())
        found.append(course)
    for low, high in zip(found, found[1:], strict=False):
        assert all(a <= b for a, b in zip(low, high, strict=True))
    assert found[2] == [1.0] * 30
    assert found[0] == sorted(found[0], reverse=True)
    assert found[-1] == sorted(found[-1])


@pytest.mark.parametrize(("l0", "bound"), [(500.0, 5e3), (0.0, 5e-3)])
def test_bounds_hold_and_nothing_winds_up(l0, bound):
    c = SparsityController(5.0, 16, 0.0)
    for _ in range(3000):
        c.update_(torch.tensor(l0), SOME, 0.3, RATE)
    assert c.coefficient.item() == pytest.approx(bound, rel=1e-4)
    assert c.stuck > 3
    opposite = torch.tensor(0.0 if l0 else 500.0)
    for _ in range(40):  # two horizons, of which the smoothing of L0 takes one or more
        c.update_(opposite, SOME, 0.3, RATE)
    c_after = c.coefficient.item()
    for _ in range(100):
        c.update_(opposite, SOME, 0.3, RATE)
    assert abs(math.log(c.coefficient.item() / bound)) > 0.3
    assert abs(math.log(c.coefficient.item() / bound)) > abs(math.log(c_after / bound))
    assert c.stuck == 0


def test_ramp():
    """The target falls geometrically from the first L0, the coefficient rises from 0."""
    c = SparsityController(3.0, 16, 0.1)
    assert c.coefficient == 0
    c.update_(torch.tensor(256.0), SOME, 0.0, RATE)
    assert c.coefficient == 0
    assert [c.target(p).item() for p in (0.0, 0.05, 0.1, 0.7)] == pytest.approx([256, 64, 16, 16])
    c.update_(torch.tensor(256.0), SOME, 0.05, 1.0)
    e = min(math.log(4), control.MOST_UP)
    want = 0.5 * 3.0 * math.exp(0.5 * control.INTEGRAL * e + control.PROPORTIONAL * e)
    assert c.coefficient.item() == pytest.approx(want)
    c.update_(torch.tensor(16.0), SOME, 0.1, 1.0)
    assert c.coefficient.item() == pytest.approx(3.0 * math.exp(0.5 * control.INTEGRAL * e))
    plain = SparsityController(3.0, 16, 0.0)
    assert plain.coefficient == 3
    assert plain.target(0.0) == 16


def test_the_integral_rests_with_the_learning_rate():
    c = SparsityController(1.0, 16, 0.0)
    moved = []
    for progress in (0.5, 0.8, 0.9, 0.95, 1.0, 1.1):
        before = c.integral.item()
        c.update_(torch.tensor(32.0), SOME, progress, RATE)
        moved.append(c.integral.item() - before)
    assert moved[0] > 0
    assert [m / moved[0] for m in moved] == pytest.approx([1, 1, 0.5, 0.25, 0, 0], abs=1e-4)


@pytest.mark.parametrize(
    ("kept", "share"), [(0.9, 1), (0.5, 1), (0.3, 0.5), (0.1, 0), (0.0, -0.25)]
)
def test_little_reconstructed_holds_rising_back_and_falling_not(kept, share):
    c = SparsityController(1.0, 16, 0.0)
    c.update_(torch.tensor(50.0), torch.tensor(kept), 0.3, RATE)
    full = control.INTEGRAL * RATE * control.MOST_UP
    assert c.integral.item() == pytest.approx(share * full, abs=1e-6)
    c = SparsityController(1.0, 16, 0.0)
    c.update_(torch.tensor(1.0), torch.tensor(kept), 0.3, RATE)
    assert c.integral.item() == pytest.approx(-control.INTEGRAL * RATE * control.MOST_DOWN)


def test_control_goes_on_from_its_state():
    l0s = 16 * torch.rand(80, generator=torch.Generator().manual_seed(0)).mul(2).exp()
    a, whole = SparsityController(2.0, 16, 0.1), []
    for i, l0 in enumerate(l0s):
        if i == 40:
            state = {k: v.clone() for k, v in a.state_dict().items()}
        a.update_(l0, SOME, i / 80, RATE)
        whole.append(a.coefficient.item())
    b = SparsityController(2.0, 16, 0.1)
    b.load_state_dict(state)
    for i in range(40, 80):
        b.update_(l0s[i], SOME, i / 80, RATE)
        assert b.coefficient.item() == whole[i]


@every_head
def test_a_head_reaches_its_target(kind):
    """On data that has what the head looks for: a few of 24 directions at a time."""
    g = torch.Generator().manual_seed(0)
    basis = torch.randn(M, D, generator=g)
    on = torch.rand(40, 256, M, generator=g) < 0.1
    data = ((on * torch.rand(40, 256, M, generator=g)) @ basis) * 3
    head = kind(d_model=D, d_sae=M, target_l0=4)
    head.start_(data.flatten(0, 1))
    steps = 500
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for step in range(steps):
        x, context = data[step % 40], StepContext(NONE, step / steps, 1 / 10)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (1 - step / steps) / 0.2)
        train_step(head, x, context, optimizer)
    out = head.eval()(data.flatten(0, 1))
    assert out.codes.l0().float().mean().item() == pytest.approx(4, rel=0.1)
    error = (data.flatten(0, 1) - out.x_hat).square().sum()
    assert error < 0.35 * (data - data.mean((0, 1))).square().sum()


def train_step(head, x, context, optimizer):
    optimizer.zero_grad()
    out = head(x)
    loss = sum(head.losses(x, out, context).values())
    head.observe_(out, context)
    loss.backward()
    head.project_grad_()
    optimizer.step()
    head.project_()


@every_head
def test_the_coefficient_is_logged_and_is_that_of_the_loss(kind):
    head = trained(kind)
    logged = head.diagnostics(rows())
    assert list(logged) == ["sparsity_coefficient"]
    assert logged["sparsity_coefficient"] == head.selection.controller.coefficient > 0
    term = "tanh" if kind is JumpReLU else "l1"
    once = head.losses(rows(), head(rows()), NOTHING_DEAD)[term]
    head.selection.controller.coefficient.mul_(2)
    twice = head.losses(rows(), head(rows()), NOTHING_DEAD)[term]
    torch.testing.assert_close(twice, 2 * once)
    assert (
        logged["sparsity_coefficient"] * 2 == head.selection.controller.coefficient
    )  # a copy was logged


def run_at(head, l0, steps, progress=0.5, rate=1.0):
    """Observed steps of which the L0 is given."""
    latents = torch.zeros(4, M)
    latents[:, :l0] = 1
    out = head(rows(4))._replace(x_hat=rows(4), codes=DenseCodes(latents))
    for _ in range(steps):
        head.observe_(out, StepContext(NONE, progress, rate))


@every_head
def test_saturation_warns_once(kind, caplog, monkeypatch):
    monkeypatch.setattr(penalties, "CHECK_STEPS", 10)
    head = kind(d_model=D, d_sae=M, target_l0=K)
    with caplog.at_level(logging.WARNING):
        run_at(head, 20, 50)
        assert not caplog.records
        run_at(head, 20, 500)
    (record,) = caplog.records
    text = record.getMessage()
    bound = head.selection.controller.initial * 1e3
    told = float(text.partition("coefficient is ")[2].partition(",")[0])
    assert told == pytest.approx(bound, rel=0.01)
    assert "L0 is 20 " in text
    assert f"target_l0={K}" in text
    with caplog.at_level(logging.WARNING):
        run_at(head, 1, 100)  # recovers in silence
        run_at(head, 20, 500)
    assert len(caplog.records) == 1
    assert head.selection.controller.coefficient <= bound * 1.001


@pytest.mark.parametrize(("l0", "warned"), [(K, False), (20, True)])
def test_the_end_of_a_run_off_its_target_warns(l0, warned, caplog):
    head = Standard(d_model=D, d_sae=M, target_l0=K)
    with caplog.at_level(logging.WARNING):
        run_at(head, l0, 20, 0.94, 0.01)
        assert not caplog.records
        run_at(head, l0, 20, 0.96, 0.01)
    assert len(caplog.records) == warned
    assert all("the run ends" in r.getMessage() for r in caplog.records)


# ------------------------------------------------------------------- saving, arguments


@every_head
def test_saved_and_loaded_bit_for_bit(kind, tmp_path):
    head = trained(kind, seed=5, sparsity_ramp=0.2).eval()
    head.save(tmp_path)
    loaded = SAEHead.load(tmp_path)
    assert loaded.init_args() == head.init_args()
    state = loaded.state_dict()
    assert any(name.startswith("selection.controller.") for name in state)
    for name, value in head.state_dict().items():
        assert torch.equal(state[name], value), name
    a, b = head(rows()), loaded(rows())
    assert torch.equal(a.x_hat, b.x_hat)
    assert torch.equal(a.codes.dense(), b.codes.dense())
    for h in (head.train(), loaded.train()):  # and trains on the same
        train_(h, rows(seed=1), 3)
    assert torch.equal(head.encoder.W_enc, loaded.encoder.W_enc)
    assert torch.equal(
        head.selection.controller.coefficient, loaded.selection.controller.coefficient
    )


@every_head
def test_a_head_that_was_never_started_can_be_observed(kind):
    head = kind(d_model=D, d_sae=M, target_l0=K)
    head.observe_(head(rows()), NOTHING_DEAD)
    assert head.selection.controller.coefficient.isfinite()


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        (Standard, {"l1_coefficient": 0.0}),
        (Gated, {"l1_coefficient": -1.0}),
        (JumpReLU, {"tanh_coefficient": math.nan}),
        (JumpReLU, {"pre_act_coefficient": -1e-6}),
        (JumpReLU, {"bandwidth": 0.0}),
        (JumpReLU, {"theta_init": 0.0}),
        *[(kind, {"sparsity_ramp": v}) for kind in HEADS for v in (-0.1, 0.6)],
    ],
)
def test_refused_arguments(kind, args):
    ((name, value),) = args.items()
    with pytest.raises(InputError, match=rf"head\.{name}={value}: must be "):
        kind(d_model=D, d_sae=M, target_l0=K, **args)
