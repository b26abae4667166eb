"""Faults to be planted in a step, each of which its budget must notice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kanllama_lightning.heads.encoders import LinearEncoder


def wait(x: Tensor) -> Tensor:
    """Reads a number from the device."""
    x.sum().item()
    return x


def copy(x: Tensor) -> Tensor:
    """Takes a constant from the host, as if it were not the same in every step."""
    return x + torch.tensor([0.0], device=x.device)


def launches(x: Tensor) -> Tensor:
    """Goes through the rows a few at a time, as is right on a CPU."""
    return torch.cat([part + 0 for part in x.split(32)])


def memory(x: Tensor) -> Tensor:
    """Holds four batches of pre-activations at once."""
    return x + torch.cat([x.new_zeros(4, len(x), 16_384)]).amax()


def mismatch(x: Tensor) -> Tensor:
    """Mixes devices."""
    return x + torch.zeros(x.shape[1], device="cpu")


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    fault.__name__: fault for fault in (wait, copy, launches, memory, mismatch)
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Let every linear encoder have this fault; none where the name is empty."""
    if not name:
        yield
        return
    branches, fault = LinearEncoder.branches, FAULTS[name]

    def faulty(self: LinearEncoder, x: Tensor, b_dec: Tensor) -> Any:
        return branches(self, fault(x), b_dec)

    LinearEncoder.branches = faulty  # type: ignore[method-assign]
    try:
        yield
    finally:
        LinearEncoder.branches = branches  # type: ignore[method-assign]
