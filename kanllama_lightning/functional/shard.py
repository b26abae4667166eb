"""Latents dealt out over processes: each has every n-th one, and works on the rows of all.

What latents make of a row (its reconstruction, a penalty, a count) is the sum over processes, so
that every process has the same loss and differentiates it by the latents of its own: their
gradients need no exchange. What all processes hold alike (b_dec) learns by the latents of all.
Where heads ask for other processes' part they ask `SHARD`, which is None unless latents are dealt
out. All processes must call the same methods in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LatentShard(NamedTuple):
    """The latents j of one process: those with j % world == rank.

    Every n-th one, not a block: where the first latents do most of the work (Matryoshka) each
    process has its share of it.
    """

    rank: int
    world: int

    @contextmanager
    def used(self) -> Iterator[None]:
        """Where heads hold the latents of this process alone."""
        token = SHARD.set(self)
        try:
            yield
        finally:
            SHARD.reset(token)

    def numbers(self, latents: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """What latents of this process are called among all."""
        return latents * self.world + self.rank

    # ------------------------------------------------------------ tensors of latents

    @torch.no_grad()
    def own(self, x: Shaped[Tensor, "..."], dim: int) -> Shaped[Tensor, "..."]:
        """This process's part of a tensor with a row for each latent, a copy of its own.

        Stored with the latents first, as encoders are.

        Args:
            x: The whole of it.
            dim: Along which latents lie; their number is a multiple of that of processes.
        """
        rows = x.movedim(dim, 0)[self.rank :: self.world]
        return rows.clone(memory_format=torch.contiguous_format).movedim(0, dim)

    @torch.no_grad()
    def whole(self, x: Shaped[Tensor, "..."], dim: int) -> Shaped[Tensor, "..."]:
        """The tensor that all processes' parts are of; a copy, on every process."""
        parts = self._gathered(x.movedim(dim, 0).contiguous())
        return parts.transpose(0, 1).flatten(0, 1).movedim(0, dim)

    # ------------------------------------------------------------ numbers of a step

    def rows(self, x: Float[Tensor, "own n"]) -> Float[Tensor, "tok n"]:
        """The rows of all processes, which give equally many, in the order of ranks."""
        return self._gathered(x.contiguous()).flatten(0, 1)

    def each(self, number: int, device: torch.device) -> list[int]:
        """A number of every process, in the order of ranks; waits for the device."""
        found = torch.zeros(self.world, dtype=torch.int64, device=device)
        found[self.rank] = number
        dist.all_reduce(found)
        return [int(one) for one in found.tolist()]

    def total(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over processes of what their latents make; differentiable by the own part."""
        summed: Tensor = _Summed.apply(x)
        return summed

    def smallest(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Element by element, the smallest over processes; detached."""
        least = x.detach().clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return least

    def shared(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """x, which all processes hold alike; its gradient is that by the latents of all."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x
        same: Tensor = _Alike.apply(x)
        return same

    def joined(self, x: Float[Tensor, "tok own"]) -> Float[Tensor, "tok all"]:
        """Columns that are dealt out as latents are, of all processes; differentiable by the own
        ones, the gradient being the same on all processes (`shared`)."""
        every: Tensor = _Joined.apply(x, self)
        return every

    @torch.no_grad()
    def among(self, values: Float[Tensor, "tok m"], k: int, width: int) -> Bool[Tensor, "tok m"]:
        """Which values are among the k largest of their row over all processes.

        Of equal values at the cut-off any are, and all processes take the same ones for it.

        Args:
            values: Candidates of this process: its k largest of each row, or all that it has.
            k: How many, no more than there are candidates in all.
            width: The most candidates that a process has in a row.
        """
        m = values.shape[1]
        parts = self._gathered(F.pad(values, (0, width - m), value=-torch.inf).contiguous())
        every = parts.movedim(0, 1).flatten(1)
        best = every.topk(k, dim=1, sorted=False).indices
        wins = torch.zeros_like(every, dtype=torch.bool).scatter_(1, best, True)
        return wins[:, self.rank * width :][:, :m]

    def _gathered(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "world *shape"]:
        parts = x.new_empty(self.world, *x.shape)
        dist.all_gather(list(parts.unbind(0)), x.detach())
        return parts


SHARD: ContextVar[LatentShard | None] = ContextVar("shard", default=None)
"""This process's latents where they are dealt out; what runs in every step asks before it calls."""


class _Summed(torch.autograd.Function):
    """Forward the sum over processes, backward the identity: all have the same loss of it."""

    @staticmethod
    def forward(ctx: Any, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:  # noqa: ARG004
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "*shape"]) -> Tensor:  # noqa: ARG004
        return grad


class _Alike(torch.autograd.Function):
    """Forward the identity, backward the sum over processes, each of which has its latents'."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "*shape"]) -> Tensor:  # noqa: ARG004
        summed = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "tok own"], shard: LatentShard
    ) -> Float[Tensor, "tok all"]:
        ctx.shard = shard
        return shard.whole(x, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "tok all"]) -> tuple[Tensor, None]:
        return ctx.shard.own(grad, 1), None
