"""Heads trained on several processes that each have a part of the latents; imports little."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kanllama_lightning import heads
from kanllama_lightning.functional.shard import LatentShard
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.heads.dealt import dealt_tensors
from kanllama_lightning.training.dealing import COUNTERS, put_together_
from kanllama_lightning.training.head_trainer import HeadTrainer
from kanllama_lightning.training.optim import Adam
from kanllama_lightning.training.schedule import Schedule
from kanllama_lightning.training.traffic import of_latents

D, D_SAE, K, BATCH, N = 16, 128, 4, 64, 4
KINDS: dict[str, dict[str, Any]] = {
    "TopK": {},
    "BatchTopK": {},
    "KANEncoder": {"d_hidden": 12},
    "Matryoshka": {},
    "Gated": {},
    "JumpReLU": {},
    "Standard": {},
    "MLPEncoder": {"d_hidden": 12},
    "KANDirect": {},
    "FrozenDecoder": {},
}
TRANSCODER = "TopK transcoder"


class Part(NamedTuple):
    """Some steps of a run, and its checkpoint."""

    begin: int
    end: int
    file: str | None


def made(kind: str) -> SAEHead:
    """A head that has started; some of its latents hardly ever fire."""
    skip = kind == TRANSCODER
    name = kind.split()[0]
    args = {"transcoder": True, "skip": True} if skip else KINDS[kind]
    head: SAEHead = getattr(heads, name)(d_model=D, d_sae=D_SAE, target_l0=K, seed=1, **args)
    head.start_(batches(head.d_row, 20, first=10_000).flatten(0, 1))
    with torch.no_grad():
        head.get_parameter("encoder.b_enc")[::7] -= 3
    return head


def batches(width: int, steps: int, first: int = 0) -> Tensor:
    """Rows that are sums of a few of a hundred directions, [steps, BATCH, width]."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(100, width, generator=generator)
    found = []
    for step in range(first, first + steps):
        generator.manual_seed(step)
        codes = torch.rand(BATCH, 100, generator=generator)
        found.append(codes.mul(codes > 0.95) @ directions * 3 + 1)
    return torch.stack(found)


def train(
    kind: str, steps: int, shard: LatentShard | None, part: Part | None = None
) -> dict[str, Any]:
    """What is known after so many steps: weights, counters, moments; and how many were dead.

    Args:
        kind: Of the head.
        steps: Of the whole run.
        shard: Which latents; None for all.
        part: Which of the steps are made, and the checkpoint to go on from and to leave.
    """
    head = made(kind).train()
    trainee = HeadTrainer("", head, Schedule(steps * BATCH, BATCH), 5.0)
    trainee.dead_after_tokens = 2 * BATCH
    optimizer = Adam(head.parameters(), lr=2e-3)
    part = part or Part(0, steps, None)
    if part.begin and part.file is not None:
        held = torch.load(part.file, weights_only=True)
        trainee.load_state_dict(held["state_dict"])
        optimizer.load_state_dict(held["optimizer_states"][0])
    if shard is not None:
        tensors = dealt_tensors(head, shard.world)
        trainee.dealt = {f"head.{name}": dim for name, dim in tensors.items()} | COUNTERS
        trainee.deal_(shard, optimizer)
    alike = [p for n, p in trainee.named_parameters() if n not in trainee.dealt]
    dead, losses = 0, torch.zeros(steps)
    for step, whole in enumerate(batches(head.d_row, steps)):
        if not part.begin <= step < part.end:
            continue
        x = whole if shard is None else shard.rows(whole.chunk(shard.world)[shard.rank])
        found, _ = trainee.step(x, step, step / steps)
        loss = torch.stack(list(found.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        if shard is not None:  # as DDP does
            flat = torch.cat([p.grad.flatten() for p in alike if p.grad is not None]) / shard.world
            dist.all_reduce(flat)
            for p, mean in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
                assert p.grad is not None
                p.grad.copy_(mean.view_as(p))
        head.project_grad_()
        trainee.clip_(None, "norm")
        optimizer.step()
        head.project_()
        dead += sum(trainee._dead_of) if shard else len(trainee._dead)
        losses[step] = loss.detach()
    if part.file is not None:
        keeps = shard is None or not shard.rank
        named = {f"trainees.0.{n}": t for n, t in trainee.state_dict().items()}
        checkpoint = {"state_dict": named, "optimizer_states": [optimizer.state_dict()]}
        put_together_(checkpoint, [trainee], optimizer, keeps)
        named = {n.removeprefix("trainees.0."): t for n, t in checkpoint["state_dict"].items()}
        if keeps:
            torch.save(checkpoint | {"state_dict": named}, part.file)
    moments = {n: optimizer.state[p]["exp_avg"] for n, p in trainee.named_parameters()}
    if shard is not None:
        names = trainee.dealt
        moments = {n: shard.whole(m, names[n]) if n in names else m for n, m in moments.items()}
        trainee.gather_()
    state = {f"moment of {n}": m for n, m in moments.items()} | trainee.state_dict()
    return {"state": state, "dead": dead, "losses": losses}


def off(found: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """For each tensor how far it is from another, relative to its size; NaN equals NaN."""
    assert found["state"].keys() == want["state"].keys()
    pairs = {n: (found["state"][n].double(), w.double()) for n, w in want["state"].items()}
    pairs["losses"] = found["losses"].double(), want["losses"].double()
    return {
        n: 0.0
        if torch.equal(a.nan_to_num(), b.nan_to_num())
        else float((a - b).norm() / b.norm().clamp_min(1e-30))
        for n, (a, b) in pairs.items()
    }


class Tally:
    """Counts the collectives that are called: (whether it gathers, bytes of its result)."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[bool, int]] = Counter()
        reduce, gather = dist.all_reduce, dist.all_gather

        def all_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls[False, x.numel() * x.element_size()] += 1
            return reduce(x, *args, **kwargs)

        def all_gather(parts: list[Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls[True, len(parts) * x.numel() * x.element_size()] += 1
            return gather(parts, x, *args, **kwargs)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather


def child(folder: str, kinds: list[str], steps: int) -> None:
    """Train heads of some kinds together, on rows of which each process has a part."""
    shard = LatentShard(dist.get_rank(), dist.get_world_size())
    for kind in kinds:
        found = train(kind, steps, shard)
        torch.save(found, f"{folder}/{kind}-{shard.rank}.pt")


def part_child(folder: str, kinds: list[str], steps: int, begin: int, end: int) -> None:
    """A part of the steps, from the checkpoint of the part before it."""
    shard = LatentShard(dist.get_rank(), dist.get_world_size())
    for kind in kinds:
        train(kind, steps, shard, Part(begin, end, f"{folder}/{kind}.ckpt"))


def broken_child(folder: str, kinds: list[str], steps: int) -> None:
    """The same, without telling b_dec and hidden units what other processes' latents want."""
    LatentShard.shared = lambda _, x: x  # type: ignore[method-assign]
    child(folder, kinds, steps)


def counting_child(folder: str, kinds: list[str]) -> None:
    """Count what is called in a step, where latents are dead."""
    shard, tally = LatentShard(dist.get_rank(), dist.get_world_size()), Tally()
    original, said = HeadTrainer.step, []

    def step(self: HeadTrainer, *args: Any) -> Any:
        said.append((dict(tally.calls), self))
        return original(self, *args)

    HeadTrainer.step = step  # type: ignore[method-assign]
    for kind in kinds:
        said.clear()
        train(kind, 14, shard)
        (before, trainee), (after, _) = said[-2:]
        seen = {k: n for k in after if (n := after[k] - before.get(k, 0))}
        want = Counter(
            (c.gathers, c.bytes) for c in of_latents(made(kind), N, BATCH, 4, trainee._dead_of)
        )
        if not shard.rank:
            said_ = {"seen": sorted(seen.items()), "formula": sorted(want.items())}
            Path(folder, f"{kind}.json").write_text(json.dumps(said_))
