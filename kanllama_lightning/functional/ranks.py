"""Numbers of all processes that train a head together.

Outside `pooled()`, and in a process that trains alone, every function here is the identity: what is
measured or evaluated by one process never waits for another one. Inside, all processes must call
the same functions in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

POOLED: ContextVar[bool] = ContextVar("pooled", default=False)
"""Whether this is inside `pooled()`; what runs in every step asks this before it calls anything."""


@contextmanager
def pooled() -> Iterator[None]:
    """Where numbers are those of all processes."""
    token = POOLED.set(True)
    try:
        yield
    finally:
        POOLED.reset(token)


def world() -> int:
    """Processes whose numbers are pooled; 1 where none are."""
    if not (POOLED.get() and dist.is_available() and dist.is_initialized()):
        return 1
    return int(dist.get_world_size())


def rank() -> int:
    """Which of the pooled processes this is; 0 where none are."""
    return int(dist.get_rank()) if world() > 1 else 0


def _reduced(x: Tensor, op: Any) -> Tensor:
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, op)
    return x


def total(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Element by element, the sum over processes; detached where there are several."""
    return _reduced(x, dist.ReduceOp.SUM)


def smallest(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Element by element, the smallest over processes."""
    return _reduced(x, dist.ReduceOp.MIN)


def largest(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Element by element, the largest over processes."""
    return _reduced(x, dist.ReduceOp.MAX)


def gathered(x: Shaped[Tensor, "n *rest"]) -> list[Shaped[Tensor, "m *rest"]]:
    """The rows of every process, in the order of ranks; their numbers may differ."""
    n = world()
    if n == 1:
        return [x]
    lengths = torch.zeros(n, dtype=torch.int64, device=x.device)
    lengths[rank()] = len(x)
    dist.all_reduce(lengths)
    counts = lengths.tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def rows(x: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "all *rest"]:
    """The rows of all processes, one after the other."""
    parts = gathered(x)
    return x if len(parts) == 1 else torch.cat(parts)


def of_lower_ranks(count: Int[Tensor, ""]) -> Int[Tensor, ""]:
    """The sum of the counts of all processes before this one; nothing is waited for."""
    counts = torch.zeros(world(), dtype=torch.int64, device=count.device)
    counts[rank()] = count
    return total(counts)[: rank()].sum()


def lists(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of ranks."""
    if world() == 1:
        return items
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def summed_squares(x: Float[Tensor, "tok n"]) -> Float[Tensor, ""]:
    """Squared deviations from the mean of all processes' rows, summed over all of them."""
    n = world()
    if n == 1:
        return (x - x.mean(0)).square().sum()
    mean = total(x.sum(0)) / total(x.new_full((), len(x)))
    return total((x - mean).square().sum())
