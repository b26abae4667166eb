"""Shuffled activations: fresh rows in, as many random held rows out, shapes fixed."""

import logging
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)


class ShuffleBuffer:
    """Holds activation rows on the device, and a queue of rows not yet held.

    Neighbouring tokens are alike; a batch drawn at random from many documents is not. The LM
    gives rows in odd numbers (special tokens are dropped): they wait in the queue until a whole
    batch is there. Each row leaves exactly once; nothing is allocated after `allocate_`.

    Args:
        capacity_tokens: Rows held, over all processes; a quarter of a million mixes a few hundred
            documents. 0 turns the buffer off: rows leave in the order of the text.
        dtype: Number format rows are held in.
    """

    def __init__(
        self,
        capacity_tokens: int = 262_144,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        if capacity_tokens < 0:
            raise InputError(
                f"buffer.capacity_tokens={capacity_tokens}: must be 0 (no shuffling) or more"
            )
        self.capacity_tokens = capacity_tokens
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.filled = 0
        self.queued = 0
        self.held = torch.empty(0)
        self.queue = torch.empty(0)
        self.generator = torch.Generator()

    @property
    def capacity(self) -> int:
        """Rows that this process holds of `capacity_tokens`."""
        return len(self.held)

    @property
    def allocated(self) -> bool:
        """Whether `allocate_` was called."""
        return len(self.queue) > 0

    def allocate_(
        self, d_model: int, queue_tokens: int, device: torch.device, seed: int, world: int = 1
    ) -> None:
        """Take all the memory there will be.

        Args:
            d_model: Width of a row.
            queue_tokens: Rows the queue can hold: a batch and what one LM pass may add.
            device: Where rows live.
            seed: Seed of the draws.
            world: Processes among which `capacity_tokens` are dealt out.
        """
        rows = self.capacity_tokens // world
        self.held = torch.zeros(rows, d_model, dtype=self.dtype, device=device)
        self.queue = torch.zeros(queue_tokens, d_model, dtype=self.dtype, device=device)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.filled = self.queued = 0

    def push_(self, rows: Float[Tensor, "tok d_model"]) -> None:
        """Add fresh rows: to the buffer while it is filling, then to the queue."""
        room = min(len(rows), self.capacity - self.filled)
        if room:
            self.held[self.filled : self.filled + room] = rows[:room].to(self.dtype)
            self.filled += room
        rest = rows[room:]
        assert self.queued + len(rest) <= len(self.queue), "queue overrun"
        self.queue[self.queued : self.queued + len(rest)] = rest.to(self.dtype)
        self.queued += len(rest)

    def wants(self, n: int) -> bool:
        """Whether rows must still be pushed before `swap_(n)`."""
        return self.filled < self.capacity or self.queued < n

    def swap_(self, n: int) -> Float[Tensor, "tok d_model"]:
        """Put n queued rows in the places of n random held rows, which are returned in fp32."""
        assert not self.capacity or n <= self.capacity, "the buffer must hold a batch"
        assert not self.wants(n), "push more rows first"
        if self.capacity:
            places = torch.randperm(
                self.capacity, generator=self.generator, device=self.held.device
            )[:n]
            out = self.held[places].float()
            self.held[places] = self.queue[:n]
        else:
            out = self.queue[:n].float().clone()
        self.queued -= n
        self.queue[: self.queued] = self.queue[n : n + self.queued].clone()
        return out

    def sample(self, n: int) -> Float[Tensor, "tok d_model"]:
        """The first n held rows in fp32: training activations, still in the buffer afterwards."""
        return self.held[: min(n, self.filled)].float()

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on exactly, as tensors: views, good until rows come or go."""
        return {
            "held": self.held[: self.filled],
            "queue": self.queue[: self.queued],
            "generator": self.generator.get_state(),
        }

    def load_(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()`; `allocate_` comes first.

        What is more than this process can hold waits in its queue: so it is where other processes
        held it before. The draws of a GPU cannot go on on a CPU, nor the other way round: there
        they begin anew from the seed.

        Raises:
            InputError: The state is of a buffer of another size, width or format.
        """
        held, queue = state["held"], state["queue"]
        if held.shape[1:] != self.held.shape[1:] or held.dtype != self.dtype:
            raise InputError(
                f"buffer: the checkpoint holds {tuple(held.shape)} {held.dtype}, this run wants "
                f"{tuple(self.held.shape)} {self.dtype}; continue with the run's own configuration"
            )
        queue = torch.cat([held[self.capacity :], queue])
        held = held[: self.capacity]
        if len(queue) > len(self.queue):
            room = len(self.queue) + len(queue)
            self.queue = self.queue.new_zeros(room, *self.queue.shape[1:])
        self.filled, self.queued = len(held), len(queue)
        self.held[: self.filled] = held.to(self.held.device)
        self.queue[: self.queued] = queue.to(self.queue.device)
        draws = state.get("generator")
        if draws is None:
            return
        if draws.shape == self.generator.get_state().shape:
            self.generator.set_state(draws)
        else:  # the generators of a CPU and of a GPU have nothing in common
            log.warning(
                "the checkpoint was made on another kind of device than %s: the buffer's draws "
                "begin anew from the run's seed, so this run will not be the same as an "
                "undisturbed one bit for bit",
                self.held.device,
            )


def dealt(states: list[dict[str, Tensor]], rank: int, world: int) -> dict[str, Tensor]:
    """The share of one of `world` processes in what others held, every row once.

    Draws begin anew from the process's own seed.

    Args:
        states: `ShuffleBuffer.state()` of all processes that there were.
        rank: Which of the processes this is.
        world: How many there are now.
    """
    return {
        name: torch.cat([state[name] for state in states])[rank::world].clone()
        for name in ("held", "queue")
    }
