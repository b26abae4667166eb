"""One learned uniform B-spline per column, on all of a matrix or on its kept values only.

Eagerly, by look-up: within a cell a spline is a polynomial in t, the place between its two knots,
so the coefficients are turned into one table [powers, cells n], and a value costs `order + 1`
look-ups however many bases there are. Compiled, by brute force: all bases at every point, in
vector registers, which beats looking up as soon as one loop does everything. Either way backward
makes it all again from x and the coefficients. Grids, positions and bases are those of `splines`.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import factorial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from kanllama_lightning.functional.splines import (
    _bases,
    _edge_slopes,
    _exact,
    _Grid,
    _inner_bases,
    _position,
    _slopes,
    blocks,
    rows_at_once,
)

log = logging.getLogger(__name__)

# Elements from which compiling is chosen. At this size it saves 6 to 14 ms a step on one busy core
# (benchmarks/spline_activation.py --threads 1 --shape 16 16384 2048), so the some twenty seconds
# of compiling are back after 1500 to 3000 steps. Measured on a CPU only.
COMPILED_FROM = 1 << 18
# Elements of one eager temporary on the CPU. From more than this on torch divides an operation
# among threads, and the barrier after each of the forty costs far more than a thread saves as soon
# as another process wants a core; the look-ups, half of the time, have one thread in any case.
_CPU_BLOCK = 1 << 15

_compiler_works = True  # until it fails


def spline_activation(
    x: Float[Tensor, "tok n"],
    coef: Float[Tensor, "bases n"],
    lo: float,
    hi: float,
    grid_size: int,
    order: int = 3,
    *,
    linear_tails: bool = False,
    compiled: bool | None = None,
) -> Float[Tensor, "tok n"]:
    """The splines y_tj = sum_c coef_cj B_c(x_tj), differentiable once by x and by coef.

    Computed in fp32 (fp64 if x is), whatever the autocast, and returned in that type; gradients
    have the type of what they belong to. Only x and coef are kept for backward.

    Args:
        x: Points, in the units of the grid.
        coef: Spline j is column j; `grid_size + order` rows.
        lo: Left end of the grid.
        hi: Right end of the grid.
        grid_size: Number of cells between `lo` and `hi`.
        order: Degree of the pieces, at least 1.
        linear_tails: Beyond the grid, continue each spline by its tangent at the end. Otherwise
            it fades to zero over `order` more cells.
        compiled: Use kernels made by torch.compile, for order 3, in some twenty seconds at the
            first step; without a working compiler (C++ on the CPU, Triton on a GPU) this is
            logged once and the eager form goes on. None does so from `COMPILED_FROM` elements.
    """
    if compiled is None:
        compiled = x.numel() >= COMPILED_FROM
    compiled = compiled and order == 3 and x.numel() > 0
    grid = _Grid(lo, hi, grid_size, order, linear_tails)
    y: Tensor = _Splines.apply(x, None, coef, grid, compiled)
    return y


def spline_values(
    values: Float[Tensor, " nnz"],
    which: Int[Tensor, " nnz"],
    coef: Float[Tensor, "bases n"],
    lo: float,
    hi: float,
    grid_size: int,
    order: int = 3,
    *,
    linear_tails: bool = False,
) -> Float[Tensor, " nnz"]:
    """The same splines on kept values only: value i goes through spline `which[i]`.

    Differentiable once by values and by coef; values, which and coef are kept for backward.

    Args:
        values: Points, in the units of the grid.
        which: Column of `coef` for each value.
        coef: Spline j is column j; `grid_size + order` rows.
        lo: Left end of the grid.
        hi: Right end of the grid.
        grid_size: Number of cells between `lo` and `hi`.
        order: Degree of the pieces, at least 1.
        linear_tails: As in `spline_activation`.
    """
    grid = _Grid(lo, hi, grid_size, order, linear_tails)
    y: Tensor = _Splines.apply(values.unsqueeze(1), which.unsqueeze(1), coef, grid, False)
    return y.squeeze(1)


class _Splines(torch.autograd.Function):
    """Both functions: `which` names the spline of each point, None that of its column."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tok m"],
        which: Int[Tensor, "tok m"] | None,
        coef: Float[Tensor, "bases n"],
        grid: _Grid,
        compiled: bool,
    ) -> Float[Tensor, "tok m"]:
        """The values, in fp32 or fp64."""
        ctx.save_for_backward(x, which, coef)
        ctx.settings = grid, compiled
        with torch.autocast(x.device.type, enabled=False):
            y = _compiled(_values, grid, x, coef) if compiled else None
            return _look_up(x, which, coef, grid) if y is None else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Float[Tensor, "tok m"]) -> tuple[Tensor | None, ...]:
        """The gradients that are wanted; compiled, each has a loop of its own."""
        x, which, coef = ctx.saved_tensors
        grid, compiled = ctx.settings
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grads: list[Tensor | None] = [None, None]
        with torch.autocast(x.device.type, enabled=False):
            if compiled:
                for i, pull in enumerate((_pull_x, _pull_coef)):
                    grads[i] = _compiled(pull, grid, x, coef, grad_y) if wanted[i] else None
            if any(want and grad is None for want, grad in zip(wanted, grads, strict=True)):
                grads = _pull_looked_up(x, which, coef, grid, grad_y, *wanted)
        return grads[0], None, grads[1], None, None


def _look_up(
    x: Float[Tensor, "tok m"],
    which: Int[Tensor, "tok m"] | None,
    coef: Float[Tensor, "bases n"],
    grid: _Grid,
) -> Float[Tensor, "tok m"]:
    """The values, eagerly, a few rows at a time."""
    y = torch.empty_like(x, dtype=_exact(x[:0]).dtype)
    table = _table(coef, grid, y.dtype)
    for rows in _row_blocks(x):
        t, entry = _locate(x[rows], which if which is None else which[rows], coef, grid)
        y[rows] = _polynomial(table, t, entry)
    return y


def _pull_looked_up(
    x: Float[Tensor, "tok m"],
    which: Int[Tensor, "tok m"] | None,
    coef: Float[Tensor, "bases n"],
    grid: _Grid,
    grad_y: Float[Tensor, "tok m"],
    need_x: bool,
    need_coef: bool,
) -> list[Tensor | None]:
    """Gradients to x and to coef; the latter are first those of the table, added up per entry."""
    table = _table(coef, grid, grad_y.dtype)
    degrees = torch.arange(1, len(table), dtype=table.dtype, device=table.device)
    slopes = table[1:] * (degrees / grid.cell).unsqueeze(1)
    grad_x = torch.empty_like(x) if need_x else None
    grad_table = torch.zeros_like(table) if need_coef else None
    for rows in _row_blocks(x):
        t, entry = _locate(x[rows], which if which is None else which[rows], coef, grid)
        grad = grad_y[rows]
        if grad_x is not None:
            grad_x[rows] = _polynomial(slopes, t, entry).mul_(grad)
        if grad_table is not None:
            for power, total in enumerate(grad_table):
                grad = grad * t if power else grad
                total.index_add_(0, entry, grad.flatten())
    if grad_table is None:
        return [grad_x, None]
    pieces = _pieces(grid, coef.device)
    grad_coef = pieces.t() @ grad_table.view(len(pieces), -1).double()
    return [grad_x, grad_coef.to(coef.dtype)]


def _polynomial(
    table: Float[Tensor, "powers entries"],
    t: Float[Tensor, "rows m"],
    entry: Int[Tensor, " points"],
) -> Float[Tensor, "rows m"]:
    """Horner's rule with coefficients from the table: sum_d table[d, entry] t^d."""
    y = table[-1].index_select(0, entry).view_as(t)
    for power in range(len(table) - 2, -1, -1):
        y = table[power].index_select(0, entry).view_as(t).addcmul_(y, t)
    return y


def _locate(
    x: Float[Tensor, "rows m"],
    which: Int[Tensor, "rows m"] | None,
    coef: Float[Tensor, "bases n"],
    grid: _Grid,
) -> tuple[Float[Tensor, "rows m"], Int[Tensor, " points"]]:
    """The place of each point within its cell, and the entry of the table it belongs to."""
    if which is None:
        which = torch.arange(coef.shape[1], dtype=torch.int32, device=x.device)
    first, last = _cells(grid)
    u = _position(_exact(x), grid).sub_(first)
    inside = u.clamp(0, last - first)
    if not grid.linear_tails:
        u = inside  # all is 0 there; inf * 0 is not
    cell = inside.nan_to_num(0).int()  # floor() would use threads whatever the size
    return u.sub_(cell), torch.add(which, cell, alpha=coef.shape[1]).flatten()


def _row_blocks(x: Float[Tensor, "tok m"]) -> Iterator[slice]:
    """Rows to work on at a time."""
    return blocks(len(x), rows_at_once(x, x.shape[1], _CPU_BLOCK))


def _cells(grid: _Grid) -> tuple[int, int]:
    """First and last cell of the table: the endless one on either side is a cell as well."""
    beyond = 0 if grid.linear_tails else grid.order
    return -1 - beyond, grid.size + beyond


def _table(
    coef: Float[Tensor, "bases n"], grid: _Grid, dtype: torch.dtype
) -> Float[Tensor, "powers entries"]:
    """Polynomial coefficients of every spline in every cell, entry = cell * n + spline.

    Made in fp64, as torch.set_float32_matmul_precision may round the factors of fp32 products.
    """
    table = _pieces(grid, coef.device) @ coef.double()
    return table.to(dtype).view(grid.order + 1, -1)


@lru_cache
def _pieces(grid: _Grid, device: torch.device) -> Float[Tensor, "pieces bases"]:
    """Coefficient of t^d in cell k of each basis, fp64; pieces = (order + 1) cells, d-major.

    Interpolates every basis at `order + 1` points of a cell. The coefficients are multiples of
    1 / order!, so rounding to these makes them exact, and a tail is straight however long it is.
    """
    first, last = _cells(grid)
    powers = torch.arange(grid.order + 1, dtype=torch.float64, device="cpu")
    t = (powers + 0.5) / len(powers)
    cells = torch.arange(first, last + 1, dtype=torch.float64, device="cpu")
    bases = _bases((cells.unsqueeze(1) + t).view(-1, 1), grid).view(len(cells), len(t), -1)
    pieces = torch.linalg.solve(t.unsqueeze(1) ** powers, bases).transpose(0, 1).flatten(0, 1)
    return ((pieces * factorial(grid.order)).round() / factorial(grid.order)).to(device)


def _compiled(kernel: Callable[..., Tensor], grid: _Grid, *tensors: Tensor) -> Tensor | None:
    """The compiled kernel's result, or None where there is no working compiler."""
    global _compiler_works
    if not _compiler_works:
        return None
    from torch._dynamo import exc, maybe_mark_dynamic

    # fresh and contiguous, so that neither marks nor strides nor requires_grad compile it again
    args = [tensor.detach().contiguous() for tensor in tensors]
    for arg in (args[0], *args[2:]):
        maybe_mark_dynamic(arg, 0)  # tokens
    edges = _edge_slopes(grid.order) if grid.linear_tails else ()
    try:
        return _jit(kernel)(grid, edges, *args)
    except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        log.warning("spline activations are not compiled, which is slower: %s", reason[0])
        _compiler_works = False
        return None


@lru_cache
def _jit(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel in a form that compiles itself when it meets a new kind of input."""
    with warnings.catch_warnings():
        # torch 2.13 deprecates what its own compiler defines at import
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._inductor.compile_fx  # noqa: F401
    return torch.compile(kernel, fullgraph=True)


def _values(
    grid: _Grid,
    edges: tuple[float, ...],
    x: Float[Tensor, "tok n"],
    coef: Float[Tensor, "bases n"],
) -> Float[Tensor, "tok n"]:
    """Kernel: the splines."""
    u = _position(_exact(x), grid)
    return _weighed(coef, _planes(u, grid, edges))


def _pull_x(
    grid: _Grid,
    _: tuple[float, ...],
    x: Float[Tensor, "tok n"],
    coef: Float[Tensor, "bases n"],
    grad_y: Float[Tensor, "tok n"],
) -> Float[Tensor, "tok n"]:
    """Kernel: the gradient to x."""
    slopes = _slopes(_position(_exact(x), grid), grid).unbind(1)
    return (_weighed(coef, slopes) * grad_y / grid.cell).to(x.dtype)


def _pull_coef(
    grid: _Grid,
    edges: tuple[float, ...],
    x: Float[Tensor, "tok n"],
    coef: Float[Tensor, "bases n"],
    grad_y: Float[Tensor, "tok n"],
) -> Float[Tensor, "bases n"]:
    """Kernel: the gradient to coef, all of its rows added up in one pass over the tokens."""
    planes = _planes(_position(_exact(x), grid), grid, edges)
    return torch.stack([(grad_y * plane).sum(0) for plane in planes]).to(coef.dtype)


def _weighed(coef: Float[Tensor, "bases n"], planes: Sequence[Tensor]) -> Float[Tensor, "tok n"]:
    """sum_c coef_c planes_c, plane after plane, for a compiler to unroll."""
    total = coef[0] * planes[0]
    for weight, plane in zip(coef[1:], planes[1:], strict=True):
        total = total + weight * plane
    return total


def _planes(
    u: Float[Tensor, "tok n"], grid: _Grid, edges: tuple[float, ...]
) -> list[Float[Tensor, "tok n"]]:
    """The bases at u, as `splines._bases` makes them, but for a compiler: not as one tensor."""
    inside = u.clamp(0, grid.size) if grid.linear_tails else u
    planes = list(_inner_bases(inside, grid).unbind(1))
    below, above = u.clamp_max(0), (u - grid.size).clamp_min(0)
    for c, slope in enumerate(edges):
        if slope:
            planes[c] = planes[c] + slope * below
            planes[-1 - c] = planes[-1 - c] - slope * above
    return planes
