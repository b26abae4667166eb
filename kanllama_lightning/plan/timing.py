"""What a step of a head and a pass of the LM take on this machine, measured in some seconds."""

import copy
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from lightning.pytorch.cli import OptimizerCallable

from kanllama_lightning.functional.lens import logit_lens
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.hook_points import HookPoint
from kanllama_lightning.lm.large_products import multiply_faster_
from kanllama_lightning.training.head_trainer import HeadTrainer

BUDGET_S = 2.0
"""For each head, and for the LM; what is slow is measured on fewer rows, and three times still."""
REPEATS = 3
FIRST_ROWS = 256
MOST_ROWS = {"cpu": 1024, "cuda": 8192}
"""Rows of a step: a GPU needs about a whole batch to be busy."""
MOST_POSITIONS = 4096
"""Tokens of a pass of the LM."""
MOST_VOCABULARY = 8192
"""Tokens of the unembedding that is timed."""
LENS_VOCABULARY, LENS_DIRECTIONS, LENS_BINS = 1 << 16, 64, 60
"""Tokens, directions and bins of the logit lens that is timed."""
FEWER = 4
"""A step is measured on so many times fewer rows too: what both have in common is per step."""
PROGRESS = 0.5


class HeadTime(NamedTuple):
    """Seconds that training a head takes."""

    per_token: float
    """Forward, losses, backward."""
    per_step: float
    """What comes on top, whatever the size of the batch: dense gradients, clipping, Adam."""


def head_time(
    trainee: HeadTrainer, optimizer: OptimizerCallable, device: torch.device, autocast: bool
) -> HeadTime:
    """Time real steps on random rows, from which the head starts: none of its latents is dead.

    Args:
        trainee: Untrained; of no use afterwards, as it has learned from noise.
        optimizer: As for training.
        device: Where the run would be.
        autocast: Whether the head trains in bf16-mixed.
    """
    trainee.to(device).train()
    head = trainee.head
    most = min(trainee.schedule.batch, MOST_ROWS[device.type])
    # the start wants rows enough for quantiles, however small the batch is
    sample = torch.randn(MOST_ROWS["cpu"], head.d_row, generator=_seeded()).to(device)
    head.start_(sample)
    x = sample.repeat(-(-most // len(sample)), 1)[:most]
    adam = optimizer([{"params": list(head.parameters())}])

    def passes(n: int) -> None:
        adam.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            losses, _ = trainee.step(x[:n], 1, PROGRESS)
            loss = torch.stack(list(losses.values())).sum()
        loss.backward()

    def update() -> None:
        head.project_grad_()
        trainee.clip_(None, "norm")
        adam.step()
        head.project_()

    many = _affordable(passes, most, device)
    few = max(1, many // FEWER)
    passes(few)
    update()  # the first makes the moments
    large, small, updates = _fastest([lambda: passes(many), lambda: passes(few), update], device)
    adam.zero_grad()
    trainee.to("cpu")
    slope = max(0.0, large - small) / (many - few) if many > few else 0.0
    per_token = min(slope, large / many)
    return HeadTime(per_token, large - many * per_token + updates)


def lm_seconds(lm: FrozenLM, lm_batch_seqs: int, ctx_len: int, device: torch.device) -> float:
    """Seconds per position of the LM up to its hook point, timed with one random block.

    Args:
        lm: Its weights need not be loaded.
        lm_batch_seqs: Rows of a pass.
        ctx_len: Positions per row.
        device: Where the run would be.
    """
    probe = lm.one_block(device)
    most = min(lm_batch_seqs * ctx_len, max(MOST_POSITIONS, ctx_len))

    def run(n: int) -> None:
        length = min(n, ctx_len)
        probe.acts(torch.zeros(n // length, length, dtype=torch.int64, device=device))

    n = _affordable(run, most, device)
    length = min(n, ctx_len)
    n -= n % length
    (own,) = _fastest([lambda: run(n)], device)
    if lm.hook.layer == 0:
        return own / n
    probe.hook = HookPoint(0, "resid_post")
    (whole,) = _fastest([lambda: run(n)], device)
    return (lm.hook.layer * whole + own) / n


class RestTime(NamedTuple):
    """Seconds per position that an LM takes from the hook point on."""

    blocks: float
    """To its last hidden state."""
    logits: float
    """From there to the losses, in fp32 whatever the LM's number format."""


def lm_rest_seconds(
    lm: FrozenLM, upto: float, lm_batch_seqs: int, ctx_len: int, device: torch.device
) -> RestTime:
    """How long it takes to go on from the hook point to the losses, timed the same way.

    Args:
        lm: Its weights need not be loaded.
        upto: Seconds per position up to the hook point, as of `lm_seconds`.
        lm_batch_seqs: Rows of a pass.
        ctx_len: Positions per row.
        device: Where the run would be.
    """
    probe = lm.one_block(device)
    probe.hook = HookPoint(0, "resid_post")
    rows = max(1, min(lm_batch_seqs, MOST_POSITIONS // ctx_len))
    ids = torch.zeros(rows, ctx_len, dtype=torch.int64, device=device)
    vocab = min(lm.vocab_size, MOST_VOCABULARY)
    hidden = torch.randn(64, lm.d_model, generator=_seeded()).to(device)
    unembedding = torch.nn.Linear(lm.d_model, vocab, bias=False, device=device)
    multiply_faster_(unembedding.requires_grad_(False))

    def losses() -> None:
        logits = unembedding(hidden).log_softmax(-1)
        (logits.exp() * logits).sum(-1)

    def block() -> None:
        probe.acts(ids)

    losses()
    whole, end = _fastest([block, losses], device)
    blocks = lm.config.num_hidden_layers * whole / ids.numel() - upto
    return RestTime(max(0.0, blocks), end / len(hidden) * lm.vocab_size / vocab)


def lens_seconds(lm: FrozenLM, device: torch.device) -> float:
    """Seconds per direction of the logit lens as reports use it, timed on a few directions.

    Args:
        lm: Its weights need not be loaded.
        device: Where it would be read.
    """
    vocab = min(lm.vocab_size, LENS_VOCABULARY)
    directions = torch.randn(LENS_DIRECTIONS, lm.d_model, generator=_seeded()).to(device)
    unembedding = torch.randn(vocab, lm.d_model, generator=_seeded()).to(device).T
    gain = torch.ones(lm.d_model, device=device)

    def lens() -> None:
        logit_lens(directions, gain, unembedding, bins=LENS_BINS)

    lens()
    (seconds,) = _fastest([lens], device)
    return seconds / LENS_DIRECTIONS * lm.vocab_size / vocab


def record_lm(lm: FrozenLM) -> FrozenLM:
    """The same LM, still without weights, in the number format that a record runs it in."""
    other = copy.copy(lm)
    other.dtype = torch.float32
    return other


def _affordable(work: Callable[[int], None], most: int, device: torch.device) -> int:
    """Rows, at most so many, on which the work can be repeated within the budget; warms it up."""
    n = min(FIRST_ROWS, most)
    while True:
        work(n)
        passed = _seconds(lambda: work(n), device)  # noqa: B023
        fit = int(BUDGET_S / (REPEATS + 2) / passed * n)
        fit = min(most, fit - fit % FIRST_ROWS, 8 * n)
        if fit <= n:
            return n
        n = fit


def _fastest(works: list[Callable[[], None]], device: torch.device) -> list[float]:
    """Seconds of each, in turns, as often as the budget allows: other work on the machine slows
    some repetitions down many times."""
    seconds: list[list[float]] = []
    while len(seconds) < REPEATS or sum(map(sum, seconds)) < BUDGET_S:
        seconds.append([_seconds(work, device) for work in works])
    return [min(of_one) for of_one in zip(*seconds, strict=True)]


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
