"""The straight-through JumpReLU: values and gradients by hand (METHODS A5)."""

import pytest
import torch

from kanllama_lightning.functional.jump import jump_relu

THETA, EPS = 0.5, 0.2


def gradients(p, theta=THETA, eps=EPS, upstream=1.0):
    p = torch.tensor([[p]], requires_grad=True)
    t = torch.tensor([theta], requires_grad=True)
    z = jump_relu(p, t, eps)
    z.backward(torch.full_like(z, upstream))
    return z.item(), p.grad.item(), t.grad.item()


@pytest.mark.parametrize(
    ("p", "z", "to_p", "to_theta"),
    [  # theta / eps = 2.5 within |p - theta| < eps / 2, nothing beyond
        (THETA + EPS / 4, 0.55, 1 + 2.5, -2.5),
        (THETA - EPS / 4, 0.0, 2.5, -2.5),
        (THETA + EPS, 0.7, 1.0, 0.0),
        (THETA - EPS, 0.0, 0.0, 0.0),
        (-3.0, 0.0, 0.0, 0.0),
        (4.0, 4.0, 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("upstream", [1.0, -3.0])
def test_by_hand(p, z, to_p, to_theta, upstream):
    assert gradients(p, upstream=upstream) == pytest.approx(
        (z, upstream * to_p, upstream * to_theta), abs=1e-6
    )


def test_at_the_threshold_nothing_passes_but_the_window_is_open():
    z, to_p, to_theta = gradients(0.5, theta=0.5, eps=2.0)
    assert (z, to_p, to_theta) == (0.0, 0.25, -0.25)


def test_the_window_ends_at_half_the_bandwidth():
    assert gradients(1.0, theta=2.0, eps=2.0) == (0.0, 0.0, 0.0)
    assert gradients(3.0, theta=2.0, eps=2.0) == (3.0, 1.0, 0.0)


def test_a_threshold_of_zero_is_a_relu():
    p = torch.randn(20, 3, requires_grad=True)
    theta = torch.zeros(3, requires_grad=True)
    jump_relu(p, theta, 2.0).sum().backward()
    assert torch.equal(p.grad, (p > 0).float())
    assert not theta.grad.any()


def test_gradients_are_summed_over_tokens_per_column():
    g = torch.Generator().manual_seed(0)
    p = torch.randn(50, 4, generator=g, requires_grad=True)
    theta = torch.rand(4, generator=g).requires_grad_()
    upstream = torch.randn(50, 4, generator=g)
    z = jump_relu(p, theta, 0.7)
    z.backward(upstream)
    k = ((p - theta).abs() / 0.7 < 0.5).float()
    assert torch.equal(z, p * (p > theta))
    want = upstream * ((p > theta) + theta / 0.7 * k)
    torch.testing.assert_close(p.grad, want.detach())
    torch.testing.assert_close(theta.grad, -(upstream * theta / 0.7 * k).sum(0).detach())


def test_the_estimator_is_the_gradient_of_the_smoothed_jump():
    """Averaged over uniform noise as wide as the window, the finite difference is the estimator."""
    noise = torch.linspace(-0.5, 0.5, 20001, dtype=torch.float64) * EPS
    p = torch.full((20001,), THETA, dtype=torch.float64) + noise

    def mean(theta):
        return torch.where(p > theta, p, 0.0).mean().item()

    h = 1e-3
    slope = (mean(THETA + h) - mean(THETA - h)) / (2 * h)
    assert slope == pytest.approx(-THETA / EPS, rel=0.01)
    t = torch.full((1,), THETA, dtype=torch.float64, requires_grad=True)
    jump_relu(p[1:-1, None], t, EPS).mean().backward()
    assert t.grad.item() == pytest.approx(slope, rel=0.01)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_asked_for(needs):
    p = torch.randn(5, 2).requires_grad_(needs[0])
    theta = torch.full((2,), 0.1).requires_grad_(needs[1])
    jump_relu(p, theta, 2.0).sum().backward()
    assert (p.grad is not None, theta.grad is not None) == needs
