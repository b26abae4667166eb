"""Uniform B-splines in closed form, and the KAN linear map that recomputes them in backward.

A grid is `grid_size` cells of width h = (hi - lo) / grid_size with `order` more knots beyond each
end, so there are `grid_size + order` bases. Positions on it are counted in cells: u = (x - lo) / h.
Bases are kept plane-major, [tok bases in]: a plane is one basis of every input, so that the planes
of one token are one long row and a KAN layer is a single matrix product.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from kanllama_lightning.functional import kernels

NAME = "kan_planes"
"""The kernels that make the features and pull gradients through them."""

# Bytes of features that go into one matrix product, on the CPU and elsewhere. Every product reads
# (and in backward also writes) something as large as the weight, so a block has to hold a few
# hundred tokens.
_CPU_BLOCK_BYTES = 32 << 20
_DEVICE_BLOCK_BYTES = 256 << 20
# Bytes of one elementwise temporary on the CPU. A dozen passes go over it, so it should stay in
# cache; 1 MiB does so best, but cuts the work into so many parallel regions that their barriers
# cost far more than the cache saves as soon as another process wants a core.
_CPU_FILL_BYTES = 4 << 20


class _Grid(NamedTuple):
    """The grid arguments of the public functions, as one thing to hand around inside."""

    lo: float
    hi: float
    size: int
    order: int
    linear_tails: bool

    @property
    def cell(self) -> float:
        """Width of a cell, in the units of x."""
        return (self.hi - self.lo) / self.size

    @property
    def n_bases(self) -> int:
        """Number of basis functions."""
        return self.size + self.order


def spline_knots(lo: float, hi: float, grid_size: int, order: int = 3) -> Float[Tensor, " n_knots"]:
    """The `grid_size + 2 * order + 1` knots of a uniform grid, in the units of x, fp64.

    Args:
        lo: Left end of the grid.
        hi: Right end of the grid.
        grid_size: Number of cells between `lo` and `hi`.
        order: Degree of the pieces; 3 is cubic.
    """
    return lo + torch.arange(-order, grid_size + order + 1).double() * ((hi - lo) / grid_size)


def greville(lo: float, hi: float, grid_size: int, order: int = 3) -> Float[Tensor, " bases"]:
    """The Greville abscissae, fp64: used as coefficients they make the spline the identity.

    Each is the mean of the `order` knots inside the support of its basis (de Boor, A Practical
    Guide to Splines, ch. IX); sum_c B_c(x) * greville_c = x on [lo, hi].

    Args:
        lo: Left end of the grid.
        hi: Right end of the grid.
        grid_size: Number of cells between `lo` and `hi`.
        order: Degree of the pieces, at least 1.
    """
    return spline_knots(lo, hi, grid_size, order)[1:-1].unfold(0, order, 1).mean(1)


def spline_bases(
    x: Float[Tensor, "tok in"],
    lo: float,
    hi: float,
    grid_size: int,
    order: int = 3,
    *,
    linear_tails: bool = False,
) -> Float[Tensor, "tok bases in"]:
    """Every basis function at every x, in fp32 (fp64 if x is), whatever the autocast.

    Args:
        x: Points, in the units of the grid.
        lo: Left end of the grid.
        hi: Right end of the grid.
        grid_size: Number of cells between `lo` and `hi`.
        order: Degree of the pieces, at least 1; 3 has a closed form, others take the recursion.
        linear_tails: Beyond the grid, continue each basis by its tangent at the end. Otherwise
            the bases fade to zero over `order` more cells, as in efficient-kan.
    """
    grid = _Grid(lo, hi, grid_size, order, linear_tails)
    return _bases(_position(_exact(x), grid), grid)


def spline_slopes(
    x: Float[Tensor, "tok in"],
    lo: float,
    hi: float,
    grid_size: int,
    order: int = 3,
    *,
    linear_tails: bool = False,
) -> Float[Tensor, "tok bases in"]:
    """The derivative of `spline_bases` by x, per unit of x; same arguments, same precision."""
    grid = _Grid(lo, hi, grid_size, order, linear_tails)
    return _slopes(_position(_exact(x), grid), grid) / grid.cell


def kan_linear(
    x: Float[Tensor, "tok in"],
    weight: Float[Tensor, "out planes in"],
    lo: float,
    hi: float,
    grid_size: int,
    order: int = 3,
    base: Callable[[Tensor], Tensor] = F.silu,
    *,
    linear_tails: bool = False,
    compiled: bool = False,
    block_bytes: int | None = None,
) -> Float[Tensor, "tok out"]:
    """The KAN layer y_o = sum_i [W_o0i base(x_i) + sum_c W_o(1+c)i B_c(x_i)], differentiable once.

    Only x and the weight are kept for backward, which makes the planes again, a block of rows at
    a time. The planes are made in fp32 (fp64 if x is) and then cast for the matrix product, to the
    autocast type where autocast is on and to the type of the weight elsewhere; the result has that
    type too, and gradients have the type of what they belong to. On a CUDA device, kernels make the
    planes and pull gradients through them in one pass each, for order 1 and 3 (`kernels`).

    Source: the layer of efficient-kan (github.com/Blealtan/efficient-kan), with its spline scaler
    multiplied into the weight.

    Args:
        x: Inputs, in the units of the grid.
        weight: Plane 0 weighs `base(x)`, plane 1 + c basis c; planes = 1 + grid_size + order.
        lo: Left end of the grid.
        hi: Right end of the grid.
        grid_size: Number of cells between `lo` and `hi`.
        order: Degree of the pieces, at least 1; 3 has a closed form, others take the recursion.
        base: Elementwise function of plane 0; takes x as it is, beyond the grid too.
        linear_tails: Beyond the grid, continue the spline by its tangent at the end instead of
            letting it fade to zero.
        compiled: Make the planes and pull gradients through them with torch.compile: one pass over
            memory instead of a dozen. Needs a compiler and some ten seconds in the first step;
            meant for GPUs. A CPU gains only where it is busy: else the eager blocks stay in cache.
        block_bytes: Size of the buffer of planes, in bytes; None chooses one for the device.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    grid = _Grid(lo, hi, grid_size, order, linear_tails)
    y: Tensor = _KANLinear.apply(x, weight, grid, base, dtype, compiled, block_bytes)
    return y


@torch.no_grad()
def kan_planes(
    x: Float[Tensor, "tok in"],
    lo: float,
    hi: float,
    grid_size: int,
    order: int = 3,
    base: Callable[[Tensor], Tensor] = F.silu,
    *,
    linear_tails: bool = False,
    compiled: bool = False,
) -> Float[Tensor, "tok planes in"]:
    """What `kan_linear` weighs: base(x), then every basis; no gradient.

    In fp32 (fp64 if x is); on a GPU under autocast in its type, to which products round them.
    Arguments as for `kan_linear`, whose memory stays bounded; this holds all planes at once.
    """
    grid = _Grid(lo, hi, grid_size, order, linear_tails)
    shape = len(x), 1 + grid.n_bases, x.shape[1]
    kind, dtype = x.device.type, torch.promote_types(x.dtype, torch.float32)
    if kind != "cpu" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    planes = x.new_empty(shape, dtype=dtype)
    _by_rows(_fill_, compiled, grid, base, x, planes)
    return planes


class _KANLinear(torch.autograd.Function):
    """Planes @ weight, with the planes of a block of rows alive at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tok in"],
        weight: Float[Tensor, "out planes in"],
        grid: _Grid,
        base: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        compiled: bool,
        block_bytes: int | None,
    ) -> Float[Tensor, "tok out"]:
        """One product per block of rows, in `dtype`."""
        ctx.save_for_backward(x, weight)
        ctx.settings = grid, base, dtype, compiled, block_bytes
        with torch.autocast(x.device.type, enabled=False):
            wide = weight.flatten(1).to(dtype)
            y = x.new_empty(len(x), len(weight), dtype=dtype)
            planes = _buffer(x, grid, dtype, block_bytes)
            for rows in blocks(len(x), len(planes)):
                block = planes[: rows.stop - rows.start]
                _by_rows(_fill_, compiled, grid, base, x[rows], block)
                torch.mm(block.flatten(1), wide.t(), out=y[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Float[Tensor, "tok out"]) -> tuple[Tensor | None, ...]:
        """Both gradients from one buffer: planes for the weight, then their gradients for x."""
        x, weight = ctx.saved_tensors
        grid, base, dtype, compiled, block_bytes = ctx.settings
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            wide = weight.flatten(1).to(dtype) if need_x else weight.flatten(1)
            planes = _buffer(x, grid, dtype, block_bytes)
            for rows in blocks(len(x), len(planes)):
                block, grad = planes[: rows.stop - rows.start], grad_y[rows]
                if need_weight:
                    _by_rows(_fill_, compiled, grid, base, x[rows], block)
                    grad_weight = _add_product(grad_weight, grad.t(), block.flatten(1), weight)
                if grad_x is not None:
                    torch.mm(grad, wide, out=block.flatten(1))
                    _by_rows(_pull_, compiled, grid, base, x[rows], block, grad_x[rows])
        if grad_weight is not None:
            grad_weight = grad_weight.view_as(weight)
        elif need_weight:
            grad_weight = torch.zeros_like(weight)
        return grad_x, grad_weight, None, None, None, None, None


def _add_product(
    total: Tensor | None,
    left: Float[Tensor, "out rows"],
    right: Float[Tensor, "rows features"],
    like: Tensor,
) -> Float[Tensor, "out features"]:
    """`total + left @ right` in the type of `like`: the sum over blocks is never made in bf16.

    The first block is its own total, which saves writing and reading a matrix of zeros.
    """
    if total is None:
        return (left @ right).to(like.dtype)
    if right.dtype == like.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)


def _fill_(
    grid: _Grid,
    base: Callable[[Tensor], Tensor],
    x: Float[Tensor, "rows in"],
    planes: Float[Tensor, "rows planes in"],
) -> None:
    """Write base(x) and the bases of x into `planes`, rounding once to its type."""
    points = _exact(x)
    planes[:, 0] = base(points)
    u, bases = _position(points, grid), planes[:, 1:]
    if x.device.type == "cpu" or grid.order != 3 or torch.compiler.is_compiling():
        bases.copy_(_bases(u, grid))
    else:
        _fill_by_halves_(u, grid, bases)


def _fill_by_halves_(
    u: Float[Tensor, "rows in"], grid: _Grid, bases: Float[Tensor, "rows bases in"]
) -> None:
    """Write cubic bases, half of them at a time: what is made on the way takes half the memory."""
    inside, *beyond = _parts(u, grid) if grid.linear_tails else (u,)
    for some in blocks(grid.n_bases, -(-grid.n_bases // 2)):
        made = _cubics(inside, some)
        if beyond:
            _add_tails_(made, some, grid, *beyond)
        bases[:, some] = made
        del made  # before the next is made


def _pull_(
    grid: _Grid,
    base: Callable[[Tensor], Tensor],
    x: Float[Tensor, "rows in"],
    grad_planes: Float[Tensor, "rows planes in"],
    grad_x: Float[Tensor, "rows in"],
) -> None:
    """Write the gradient to x, from that of the planes, into `grad_x`."""
    points = _exact(x)
    base_vjp = torch.func.vjp(base, points)[1]
    (through_base,) = base_vjp(grad_planes[:, 0].to(points.dtype))
    slopes = _slopes(_position(points, grid), grid)
    through_spline = slopes.mul_(grad_planes[:, 1:]).sum(1)
    grad_x.copy_(through_spline.div_(grid.cell).add_(through_base))


def _by_rows(
    work: Callable[..., None],
    compiled: bool,
    grid: _Grid,
    base: Callable[[Tensor], Tensor],
    x: Float[Tensor, "rows in"],
    *others: Tensor,
) -> None:
    """`_fill_` or `_pull_`: by a kernel, compiled on all rows, or eagerly on few at a time."""
    if x.device.type in kernels.DEVICES or kernels.ASSUMED:
        name = _kernel_base(grid, base, x)
        if name is not None and kernels.on(NAME, x.device):
            _by_kernel(work, grid, name, x, *others)
            return
    if compiled:
        work = _compiled(work)
    for rows in blocks(len(x), len(x)) if compiled else _fill_blocks(x, grid):
        work(grid, base, x[rows], *(other[rows] for other in others))


def _kernel_base(grid: _Grid, base: Callable[[Tensor], Tensor], x: Tensor) -> str | None:
    """What the kernels call this base; None if they have not what is asked for."""
    if grid.order not in (1, 3) or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    kinds = {"silu": torch.nn.SiLU, "relu": torch.nn.ReLU, "identity": torch.nn.Identity}
    functions = {"silu": F.silu, "relu": F.relu, "zero": torch.zeros_like}
    for name in kinds | functions:
        if base is functions.get(name) or type(base) is kinds.get(name):
            return name
    return None


def _by_kernel(
    work: Callable[..., None], grid: _Grid, base: str, x: Float[Tensor, "rows in"], *others: Tensor
) -> None:
    """The work in one pass over memory."""
    launch = kernels.fill_planes if work is _fill_ else kernels.pull_planes
    settings = grid.lo, grid.cell, grid.size, grid.order, grid.linear_tails, base
    launch(x.contiguous(), *others, *settings)


@kernels.checked(NAME)
def _check_planes(device: torch.device) -> float:
    """Largest error of both kernels, over the tolerance.

    Inside the grid, on its knots and far outside, each for itself, against the eager form in fp64.
    """
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.linspace(-3, 3, 6), 9 * torch.rand(58, generator=generator) - 4.5])
    errors = [0.0]
    for order, tails in ((3, True), (3, False), (1, True), (1, False)):
        grid = _Grid(-3.0, 3.0, 5, order, tails)
        # on its knots order 1 has two slopes, between which rounding would choose
        near = (points if order > 1 else points + 1e-3).repeat(3, 1)
        for x in (near, 1e3 * near):
            grads = torch.randn(3, 1 + grid.n_bases, x.shape[1], generator=generator)
            planes = torch.empty_like(grads, dtype=torch.float64)
            _fill_(grid, F.silu, x.double(), planes)
            there = x.to(device)
            for dtype, tolerance in ((torch.float32, kernels.FP32), (torch.bfloat16, kernels.BF16)):
                made, pulled = grads.to(device, dtype), torch.empty_like(there)
                exact = torch.empty_like(x, dtype=torch.float64)
                _pull_(grid, F.silu, x.double(), grads.to(dtype).double(), exact)
                _by_kernel(_pull_, grid, "silu", there, made, pulled)
                _by_kernel(_fill_, grid, "silu", there, made)
                errors.append(_relative(pulled, exact) / kernels.FP32)
                errors.append(_relative(made, planes) / tolerance)
    return max(errors)


def _relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||, infinite where anything found is not finite."""
    off, size = (found.double().cpu() - exact).norm(), exact.norm()
    return float(off / size.clamp_min(1e-30)) if off.isfinite() else torch.inf


@lru_cache
def _compiled(work: Callable[..., None]) -> Callable[..., None]:
    """The function in a compiled form that takes any number of rows."""
    return torch.compile(work, dynamic=True)


def _bases(u: Float[Tensor, "tok in"], grid: _Grid) -> Float[Tensor, "tok bases in"]:
    """Bases at u, which is in cells."""
    if not grid.linear_tails:
        return _inner_bases(u, grid)
    inside, below, above = _parts(u, grid)
    planes = _inner_bases(inside, grid)
    _add_tails_(planes, slice(0, grid.n_bases), grid, below, above)
    return planes


def _parts(u: Float[Tensor, "tok in"], grid: _Grid) -> tuple[Tensor, Tensor, Tensor]:
    """u clamped to the grid, and how far it is below and above."""
    return u.clamp(0, grid.size), u.clamp_max(0), (u - grid.size).clamp_min_(0)


def _add_tails_(
    planes: Float[Tensor, "tok some in"],
    some: slice,
    grid: _Grid,
    below: Float[Tensor, "tok in"],
    above: Float[Tensor, "tok in"],
) -> None:
    """Go on by the tangent at either end; `planes` are these bases of all."""
    for c, slope in enumerate(_edge_slopes(grid.order)):
        for place, far, by in ((c, below, slope), (grid.n_bases - 1 - c, above, -slope)):
            if by and some.start <= place < some.stop:
                planes[:, place - some.start].add_(far, alpha=by)


def _inner_bases(u: Float[Tensor, "tok in"], grid: _Grid) -> Float[Tensor, "tok bases in"]:
    """Bases at u without tails: a cubic is ((2-a)+^3 - 4(1-a)+^3) / 6, a cells off its centre."""
    if grid.order != 3:
        return _recursion(u, grid, grid.order)
    return _cubics(u, slice(0, grid.n_bases))


def _cubics(u: Float[Tensor, "tok in"], some: slice) -> Float[Tensor, "tok some in"]:
    """These of the cubic bases."""
    near = (2 - _off_centre(u, some).abs_()).clamp_min_(0)
    core = (near - 1).clamp_min_(0)
    return near.pow_(3).sub_(core.pow_(3), alpha=4).div_(6)


def _slopes(u: Float[Tensor, "tok in"], grid: _Grid) -> Float[Tensor, "tok bases in"]:
    """Derivatives of the bases by u, per cell; tails have the slope of the end they start from."""
    if grid.linear_tails:
        u = u.clamp(0, grid.size)
    if grid.order != 3:
        lower = _recursion(u, grid, grid.order - 1)
        return lower[:, :-1] - lower[:, 1:]
    off = _off_centre(u, slice(0, grid.n_bases))
    near = (2 - off.abs()).clamp_min_(0)
    core = (near - 1).clamp_min_(0)
    return core.pow_(2).mul_(2).sub_(near.pow_(2), alpha=0.5).mul_(off.sign_())


def _off_centre(u: Float[Tensor, "tok in"], some: slice) -> Float[Tensor, "tok some in"]:
    """Distance in cells, with its sign, from the centres of these cubics; the first is at -1."""
    centres = torch.arange(some.start - 1, some.stop - 1, dtype=u.dtype, device=u.device)
    return u.unsqueeze(1) - centres.unsqueeze(1)


def _recursion(
    u: Float[Tensor, "tok in"], grid: _Grid, degree: int
) -> Float[Tensor, "tok bases in"]:
    """Bases of `degree` on the knots of the grid, by Cox-de Boor with half-open cells.

    With tails the last cell is closed, so that u = grid_size (where all points beyond it are
    clamped to) has the values and slopes of the cell inside the grid.
    """
    u = u.clamp(-grid.order - 1, grid.size + grid.order)  # all is 0 there; inf * 0 is not
    cell = u.floor()
    if grid.linear_tails:
        cell = cell.clamp_(0, grid.size - 1)
    starts = torch.arange(-grid.order, grid.size + grid.order, dtype=u.dtype, device=u.device)
    starts = starts.unsqueeze(1)
    planes = (cell.unsqueeze(1) == starts).to(u.dtype)
    for r in range(1, degree + 1):
        since = u.unsqueeze(1) - starts[:-r]
        planes = (since * planes[:, :-1] + (r + 1 - since) * planes[:, 1:]) / r
    return planes


def _edge_slopes(order: int) -> tuple[float, ...]:
    """Slopes per cell, at the left end of a grid, of the first bases; the rest have none.

    The right end is the mirror image: the last bases have the same slopes with the other sign.
    Plain numbers, by Cox-de Boor at a knot, so that torch.compile can read them off.
    """
    values = [1.0]
    for r in range(1, order):
        low = [0.0, *values, 0.0]
        values = [((r - i) * low[i] + (i + 1) * low[i + 1]) / r for i in range(r + 1)]
    return tuple(a - b for a, b in pairwise([0.0, *values, 0.0]))


def _position(x: Float[Tensor, "tok in"], grid: _Grid) -> Float[Tensor, "tok in"]:
    """Where x is, in cells from the left end of the grid."""
    return (x - grid.lo).div_(grid.cell)


def _exact(x: Tensor) -> Tensor:
    """The tensor in fp32, or as it is if that is fp64: bf16 bases would be wrong by 1e-2."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _buffer(
    x: Float[Tensor, "tok in"], grid: _Grid, dtype: torch.dtype, block_bytes: int | None
) -> Float[Tensor, "rows planes in"]:
    """Room for the planes of as many rows as a block holds, and of one at least."""
    shape = 1 + grid.n_bases, x.shape[1]
    size = shape[0] * max(1, shape[1]) * dtype.itemsize
    on_cpu, elsewhere = block_bytes or _CPU_BLOCK_BYTES, block_bytes or _DEVICE_BLOCK_BYTES
    rows = rows_at_once(x, size, on_cpu, elsewhere)
    return x.new_empty(min(rows, len(x)), *shape, dtype=dtype)


def _fill_blocks(x: Float[Tensor, "rows in"], grid: _Grid) -> Iterator[slice]:
    """Rows to work on elementwise at a time."""
    bytes_per_row = grid.n_bases * max(1, x.shape[1]) * 4
    return blocks(len(x), rows_at_once(x, bytes_per_row, _CPU_FILL_BYTES))


def rows_at_once(
    x: Shaped[Tensor, "rows *_"],
    size_of_row: int,
    on_cpu: int,
    elsewhere: int | None = None,
    least: int = 1,
) -> int:
    """How many rows to work on at a time: few on a CPU, whose cache then holds them.

    Args:
        x: What has the rows.
        size_of_row: What one row takes, in any unit.
        on_cpu: What a block may take on a CPU, in the same unit.
        elsewhere: Likewise on a GPU; None for all rows at once.
        least: Rows of a block, whatever they take.
    """
    room = on_cpu if x.device.type == "cpu" else elsewhere
    return max(least, len(x) if room is None else room // max(1, size_of_row))


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices that cut `total` rows into runs of `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size or 1))
