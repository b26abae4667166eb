"""Splines against SciPy's, compiled kernels against look-up, kept values against the whole."""

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from kanllama_lightning.functional import spline_activation as module
from kanllama_lightning.functional.spline_activation import spline_activation, spline_values
from kanllama_lightning.functional.splines import greville

GRIDS = [  # lo, hi, grid_size, order
    (-1.0, 1.0, 5, 3),
    (0.0, 0.7, 1, 3),
    (-2.0, 5.0, 2, 1),
    (-1.0, 2.0, 4, 2),
    (-1.0, 1.0, 3, 4),
]
CUBIC = GRIDS[0]


def some(grid, tok=37, n=6, dtype=torch.float64):
    """Points on the grid, in its tails and beyond; coefficients; a gradient."""
    lo, hi, size, order = grid
    g = torch.Generator().manual_seed(0)
    x = (lo + hi) / 2 + (hi - lo) * torch.randn(tok, n, generator=g, dtype=dtype)
    coef = torch.randn(size + order, n, generator=g, dtype=dtype)
    return x.requires_grad_(), coef.requires_grad_(), torch.randn(tok, n, generator=g, dtype=dtype)


def by_scipy(x, coef, grid, tails):
    """Column by column; zeros as further coefficients make the splines fade."""
    lo, hi, size, order = grid
    more = 0 if tails else order + 1
    knots = lo + np.arange(-order - more, size + order + more + 1) * (hi - lo) / size
    padded = np.pad(coef, ((more, more), (0, 0)))
    y = np.empty_like(x)
    for j in range(x.shape[1]):
        spline = BSpline(knots, padded[:, j], order, extrapolate=True)
        ends = (lo, hi) if tails else (knots[order], knots[-1 - order])
        inside = x[:, j].clip(*ends)
        y[:, j] = spline(inside)
        if tails:
            y[:, j] += spline(inside, 1) * (x[:, j] - inside)
    return y


def gradients(y, x, coef, grad):
    return [y, *torch.autograd.grad(y, (x, coef), grad)]


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == module.__name__]


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_values_are_those_of_scipy(grid, tails):
    lo, hi, *_ = grid
    x, coef, _ = some(grid)
    x = torch.cat([x.detach(), torch.tensor([lo, hi, lo - 1e4, hi + 1e4])[:, None].expand(4, 6)])
    right = by_scipy(x.numpy(), coef.detach().numpy(), grid, tails)
    y = spline_activation(x, coef, *grid, linear_tails=tails)
    np.testing.assert_allclose(y.detach().numpy(), right, rtol=1e-10, atol=1e-10)
    single = spline_activation(x.float(), coef.float(), *grid, linear_tails=tails)
    assert single.dtype == torch.float32
    assert np.linalg.norm(single.detach().numpy() - right) <= 2e-6 * np.linalg.norm(right)


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_gradcheck(grid, tails):
    x, coef, _ = some(grid, tok=5, n=3)
    which = torch.tensor([2, 0, 0, 1, 2])
    assert torch.autograd.gradcheck(
        lambda x, coef: spline_activation(x, coef, *grid, linear_tails=tails), (x, coef)
    )
    assert torch.autograd.gradcheck(
        lambda x, coef: spline_values(x[:, 0], which, coef, *grid, linear_tails=tails), (x, coef)
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_greville_coefficients_give_the_identity(grid):
    lo, hi, *_ = grid
    coef = greville(*grid)[:, None]
    x = torch.linspace(lo, hi, 101).double()[:, None]
    torch.testing.assert_close(spline_activation(x[:-1], coef, *grid), x[:-1])
    far = torch.linspace(-1e6, 1e6, 101).double()[:, None]
    torch.testing.assert_close(spline_activation(far, coef, *grid, linear_tails=True), far)


@pytest.mark.parametrize("tails", [False, True])
def test_kept_values_are_entries_of_the_whole(tails):
    x, coef, grad = some(CUBIC)
    row, column = (torch.arange(x.numel()).view_as(x) % 5 < 2).nonzero(as_tuple=True)
    whole = spline_activation(x, coef, *CUBIC, linear_tails=tails)[row, column]
    right = gradients(whole, x, coef, grad[row, column])
    for dtype in (torch.int32, torch.int64):
        kept = spline_values(x[row, column], column.to(dtype), coef, *CUBIC, linear_tails=tails)
        torch.testing.assert_close(gradients(kept, x, coef, grad[row, column]), right)


def test_result_does_not_depend_on_the_row_blocks(monkeypatch):
    x, coef, grad = some(CUBIC)
    whole = gradients(spline_activation(x, coef, *CUBIC), x, coef, grad)
    monkeypatch.setattr(module, "_CPU_BLOCK", 24)  # four rows
    torch.testing.assert_close(gradients(spline_activation(x, coef, *CUBIC), x, coef, grad), whole)


@pytest.mark.slow
def test_compiled_is_the_same(caplog):
    kinds = {"linear_tails": True}
    for tok in (37, 19):
        x, coef, grad = some(CUBIC, tok, dtype=torch.float32)
        # another number of tokens is no reason to compile again
        with torch.compiler.set_stance("default" if tok == 37 else "fail_on_recompile"):
            y = spline_activation(x, coef, *CUBIC, **kinds, compiled=True)
            mine = gradients(y, x, coef, grad)
        if not module._compiler_works:
            pytest.skip(f"no compiler: {said(caplog)}")
        eager = spline_activation(x, coef, *CUBIC, **kinds, compiled=False)
        for a, b in zip(mine, gradients(eager, x, coef, grad), strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    assert not said(caplog)


def test_without_a_compiler_eager_goes_on_and_says_so_once(caplog, monkeypatch):
    def broken(_):
        raise torch._dynamo.exc.TorchDynamoException("no g++")

    monkeypatch.setattr(module, "_jit", broken)
    monkeypatch.setattr(module, "_compiler_works", True)
    x, coef, grad = some(CUBIC)
    right = gradients(spline_activation(x, coef, *CUBIC), x, coef, grad)
    for _ in range(2):
        y = spline_activation(x, coef, *CUBIC, compiled=True)
        torch.testing.assert_close(gradients(y, x, coef, grad), right, rtol=0, atol=0)
    (message,) = said(caplog)
    assert "no g++" in message


def test_from_some_size_on_the_compiled_form_is_chosen(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "_compiled", lambda kernel, *_: asked.append(kernel))
    monkeypatch.setattr(module, "COMPILED_FROM", 37 * 6)
    x, coef, _ = some(CUBIC)
    spline_activation(x[1:], coef, *CUBIC)
    spline_activation(x, coef, *CUBIC, compiled=False)
    assert not asked
    spline_activation(x, coef, *CUBIC)
    assert asked == [module._values]


def test_backward_keeps_the_inputs_alone():
    x, coef, _ = some(CUBIC, dtype=torch.float32)
    values, which = x[:, 0].detach().clone().requires_grad_(), torch.arange(37) % 6
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        spline_activation(x, coef, *CUBIC)
        spline_values(values, which, coef, *CUBIC)
    inputs = [x, coef, values, which, coef]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in inputs]  # no copies
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in inputs)


def test_only_wanted_gradients_are_made():
    x, coef, grad = some(CUBIC)
    _, to_x, to_coef = gradients(spline_activation(x, coef, *CUBIC), x, coef, grad)
    spline_activation(x.detach(), coef, *CUBIC).backward(grad)
    spline_activation(x, coef.detach(), *CUBIC).backward(grad)
    torch.testing.assert_close((x.grad, coef.grad), (to_x, to_coef), rtol=0, atol=0)
    assert not spline_activation(x.detach(), coef.detach(), *CUBIC).requires_grad


def test_a_second_derivative_is_refused():
    x, coef, _ = some(CUBIC)
    y = spline_activation(x, coef, *CUBIC).square().sum()
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_autocast_and_low_precision_change_only_the_rounding_of_the_inputs():
    x, coef, grad = some(CUBIC, dtype=torch.float32)
    right = gradients(spline_activation(x, coef, *CUBIC), x, coef, grad)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            mine = gradients(spline_activation(x, coef, *CUBIC), x, coef, grad)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(mine, right, rtol=0, atol=0)
    low = [t.detach().bfloat16().requires_grad_() for t in (x, coef)]
    y, *grads = gradients(spline_activation(*low, *CUBIC), *low, grad)
    assert y.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.bfloat16] * 2
    exact = spline_activation(*(t.float() for t in low), *CUBIC)
    torch.testing.assert_close(y, exact, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [None, True])
def test_nothing_in_nothing_out(compiled):
    _, coef, _ = some(CUBIC)
    x = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    y = spline_activation(x, coef, *CUBIC, compiled=compiled)
    kept = spline_values(x[:, 0], torch.zeros(0, dtype=torch.int64), coef, *CUBIC)
    assert y.shape == (0, 6)
    assert kept.shape == (0,)
    (y.sum() + kept.sum()).backward()
    assert x.grad.shape == x.shape
    assert not coef.grad.any()


def test_what_is_not_finite():
    """It fades to zero far out; what is not a number stays so, and is no index out of bounds."""
    x = torch.tensor([[torch.inf], [-torch.inf], [1e30], [torch.nan]])
    y = spline_activation(x, torch.ones(8, 1), *CUBIC)
    assert not y[:3].any()
    assert y[3].isnan()
