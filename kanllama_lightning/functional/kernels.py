"""Kernels of our own for CUDA devices: their calls, and whether they may be used.

A kernel is used on a device once its self-check there was passed: on a few hundred numbers it must
give what its eager form gives in fp64. `switch_on` checks all of them and says the result in one
log line; a kernel that fails, or cannot be built, is left off with a warning, and its eager form
goes on. The calls are operators of torch, so that fake tensors and dispatch modes see them.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

log = logging.getLogger(__name__)

Check = Callable[[torch.device], float]
"""The largest relative error of a kernel on a device, over its tolerance: at most 1 is right."""

FP32, BF16 = 1e-5, 5e-3
"""Tolerances of the self-checks, relative. In Triton's interpreter fp32 is right to 1e-6; a GPU's
quick divisions and exponentials are off by a few units in the last place more."""
CHECKS: dict[str, Check] = {}
"""The self-check of every kernel."""
ASSUMED: set[str] = set()
"""Kernels that count as checked, on every device (`assumed`)."""
DEVICES = {"cuda"}
"""Kinds of devices on which kernels are checked and used."""
PLANE_BLOCK = 1024
"""Inputs of a row that one program makes the planes of."""
LONGEST_ROW = 16_384
"""Numbers of a row that fit into the registers of one program."""
_found: dict[tuple[str, torch.device], str] = {}
"""Why a kernel is off on a device; empty where it is on."""


def checked(name: str) -> Callable[[Check], Check]:
    """Names the self-check of a kernel."""

    def put(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return put


def on(name: str, device: torch.device) -> bool:
    """Whether a kernel is to be used on a device; the first call for a device checks it there."""
    if name in ASSUMED:
        return True
    return device.type in DEVICES and not _why_off(name, device)


def switch_on(device: torch.device) -> None:
    """Check every kernel on a CUDA device, and say which are on; on others there are none."""
    if device.type in DEVICES:
        kept = [name for name in sorted(CHECKS) if on(name, device)]
        log.info("kernels on %s: %s", device, ", ".join(kept) or "none")


@contextmanager
def assumed(*names: str) -> Iterator[None]:
    """Within it these kernels count as checked: for tests, and for tensors without numbers."""
    before = set(ASSUMED)
    ASSUMED.update(names)
    try:
        yield
    finally:
        ASSUMED.intersection_update(before)


def _why_off(name: str, device: torch.device) -> str:
    key = name, device
    if key not in _found:
        _found[key] = why_wrong(name, device)
        if _found[key]:
            log.warning("kernel %s is off on %s, which is slower: %s", name, device, _found[key])
    return _found[key]


def why_wrong(name: str, device: torch.device) -> str:
    """Runs the self-check of a kernel on a device; empty where it is passed."""
    try:
        error = CHECKS[name](device)
    except Exception as e:  # what compilers and drivers raise has no common class
        said = str(e).strip().splitlines() or [""]
        return f"{type(e).__name__}: {said[0][:200]}"
    return "" if error <= 1 else f"its self-check is off by {error:.3g} times the tolerance"


# ---------------------------------------------------------------------- operators

_library = torch.library.Library("kanllama", "DEF")
_KEYS = ("CUDA", "CPU")  # on the CPU in Triton's interpreter alone


def _operator(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An operator that writes into its arguments and returns nothing."""
    name = schema.split("(")[0]

    def define(launch: Callable[..., None]) -> Callable[..., None]:
        _library.define(schema)
        for key in _KEYS:
            _library.impl(name, launch, key)
        _library.impl(name, lambda *_: None, "Meta")
        operator: Callable[..., None] = getattr(torch.ops.kanllama, name)
        return operator

    return define


def _launch(kernel: str, grid: tuple[int, ...], on: Tensor, *args: Any, **settings: Any) -> None:
    from kanllama_lightning.functional import triton_kernels  # the import takes Triton's time

    if triton_kernels.triton is None:
        raise ImportError("Triton is not installed")
    with torch.cuda.device_of(on):
        getattr(triton_kernels, kernel)[grid](*args, **settings)


def _plane_settings(size: int, order: int, tails: bool, base: str) -> dict[str, Any]:
    return {"SIZE": size, "ORDER": order, "TAILS": tails, "BASE": base, "BLOCK": PLANE_BLOCK}


@_operator(
    "fill_planes(Tensor x, Tensor(a!) planes, float lo, float cell, int size, int order, "
    "bool tails, str base) -> ()"
)
def fill_planes(
    x: Float[Tensor, "rows in"],
    planes: Float[Tensor, "rows planes in"],
    lo: float,
    cell: float,
    size: int,
    order: int,
    tails: bool,
    base: str,
) -> None:
    """Write base(x) and the B-splines of a uniform grid at x into `planes`, in one pass.

    Args:
        x: Points, fp32 or bf16, contiguous.
        planes: Where they go, rounded once; contiguous.
        lo: Left end of the grid.
        cell: Width of a cell.
        size: Cells.
        order: Degree of the pieces, 1 or 3.
        tails: Whether the splines go on as lines beyond the grid.
        base: `silu`, `relu`, `identity` or `zero`.
    """
    rows, n = x.shape
    grid = (rows, -(-n // PLANE_BLOCK))
    settings = _plane_settings(size, order, tails, base)
    _launch("fill_planes", grid, x, x, planes, n, lo, cell, **settings)


@_operator(
    "pull_planes(Tensor x, Tensor grad_planes, Tensor(a!) grad_x, float lo, float cell, int size, "
    "int order, bool tails, str base) -> ()"
)
def pull_planes(
    x: Float[Tensor, "rows in"],
    grad_planes: Float[Tensor, "rows planes in"],
    grad_x: Float[Tensor, "rows in"],
    lo: float,
    cell: float,
    size: int,
    order: int,
    tails: bool,
    base: str,
) -> None:
    """Write the gradient to x, from that to its planes, into `grad_x`; see `fill_planes`."""
    rows, n = x.shape
    grid = (rows, -(-n // PLANE_BLOCK))
    settings = _plane_settings(size, order, tails, base)
    _launch("pull_planes", grid, x, x, grad_planes, grad_x, n, lo, cell, **settings)


@_operator("square_rows(Tensor weight, Tensor grad, Tensor(a!) squares) -> ()")
def square_rows(
    weight: Float[Tensor, "rows n"],
    grad: Float[Tensor, "rows n"],
    squares: Float[Tensor, " rows"],
) -> None:
    """Write each row's squared norm of the gradient, less its part along the row, into `squares`.

    All fp32 and contiguous; rows of `weight` have norm 1.
    """
    rows, n = weight.shape
    _launch("square_rows", (rows,), weight, weight, grad, squares, n, BLOCK=_power_of_2(n))


@_operator(
    "step_rows(Tensor(a!) weight, Tensor grad, Tensor(b!) first, Tensor(c!) second, "
    "Tensor(d!)? shadow, Tensor steps, Tensor factor, float lr, float beta1, float beta2, "
    "float log1, float log2, float eps) -> ()"
)
def step_rows(
    weight: Float[Tensor, "rows n"],
    grad: Float[Tensor, "rows n"],
    first: Float[Tensor, "rows n"],
    second: Float[Tensor, "rows n"],
    shadow: Float[Tensor, "rows n"] | None,
    steps: Float[Tensor, ""],
    factor: Float[Tensor, ""],
    lr: float,
    beta1: float,
    beta2: float,
    log1: float,
    log2: float,
    eps: float,
) -> None:
    """One Adam step of rows that keep norm 1, in one pass; `row_step.step_rows_` says more."""
    rows, n = weight.shape
    settings = {"BETA1": beta1, "BETA2": beta2, "LOG1": log1, "LOG2": log2, "EPS": eps}
    settings |= {"SHADOW": shadow is not None, "BLOCK": _power_of_2(n)}
    written = weight if shadow is None else shadow
    tensors = (weight, grad, first, second, written, steps, factor)
    _launch("step_rows", (rows,), weight, *tensors, n, lr, **settings)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
