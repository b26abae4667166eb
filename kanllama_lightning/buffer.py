"""Shuffled activations: fresh rows in, as many random held rows out, shapes fixed."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.types import InputError


class ShuffleBuffer:
    """Holds `capacity_tokens` activation rows on the device, and a queue of rows not yet held.

    Neighbouring tokens are alike; a batch drawn at random from many documents is not. The LM
    gives rows in odd numbers (special tokens are dropped): they wait in the queue until a whole
    batch is there. Each row leaves exactly once; nothing is allocated after `allocate_`.

    Args:
        capacity_tokens: Rows held; a quarter of a million mixes a few hundred documents.
        dtype: Number format rows are held in.
    """

    def __init__(
        self,
        capacity_tokens: int = 262_144,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if capacity_tokens < 1:
            raise InputError(f"buffer.capacity_tokens={capacity_tokens}: must be at least 1")
        self.capacity_tokens = capacity_tokens
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.filled = 0
        self.queued = 0
        self.held = torch.empty(0)
        self.queue = torch.empty(0)
        self.generator = torch.Generator()

    def allocate_(self, d_model: int, queue_tokens: int, device: torch.device, seed: int) -> None:
        """Take all the memory there will be.

        Args:
            d_model: Width of a row.
            queue_tokens: Rows the queue can hold: a batch and what one LM pass may add.
            device: Where rows live.
            seed: Seed of the draws.
        """
        self.held = torch.zeros(self.capacity_tokens, d_model, dtype=self.dtype, device=device)
        self.queue = torch.zeros(queue_tokens, d_model, dtype=self.dtype, device=device)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.filled = self.queued = 0

    def push_(self, rows: Float[Tensor, "tok d_model"]) -> None:
        """Add fresh rows: to the buffer while it is filling, then to the queue."""
        room = min(len(rows), self.capacity_tokens - self.filled)
        if room:
            self.held[self.filled : self.filled + room] = rows[:room].to(self.dtype)
            self.filled += room
        rest = rows[room:]
        assert self.queued + len(rest) <= len(self.queue), "queue overrun"
        self.queue[self.queued : self.queued + len(rest)] = rest.to(self.dtype)
        self.queued += len(rest)

    def wants(self, n: int) -> bool:
        """Whether rows must still be pushed before `swap_(n)`."""
        return self.filled < self.capacity_tokens or self.queued < n

    def swap_(self, n: int) -> Float[Tensor, "tok d_model"]:
        """Put n queued rows in the places of n random held rows, which are returned in fp32."""
        assert n <= self.capacity_tokens, "the buffer must hold a batch"
        assert not self.wants(n), "push more rows first"
        places = torch.randperm(
            self.capacity_tokens, generator=self.generator, device=self.held.device
        )[:n]
        out = self.held[places].float()
        self.held[places] = self.queue[:n]
        self.queued -= n
        self.queue[: self.queued] = self.queue[n : n + self.queued].clone()
        return out

    def sample(self, n: int) -> Float[Tensor, "tok d_model"]:
        """The first n held rows in fp32: training activations, still in the buffer afterwards."""
        return self.held[: min(n, self.filled)].float()

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on exactly, as tensors."""
        return {
            "held": self.held[: self.filled].clone(),
            "queue": self.queue[: self.queued].clone(),
            "generator": self.generator.get_state(),
        }

    def load_(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()`; `allocate_` comes first.

        Raises:
            InputError: The state is of a buffer of another size, width or format.
        """
        held, queue = state["held"], state["queue"]
        fits = len(held) <= len(self.held) and len(queue) <= len(self.queue)
        if not fits or held.shape[1:] != self.held.shape[1:] or held.dtype != self.dtype:
            raise InputError(
                f"buffer: the checkpoint holds {tuple(held.shape)} {held.dtype}, this run wants "
                f"{tuple(self.held.shape)} {self.dtype}; continue with the run's own configuration"
            )
        self.filled, self.queued = len(held), len(queue)
        self.held[: self.filled] = held.to(self.held.device)
        self.queue[: self.queued] = queue.to(self.queue.device)
        self.generator.set_state(state["generator"])
