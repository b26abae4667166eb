"""How fast this machine is, measured in about a second."""

import time
from collections.abc import Callable

import torch

BUDGET_S = 0.25
CPU_FLOPS, GPU_FLOPS = 1 << 30, 1 << 36
"""About the size of one product: larger ones would take too long on a slow format."""
COPIED = 1 << 26


def product_rate(
    device: torch.device, dtype: torch.dtype, rows: int, n_in: int, n_out: int
) -> float:
    """Operations per second of a matrix product [rows, n_in] @ [n_in, n_out], the best of some.

    Args:
        device: Where.
        dtype: Number format.
        rows: Rows of a batch; fewer are taken where those would take long.
        n_in: Columns of the batch.
        n_out: Columns of the product.
    """
    limit = GPU_FLOPS if device.type == "cuda" else CPU_FLOPS
    rows = max(16, min(rows, limit // (2 * n_in * n_out)))
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
