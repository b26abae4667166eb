"""Memory, disk and time of a run, and whether an activation cache would pay."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from kanllama_lightning.data.shards import ROW_DTYPE
from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.preflight import checkpoint_bytes, disk_bytes
from kanllama_lightning.plan.costs import (
    SPLICED,
    HeadCost,
    Work,
    head_cost,
    lm_flops,
    start_bytes,
)
from kanllama_lightning.plan.timing import (
    HeadTime,
    RestTime,
    head_time,
    lens_seconds,
    lm_rest_seconds,
    lm_seconds,
    record_lm,
)
from kanllama_lightning.plan.validation import FORWARD, control_runs, spacing, validations
from kanllama_lightning.runs.time_share import VALIDATIONS
from kanllama_lightning.training.dealing import fewer_bytes
from kanllama_lightning.training.head_trainer import HeadTrainer
from kanllama_lightning.training.module import SAEModule

DISK_RATE = 1e9
"""Bytes per second of reading or writing a disk, taken for granted: an ordinary SSD."""
FEW_PERCENT = 0.1
"""Share of a step's time: a smaller share of the LM is not worth a cache."""


class RecordTime(NamedTuple):
    """Seconds that things take in a record, which runs the LM in float32."""

    upto: float
    """A position up to the hook point."""
    rest: RestTime
    """A position on from there."""
    direction: float
    """A direction of the logit lens."""


@dataclass(frozen=True)
class RunEstimate:
    """What a run takes. Bytes, seconds, and operations (one multiply-add is 2).

    Args:
        costs: Costs of each head.
        times: Times of each head, on this machine.
        lm_flops: Per position, up to the hook point.
        lm_seconds: The same in seconds, on this machine.
        tokens: Budget.
        batch: Rows per step.
        filling: Rows that go into statistics and buffer before the first step.
        d_row: Width of a row.
        head_weights: Bytes of all heads' weights.
        lm_weights: Bytes of the LM's.
        buffer: Bytes of the buffer and its queue.
        planes: Latents of all heads: a step holds one number for each, for every row.
        cached: Whether the run reads a cache.
        cache_rows: Rows that a cache of this run holds.
        lm_rest_seconds: Per position, on from the hook point to the losses, on this machine.
        val_tokens: Tokens of each validation set.
        val_sets: How many there are.
        validations: In training, the final one not counted.
        paced: Whether only as many are made as a share of the time pays for.
        start_tokens: Activations that the start statistics are taken of.
        row: Bytes of an activation in the buffer.
        on_cpu: Whether the run is on a CPU: then a checkpoint's copy is in the same memory.
        control_runs: Of the LM, on the first set of the final validation (`control_runs`).
        record: What things take in a record of the heads, on this machine.
        processes: How many train together.
        dealing: For each head, whether its latents are better dealt out over them, and why.
    """

    costs: dict[str, HeadCost]
    times: dict[str, HeadTime]
    lm_flops: float
    lm_seconds: float
    tokens: int
    batch: int
    filling: int
    d_row: int
    head_weights: int
    lm_weights: int
    buffer: int
    planes: int
    cached: bool
    cache_rows: int
    lm_rest_seconds: float = 0.0
    val_tokens: int = 0
    val_sets: int = 0
    validations: int = 0
    paced: bool = False
    start_tokens: int = 0
    row: int = 0
    on_cpu: bool = False
    control_runs: int = 0
    record: RecordTime = RecordTime(0.0, RestTime(0.0, 0.0), 0.0)
    processes: int = 1
    dealing: Mapping[str, tuple[bool, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        lm: FrozenLM,
        module: SAEModule,
        data: TokenData,
        device: torch.device,
        autocast: bool,
        val_check_interval: Any = None,
        processes: int = 1,
    ) -> "RunEstimate":
        """Estimate a run whose parts are built, but neither loaded nor set up.

        Args:
            lm: The LM, without weights.
            module: Gives heads, optimizer, schedule and buffer; its heads are of no use afterwards.
            data: Gives the shape of token batches.
            device: Where the run would be.
            autocast: Whether heads train in bf16-mixed.
            val_check_interval: Steps between two validations; None where the time decides.
            processes: How many train together.
        """
        schedule, buffer = module.schedule, module.buffer
        lm_rows = data.lm_batch_seqs * data.ctx_len
        given: list[HeadTrainer] = list(module.trainees)  # type: ignore[arg-type]
        trainees = {t.name or type(t.head).__name__: t for t in given}
        parameters = list(module.trainees.parameters())
        upto = lm_seconds(lm, data.lm_batch_seqs, data.ctx_len, device)
        rest = lm_rest_seconds(lm, upto, data.val_batch_seqs, data.ctx_len, device)
        record = RecordTime(upto, rest, lens_seconds(lm, device))
        if lm.dtype != torch.float32:
            own = record_lm(lm)
            first = lm_seconds(own, data.val_batch_seqs, data.ctx_len, device)
            second = lm_rest_seconds(own, first, data.val_batch_seqs, data.ctx_len, device)
            record = record._replace(upto=first, rest=second)
        paced, every = val_check_interval is None, val_check_interval
        row = lm.d_row * buffer.dtype.itemsize
        held = buffer.capacity_tokens + schedule.batch + lm_rows
        return cls(
            costs={name: head_cost(t.head, autocast) for name, t in trainees.items()},
            times={
                name: head_time(t, module.optimizer, device, autocast)
                for name, t in trainees.items()
            },
            lm_flops=lm_flops(lm, data.ctx_len),
            lm_seconds=upto,
            tokens=schedule.steps * schedule.batch,
            batch=schedule.batch,
            filling=module.filling_rows,
            d_row=lm.d_row,
            head_weights=sum(p.numel() * p.element_size() for p in parameters),
            lm_weights=lm.n_parameters * lm.dtype.itemsize,
            buffer=held * row,
            planes=sum(t.head.d_sae for t in trainees.values()),
            cached=data.cache is not None,
            cache_rows=data.cache_tokens or schedule.rows_read(module.filling_rows),
            lm_rest_seconds=sum(rest),
            record=record,
            val_tokens=data.val_tokens,
            val_sets=data.val_sets,
            # the last of them would come with the final one
            validations=validations(schedule.steps - 1, spacing(schedule.steps))
            if paced
            else validations(schedule.steps, every),
            paced=paced,
            start_tokens=module.start_tokens,
            row=row,
            on_cpu=device.type == "cpu",
            control_runs=control_runs([t.head for t in given]),
            processes=processes,
            dealing={
                name: fewer_bytes(t.head, processes, schedule.batch, module.sent_dtype.itemsize)
                for name, t in (trainees.items() if processes > 1 else ())
            },
        )

    # ------------------------------------------------------------------ memory and disk

    @property
    def step_memory(self) -> int:
        """What a step saves for its backward pass, and one plane of pre-activations."""
        saved = sum(cost.saved_per_token for cost in self.costs.values())
        return int(self.batch * (saved + 4 * self.planes))

    @property
    def memory(self) -> int:
        """All of it: weights, gradients, two moments of Adam, buffer, LM, start or a step; on a
        CPU what a checkpoint is written from, too."""
        passing = max(self.step_memory, self.start_memory)
        held = 4 * self.head_weights + self.buffer + self.lm_weights
        return held + passing + (self.checkpoint if self.on_cpu else 0)

    @property
    def start_memory(self) -> int:
        """What the start statistics take, in one process."""
        return start_bytes(self.start_tokens, self.row)

    @property
    def checkpoint(self) -> int:
        """A checkpoint, on the disk and as the copy that it is written from."""
        return checkpoint_bytes(self.head_weights, self.buffer)

    @property
    def run_disk(self) -> int:
        """Checkpoints and the head."""
        return disk_bytes(self.head_weights, self.buffer)

    @property
    def cache_disk(self) -> int:
        """A cache of all the run's activations."""
        return self.cache_rows * self.d_row * ROW_DTYPE.itemsize

    # --------------------------------------------------------------------------- time

    @property
    def head_seconds(self) -> float:
        """Seconds of all heads, per token trained on."""
        return sum(t.per_token + t.per_step / self.batch for t in self.times.values())

    @property
    def disk_seconds(self) -> float:
        """Seconds of writing or reading a token's activation."""
        return self.d_row * ROW_DTYPE.itemsize / DISK_RATE

    @property
    def lm_share(self) -> float:
        """Part of a step that the LM takes when there is no cache."""
        return self.lm_seconds / (self.lm_seconds + self.head_seconds)

    @property
    def token_seconds(self) -> float:
        """Per token of the budget, once the buffer is full."""
        return self.head_seconds + (self.disk_seconds if self.cached else self.lm_seconds)

    def seconds(self, runs: int, cached: bool) -> float:
        """Seconds of several runs one after the other, without reading text and validation.

        Args:
            runs: How many, of this kind.
            cached: Whether the first writes a cache, that all read.
        """
        rows = self.tokens + self.filling
        if not cached:
            return runs * (self.tokens * self.head_seconds + rows * self.lm_seconds)
        first = self.cache_rows * (self.lm_seconds + self.disk_seconds)
        return first + runs * (self.tokens * self.head_seconds + rows * self.disk_seconds)

    @property
    def forward_seconds(self) -> float:
        """Per token: the forward pass of all heads."""
        return sum(time.per_token for time in self.times.values()) * FORWARD

    @property
    def seen_seconds(self) -> float:
        """Per token that is validated: one pass up to the hook point, four on from there for a
        head and one more for each further one, and the heads' forward pass."""
        runs = SPLICED + len(self.times)
        return self.lm_seconds + runs * self.lm_rest_seconds + self.forward_seconds

    @property
    def read_seconds(self) -> float:
        """Per token of a record: the pass that all its reports share."""
        return self.record.upto + self.forward_seconds

    def work_seconds(self, work: Work) -> float:
        """What a report takes beside that pass; nothing for requests."""
        priced = work.upto * self.record.upto + work.on * self.record.rest.blocks
        priced += work.logits * self.record.rest.logits
        return priced + work.directions * self.record.direction

    @property
    def validation_seconds(self) -> float:
        """Seconds of one validation, without what looks at weights alone."""
        return self.val_sets * self.val_tokens * self.seen_seconds

    @property
    def all_validations_seconds(self) -> float:
        """Seconds of all validations; in the final one the first set is read with controls too."""
        controls = self.control_runs * self.val_tokens * self.lm_rest_seconds
        return (self.validations_made + 1) * self.validation_seconds + controls

    @property
    def validations_made(self) -> int:
        """Those in training that the time pays for."""
        if not self.paced or not self.validation_seconds:
            return self.validations
        paid = VALIDATIONS / (1 - VALIDATIONS) * self.seconds(1, self.cached)
        return min(self.validations, int(paid / self.validation_seconds))

    @property
    def runs_to_pay(self) -> int | None:
        """Runs from which on a cache saves time; None where it never does."""
        saved = self.seconds(1, cached=False) - (
            self.seconds(2, cached=True) - self.seconds(1, cached=True)
        )
        if saved <= 0:
            return None
        first = self.cache_rows * (self.lm_seconds + self.disk_seconds)
        return max(2, math.floor(first / saved) + 1)
