"""How fast this machine is, measured in about a second."""

import time
from collections.abc import Callable

import torch

BUDGET_S = 0.25
CPU_SIDE, GPU_SIDE = 512, 8192
"""Longest side of a measured product: enough for the full rate, and milliseconds in all formats,
so that the fastest of some is not one that other work on the machine has interrupted."""
COPIED = 1 << 26


def product_rate(
    device: torch.device, dtype: torch.dtype, rows: int, n_in: int, n_out: int
) -> float:
    """Operations per second of a matrix product [rows, n_in] @ [n_in, n_out], the best of some.

    Args:
        device: Where.
        dtype: Number format.
        rows: Rows of a batch.
        n_in: Columns of the batch.
        n_out: Columns of the product.
    """
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    rows, n_in, n_out = min(rows, side), min(n_in, side), min(n_out, side)
    a = torch.randn(rows, n_in, device=device, dtype=dtype)
    b = torch.randn(n_in, n_out, device=device, dtype=dtype)
    out = a @ b
    return 2 * rows * n_in * n_out / _best(lambda: torch.mm(a, b, out=out), device)


def memory_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy."""
    a = torch.zeros(COPIED // 4, device=device)
    b = torch.empty_like(a)
    return 2 * COPIED / _best(lambda: b.copy_(a), device)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest repetition within the budget."""
    work()
    seconds: list[float] = []
    while sum(seconds) < BUDGET_S:
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
