"""Whether heads are dealt out over a run's processes, and checkpoints that hold them whole."""

import logging
from collections.abc import Iterable
from typing import Any, Literal

import torch

from kanllama_lightning.functional.shard import LatentShard
from kanllama_lightning.heads.dealt import dealt_tensors
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.training.head_trainer import HeadTrainer
from kanllama_lightning.training.traffic import of_gradients, of_latents, received
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)

Choice = bool | Literal["auto"]
COUNTERS = {"silent_tokens": 0, "dead_mask": 0}
"""Of a trainer of a head, dealt out with its latents."""


def fewer_bytes(head: SAEHead, world: int, batch: int, row_bytes: int) -> tuple[bool, str]:
    """Whether less is sent where a head's latents are dealt out, and both figures in words.

    No latent is dead; dealt out, all else of a step (optimizer, clipping, memory) is smaller too.
    """
    try:
        dealt = received(of_latents(head, world, batch, row_bytes), world)
    except InputError as e:
        return False, str(e).partition(": ")[2].partition(";")[0]
    whole = received(of_gradients(head), world)
    said = f"{dealt / 1e6:,.3g} MB reach each of {world} processes in a step, {whole / 1e6:,.3g} MB"
    return dealt < whole, f"{said} where each holds all of the head"


def choose_(
    trainees: Iterable[HeadTrainer], choice: Choice, world: int, batch: int, row_bytes: int
) -> None:
    """Say of every head which of its tensors are to be dealt out; none is touched yet.

    Raises:
        InputError: All are to be, and one cannot be.
    """
    for trainee in trainees:
        name = f"{trainee.name}: " if trainee.name else ""
        if choice == "auto":
            deal, why = fewer_bytes(trainee.head, world, batch, row_bytes)
            log.info("%slatents %sdealt out (%s)", name, "" if deal else "not ", why)
        else:
            deal = choice
        trainee.dealt = {}
        if deal:
            tensors = dealt_tensors(trainee.head, world)
            trainee.dealt = {f"head.{key}": dim for key, dim in tensors.items()} | COUNTERS


def put_together_(
    checkpoint: dict[str, Any],
    trainees: Iterable[HeadTrainer],
    optimizer: torch.optim.Optimizer,
    keeps: bool,
) -> None:
    """Put whole tensors in the place of a process's own, so that any number can go on from them.

    Args:
        checkpoint: What is about to be written, as Lightning has collected it.
        trainees: All heads of the run, in their order.
        optimizer: The run's.
        keeps: Whether this process writes; of the others nothing is kept. All take part.
    """

    def whole(shard: LatentShard, value: torch.Tensor, dim: int) -> torch.Tensor:
        found = shard.whole(value, dim)
        return found.cpu() if keeps else value

    places = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {parameter: i for i, parameter in enumerate(places)}
    states = checkpoint["optimizer_states"][0]["state"]
    for at, trainee in enumerate(trainees):
        shard = trainee.shard
        if shard is None:
            continue
        for name, tensor, dim in trainee.dealt_now():
            key = f"trainees.{at}.{name}"
            if key in checkpoint["state_dict"]:
                checkpoint["state_dict"][key] = whole(shard, tensor.detach(), dim)
            number = numbers.get(tensor)
            if number in states:
                states[number] = {
                    k: whole(shard, v, dim)
                    if isinstance(v, torch.Tensor) and v.shape == tensor.shape
                    else v
                    for k, v in states[number].items()
                }
