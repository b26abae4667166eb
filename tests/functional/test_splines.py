"""Splines against a textbook recursion, and the KAN map against plain autograd through it."""

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kanllama_lightning.functional import splines
from kanllama_lightning.functional.splines import (
    greville,
    kan_linear,
    kan_planes,
    spline_bases,
    spline_knots,
    spline_slopes,
)

CUBIC = (-1.0, 1.0, 5, 3)  # lo, hi, grid_size, order
RANGES = [(-1.0, 1.0), (0.0, 0.7), (-2.0, 5.0)]
GRIDS = [
    (*RANGES[(size + order) % 3], size, order) for order in range(1, 6) for size in range(1, 9)
] + [CUBIC, (0.0, 9.0, 20, 5)]


def knots(lo, hi, size, order):
    """t_r = lo + (r - k) h, as efficient-kan places them."""
    h = (hi - lo) / size
    return np.array([lo + (r - order) * h for r in range(size + 2 * order + 1)])


def textbook(x, t, degree):
    """Cox-de Boor on knots t, cells half-open: NumPy or torch, [...] to a list of [...]."""
    planes = [(x >= a) * (x < b) * (0 * x + 1) for a, b in zip(t, t[1:], strict=False)]
    for r in range(1, degree + 1):
        planes = [
            (x - t[c]) / (t[c + r] - t[c]) * planes[c]
            + (t[c + r + 1] - x) / (t[c + r + 1] - t[c + 1]) * planes[c + 1]
            for c in range(len(planes) - 1)
        ]
    return planes


def textbook_slopes(x, t, order):
    """B_c' = k B_c^(k-1) / (t_(c+k) - t_c) - k B_(c+1)^(k-1) / (t_(c+k+1) - t_(c+1))."""
    low = textbook(x, t, order - 1)
    return [
        order * low[c] / (t[c + order] - t[c]) - order * low[c + 1] / (t[c + order + 1] - t[c + 1])
        for c in range(len(low) - 1)
    ]


def plain_kan(x, weight, lo, hi, size, order, linear_tails=False):
    """The layer by the book, on autograd: 2^-40 inside the grid stands for the end itself."""
    t = knots(lo, hi, size, order)
    inside = x.clamp(lo, hi) if linear_tails else x
    if linear_tails:  # half-open cells: the last one does not hold its right end
        inside = torch.where(inside >= hi, inside - 2**-40, inside)
    bases = torch.stack(textbook(inside, t, order))
    if linear_tails:
        edge = np.array([lo, hi - 2**-40])
        slopes = torch.tensor(np.stack(textbook_slopes(edge, t, order)))
        below, above = (x - lo).clamp(max=0), (x - hi).clamp(min=0)
        bases = bases + slopes[:, 0, None, None] * below + slopes[:, 1, None, None] * above
    return F.silu(x) @ weight[:, 0].T + torch.einsum("cti,oci->to", bases, weight[:, 1:])


def column(*x):
    return torch.tensor(x, dtype=torch.float64)[:, None]


def points(lo, hi, size, order, n=997):
    """Points over the grid and beyond everything, the knots among them."""
    reach = (order + 2) * (hi - lo) / size
    return np.concatenate(
        [np.linspace(lo - reach, hi + reach, n), knots(lo, hi, size, order)[order:-order]]
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_closed_form_is_cox_de_boor(grid):
    """The bases and their slopes (METHODS B1)."""
    lo, hi, size, order = grid
    # 1e-9 off each knot: where a slope jumps (order 1), rounding may choose either cell
    x = points(*grid) + 1e-9
    t = knots(*grid)
    bases, slopes = (f(column(*x), *grid)[..., 0] for f in (spline_bases, spline_slopes))
    assert bases.shape == (len(x), size + order)
    assert np.abs(bases.numpy() - np.stack(textbook(x, t, order), 1)).max() <= 1e-12
    h = (hi - lo) / size
    assert np.abs(slopes.numpy() - np.stack(textbook_slopes(x, t, order), 1)).max() <= 1e-12 / h


@pytest.mark.parametrize("grid", [g for g in GRIDS if g[3] > 1])
def test_bases_in_fp32(grid):
    x = points(*grid).astype(np.float32)
    bases = spline_bases(torch.tensor(x)[:, None], *grid)[..., 0]
    assert bases.dtype == torch.float32
    right = np.stack(textbook(x.astype(np.float64), knots(*grid), grid[3]), 1)
    assert np.linalg.norm(bases.numpy() - right) <= 1e-6 * np.linalg.norm(right)


def test_one_cubic_by_hand():
    """At a knot the three cubics are 1/6, 4/6, 1/6; in the middle of a cell 1, 23, 23, 1 / 48."""
    bases = spline_bases(torch.tensor([[0.0], [0.5]], dtype=torch.float64), 0, 2, 2)[..., 0]
    by_hand = [[1 / 6, 4 / 6, 1 / 6, 0, 0], [1 / 48, 23 / 48, 23 / 48, 1 / 48, 0]]
    torch.testing.assert_close(bases, torch.tensor(by_hand, dtype=torch.float64))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    lo=st.floats(-20, 20),
    width=st.floats(0.1, 40),
    size=st.integers(1, 12),
    order=st.integers(1, 5),
    where=st.lists(st.floats(0, 0.999), min_size=1, max_size=5),
    tails=st.booleans(),
)
def test_bases_sum_to_one_and_reproduce_lines(lo, width, size, order, where, tails):
    hi = lo + width
    x = lo + torch.tensor(where, dtype=torch.float64)[:, None] * width
    bases = spline_bases(x, lo, hi, size, order, linear_tails=tails)
    torch.testing.assert_close(bases.sum(1), torch.ones_like(x), rtol=0, atol=1e-11)
    line = torch.einsum("tci,c->ti", bases, 3 * greville(lo, hi, size, order) - 2)
    torch.testing.assert_close(line, 3 * x - 2, rtol=0, atol=1e-10 * (1 + abs(lo) + width))


@pytest.mark.parametrize("grid", GRIDS)
def test_knots(grid):
    np.testing.assert_allclose(spline_knots(*grid).numpy(), knots(*grid), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("grid", GRIDS)
def test_spline_is_zero_beyond_hi_plus_kh(grid):
    """Without tails, h being a cell and k the order (METHODS B3b)."""
    lo, hi, size, order = grid
    reach = order * (hi - lo) / size * (1 + 1e-9)
    x = column(lo - reach, hi + reach, 1e30, -torch.inf, torch.inf)
    assert not spline_bases(x, *grid).any()
    assert not spline_slopes(x, *grid).any()


@pytest.mark.parametrize("grid", GRIDS)
def test_tails_go_on_from_the_end_with_its_slope(grid):
    lo, hi, _, _ = grid
    eps = 1e-7
    x = column(lo - eps, lo, lo + eps, hi - eps, hi, hi + eps)
    bases = spline_bases(x, *grid, linear_tails=True)[..., 0]
    steps = bases.diff(dim=0) / eps
    for before in (0, 3):  # the end itself is one further
        torch.testing.assert_close(bases[before], bases[before + 1], rtol=0, atol=1e-4)
        # the two one-sided slopes differ by a second derivative times eps
        torch.testing.assert_close(steps[before], steps[before + 1], rtol=0, atol=1e-3)
    far = column(lo - 7, lo - 5, lo - 3, hi + 3, hi + 5, hi + 7)
    bends = spline_bases(far, *grid, linear_tails=True).diff(n=2, dim=0)[[0, 3]]
    assert bends.abs().max() <= 1e-9
    slopes = spline_slopes(far, *grid, linear_tails=True)
    ends = spline_slopes(x[[1, 4]], *grid, linear_tails=True)
    torch.testing.assert_close(slopes, ends.repeat_interleave(3, 0))


def test_tails_reproduce_a_line_everywhere():
    x = torch.linspace(-50, 50, 101).double()[:, None]
    for lo, hi, size, order in GRIDS:
        line = torch.einsum(
            "tci,c->ti",
            spline_bases(x, lo, hi, size, order, linear_tails=True),
            greville(lo, hi, size, order),
        )
        torch.testing.assert_close(line, x)


def some(grid, tok=11, n_in=4, n_out=3, dtype=torch.float64, seed=0):
    """Inputs on the grid, in its tails and beyond; a weight; a gradient."""
    lo, hi, size, order = grid
    g = torch.Generator().manual_seed(seed)
    x = (lo + hi) / 2 + (hi - lo) * torch.randn(tok, n_in, generator=g, dtype=dtype)
    weight = torch.randn(n_out, 1 + size + order, n_in, generator=g, dtype=dtype)
    grad = torch.randn(tok, n_out, generator=g, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), grad


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_output_and_gradients_are_those_of_plain_autograd(grid, tails):
    x, weight, grad = some(grid)
    right = plain_kan(x, weight, *grid, linear_tails=tails)
    y = kan_linear(x, weight, *grid, linear_tails=tails)
    torch.testing.assert_close(y, right, rtol=1e-9, atol=1e-9)
    mine = torch.autograd.grad(y, (x, weight), grad)
    theirs = torch.autograd.grad(right, (x, weight), grad)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("grid", [CUBIC, *((-1.0, 2.5, 4, order) for order in (1, 2, 3, 4, 5))])
def test_gradcheck(grid, tails):
    x, weight, _ = some(grid, tok=4, n_in=2, n_out=2)
    assert torch.autograd.gradcheck(
        lambda a, w: kan_linear(a, w, *grid, linear_tails=tails), (x, weight)
    )
    assert torch.autograd.gradcheck(
        lambda a, w: kan_linear(a, w, *grid, base=torch.tanh, linear_tails=tails), (x, weight)
    )


@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_planes_times_the_weight_are_the_layer(grid, tails):
    x, weight, _ = some(grid)
    planes = kan_planes(x, *grid, linear_tails=tails)
    assert not planes.requires_grad
    torch.testing.assert_close(planes[:, 0], F.silu(x))
    assert torch.equal(planes[:, 1:], spline_bases(x, *grid, linear_tails=tails))
    y = kan_linear(x, weight, *grid, linear_tails=tails)
    torch.testing.assert_close(torch.einsum("tpi,opi->to", planes, weight), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert kan_planes(x.bfloat16(), *grid).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own, on import
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
@pytest.mark.parametrize(("grid", "tails"), [(CUBIC, True), ((-1.0, 2.0, 4, 2), False)])
def test_compiled_is_the_same(grid, tails):
    x, weight, grad = some(grid, dtype=torch.float32)
    results = []
    for compiled in (False, True):
        y = kan_linear(
            x, weight, *grid, linear_tails=tails, compiled=compiled, block_bytes=9 * 4 * 4 * 3
        )
        planes = kan_planes(x, *grid, linear_tails=tails, compiled=compiled)
        results.append([y, planes, *torch.autograd.grad(y, (x, weight), grad)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_fp32_agrees_with_fp64():
    x, weight, grad = some(CUBIC, 64, 32, 16, torch.float32)
    y = kan_linear(x, weight, *CUBIC)
    mine = [y, *torch.autograd.grad(y, (x, weight), grad)]
    right = plain_kan(x.double(), weight.double(), *CUBIC)
    theirs = [right, *torch.autograd.grad(right, (x, weight), grad.double())]
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 2e-6 * b.norm()


@pytest.mark.parametrize("block_bytes", [1, 9 * 4 * 8 * 3, 9 * 4 * 8 * 11, 1 << 20])
def test_result_does_not_depend_on_the_row_blocks(block_bytes, monkeypatch):
    x, weight, grad = some(CUBIC)
    y = kan_linear(x, weight, *CUBIC)
    whole = [y, *torch.autograd.grad(y, (x, weight), grad)]
    monkeypatch.setattr(splines, "_CPU_FILL_BYTES", 300)  # two rows
    y = kan_linear(x, weight, *CUBIC, block_bytes=block_bytes)
    torch.testing.assert_close([y, *torch.autograd.grad(y, (x, weight), grad)], whole)


def test_backward_keeps_x_and_the_weight_alone():
    x, weight, grad = some(CUBIC, 64, 32, 16, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = kan_linear(x, weight, *CUBIC)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]  # no copies
    assert sum(t.nbytes for t in kept) == x.nbytes + weight.nbytes
    y.backward(grad)


def test_a_step_at_a_real_size():
    """As efficient-kan's recursion to 1e-5; nothing kept but x and the weight; a third of its peak.

    Measured as `benchmarks/kan_linear.py` does, which is so kept running.
    """
    benchmark = Path(__file__).parents[2] / "benchmarks" / "kan_linear.py"
    measured = runpy.run_path(str(benchmark))["measure"]((512, 512, 256), 1, compiled=False)
    assert measured["error"] <= 1e-5
    assert measured["saved_mib"]["ours"] == measured["saved_mib"]["ours_tails"] == 0
    assert measured["saved_mib"]["recursion"] > 70  # its 73 planes of 1 MiB
    assert measured["step_peak_ours_over_recursion"] <= 1 / 3


def test_only_wanted_gradients_are_made():
    x, weight, grad = some(CUBIC)
    y = kan_linear(x.detach(), weight, *CUBIC)
    y.backward(grad)
    assert weight.grad is not None
    kan_linear(x, weight.detach(), *CUBIC).backward(grad)
    assert x.grad is not None
    assert not kan_linear(x.detach(), weight.detach(), *CUBIC).requires_grad


def test_a_second_derivative_is_refused():
    x, weight, _ = some(CUBIC)
    (slope,) = torch.autograd.grad(
        kan_linear(x, weight, *CUBIC).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_no_rows():
    _, weight, _ = some(CUBIC)
    y = kan_linear(torch.zeros(0, 4).double(), weight, *CUBIC)
    assert y.shape == (0, 3)
    y.sum().backward()
    assert not weight.grad.any()


def test_transposed_inputs():
    x, weight, grad = some(CUBIC)
    across = x.detach().T.contiguous().T.requires_grad_()
    loose = weight.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    y, right = kan_linear(across, loose, *CUBIC), kan_linear(x, weight, *CUBIC)
    torch.testing.assert_close(y, right)
    torch.testing.assert_close(
        torch.autograd.grad(y, (across, loose), grad),
        torch.autograd.grad(right, (x, weight), grad),
    )


@pytest.mark.parametrize("tails", [False, True])
def test_under_autocast_the_bases_are_exact_and_the_product_is_bf16(tails):
    x, weight, grad = some(CUBIC, 256, 32, 16, torch.float32)
    exact = kan_linear(x, weight, *CUBIC, linear_tails=tails)
    right = [exact, *torch.autograd.grad(exact, (x, weight), grad)]
    with torch.autocast("cpu", torch.bfloat16):
        y = kan_linear(x, weight, *CUBIC, linear_tails=tails, block_bytes=100 * 9 * 32 * 2)
        assert spline_bases(x, *CUBIC).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    mine = [y, *torch.autograd.grad(y, (x, weight), grad.bfloat16())]
    assert mine[1].dtype == mine[2].dtype == torch.float32
    for a, b in zip(mine, right, strict=True):
        assert (a.float() - b).norm() <= 5e-3 * b.norm()
    # bf16 inputs: their own rounding is the only one before the product
    rounded = x.detach().bfloat16()
    torch.testing.assert_close(
        spline_bases(rounded, *CUBIC), spline_bases(rounded.float(), *CUBIC), rtol=0, atol=0
    )


@pytest.mark.parametrize("size", [2, 5, 8])
@pytest.mark.parametrize("tails", [True, False])
def test_halves_of_the_bases_are_the_whole(size: int, tails: bool) -> None:
    """What a GPU without the kernel does, bit for bit what the CPU does."""
    grid = splines._Grid(-1.0, 1.0, size, 3, tails)
    u = size * (3 * torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) - 1)
    made = torch.full((50, grid.n_bases, 4), torch.nan)
    splines._fill_by_halves_(u, grid, made)
    assert torch.equal(made, splines._bases(u, grid))
