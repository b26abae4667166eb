"""Sources of our kernels, in Triton; `kernels` launches them and says whether they are right here.

The module imports without Triton, where nothing of it can be launched. A program works on a row,
or on a block of one, and keeps everything in registers: what a kernel reads and writes once is all
that it moves.
"""

import inspect
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # CPU builds of torch come without it
    triton = tl = None
    constexpr = Any


def jit(function: Callable[..., None]) -> Any:
    """The function as a kernel; as it is, where Triton is missing."""
    # unwrapped: the names in a kernel are looked up where its own code was defined
    return function if triton is None else triton.jit(inspect.unwrap(function))


# ------------------------------------------------------- features of a KAN layer


@jit
def at_least(a, least):  # type: ignore[no-untyped-def]
    """max(a, least), NaN where a is NaN, as torch has it."""
    return tl.maximum(a, least, propagate_nan=tl.PropagateNan.ALL)


@jit
def at_most(a, most):  # type: ignore[no-untyped-def]
    """min(a, most), NaN where a is NaN."""
    return tl.minimum(a, most, propagate_nan=tl.PropagateNan.ALL)


@jit
def fill_planes(  # type: ignore[no-untyped-def]
    x,
    planes,
    n_in,
    lo,
    cell,
    SIZE: constexpr,
    ORDER: constexpr,
    TAILS: constexpr,
    BASE: constexpr,
    BLOCK: constexpr,
):
    """base(x), then every basis at x, into planes [row plane in]; rounds once, when it stores."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < n_in
    at = tl.load(x + row * n_in + column, mask=there, other=0.0).to(tl.float32)
    out = planes + row * n_in * (SIZE + ORDER + 1) + column
    first = at
    if BASE == "silu":
        first = at * tl.sigmoid(at)
    if BASE == "relu":
        first = at_least(at, 0.0)
    if BASE == "zero":
        first = at * 0.0
    tl.store(out, first, mask=there)
    u = (at - lo) / cell
    inside = u
    below = u
    above = u
    if TAILS:
        inside = at_most(at_least(u, 0.0), SIZE)
        below = at_most(u, 0.0)
        above = at_least(u - SIZE, 0.0)
    for c in tl.static_range(SIZE + ORDER):
        if ORDER == 3:
            near = at_least(2 - tl.abs(inside - (c - 1)), 0.0)
            core = at_least(near - 1, 0.0)
            basis = (near * near * near - 4 * core * core * core) / 6
            if TAILS:
                if c == 0:
                    basis -= 0.5 * below
                if c == 2:
                    basis += 0.5 * below
                if c == SIZE + 2:
                    basis += 0.5 * above
                if c == SIZE:
                    basis -= 0.5 * above
        else:
            basis = at_least(1 - tl.abs(inside - c), 0.0)
            if TAILS:
                if c == 0:
                    basis -= below
                if c == 1:
                    basis += below
                if c == SIZE:
                    basis += above
                if c == SIZE - 1:
                    basis -= above
        tl.store(out + (c + 1) * n_in, basis, mask=there)


@jit
def pull_planes(  # type: ignore[no-untyped-def]
    x,
    grad_planes,
    grad_x,
    n_in,
    lo,
    cell,
    SIZE: constexpr,
    ORDER: constexpr,
    TAILS: constexpr,
    BASE: constexpr,
    BLOCK: constexpr,
):
    """The gradient to x [row in], from that to its planes; summed over the planes in fp32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < n_in
    at = tl.load(x + row * n_in + column, mask=there, other=0.0).to(tl.float32)
    grads = grad_planes + row * n_in * (SIZE + ORDER + 1) + column
    through_base = tl.load(grads, mask=there, other=0.0).to(tl.float32)
    if BASE == "silu":
        gate = tl.sigmoid(at)
        through_base *= gate * (1 + at * (1 - gate))
    if BASE == "relu":
        through_base = tl.where(at > 0, through_base, 0.0)
    if BASE == "zero":
        through_base *= 0.0
    u = (at - lo) / cell
    if TAILS:
        u = at_most(at_least(u, 0.0), SIZE)
    which = tl.floor(u)
    if TAILS:
        which = at_most(which, SIZE - 1)
    through_spline = at * 0.0
    for c in tl.static_range(SIZE + ORDER):
        grad = tl.load(grads + (c + 1) * n_in, mask=there, other=0.0).to(tl.float32)
        if ORDER == 3:
            off = u - (c - 1)
            near = at_least(2 - tl.abs(off), 0.0)
            core = at_least(near - 1, 0.0)
            slope = 2 * core * core - 0.5 * near * near
            through_spline += grad * tl.where(off < 0, -slope, slope)
        else:
            through_spline += tl.where(which == c - 1, grad, 0.0)
            through_spline -= tl.where(which == c, grad, 0.0)
    tl.store(grad_x + row * n_in + column, through_base + through_spline / cell, mask=there)


# ------------------------------------------------------------ rows of norm 1


@jit
def square_rows(weight, grad, squares, n, BLOCK: constexpr):  # type: ignore[no-untyped-def]
    """Squared norm of each row's gradient without its part along the row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < n
    w = tl.load(weight + row * n + column, mask=there, other=0.0)
    g = tl.load(grad + row * n + column, mask=there, other=0.0)
    g -= tl.sum(g * w, axis=0) * w
    tl.store(squares + row, tl.sum(g * g, axis=0))


@jit
def step_rows(  # type: ignore[no-untyped-def]
    weight,
    grad,
    first,
    second,
    shadow,
    steps,
    factor,
    n,
    lr,
    BETA1: constexpr,
    BETA2: constexpr,
    LOG1: constexpr,
    LOG2: constexpr,
    EPS: constexpr,
    SHADOW: constexpr,
    BLOCK: constexpr,
):
    """Project a row's gradient, shorten it, step Adam, renormalise the row, write its shadow."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < n
    at = row * n + column
    w = tl.load(weight + at, mask=there, other=0.0)
    g = tl.load(grad + at, mask=there, other=0.0)
    m = tl.load(first + at, mask=there, other=0.0)
    v = tl.load(second + at, mask=there, other=0.0)
    g = (g - tl.sum(g * w, axis=0) * w) * tl.load(factor)
    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    # in fp64: 1 - 0.999 ^ 1 has four digits less in fp32
    count = tl.load(steps).to(tl.float64)
    unbiased1 = (1 - tl.exp(count * LOG1)).to(tl.float32)
    unbiased2 = (1 - tl.exp(count * LOG2)).to(tl.float32)
    w -= lr / unbiased1 * m / (tl.sqrt(v / unbiased2) + EPS)
    w /= tl.sqrt(tl.sum(w * w, axis=0))
    tl.store(first + at, m, mask=there)
    tl.store(second + at, v, mask=there)
    tl.store(weight + at, w, mask=there)
    if SHADOW:
        tl.store(shadow + at, w, mask=there)
