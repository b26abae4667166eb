"""SAEModule: a frozen LM's hook and its heads; one step, one optimizer."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kanllama_lightning.console.phase import Phase
from kanllama_lightning.data.buffer import ShuffleBuffer
from kanllama_lightning.exchange.formats import format_of, read_foreign
from kanllama_lightning.exchange.linear_sae import linear_form
from kanllama_lightning.functional import kernels, ranks, sparse
from kanllama_lightning.functional.moments import norms
from kanllama_lightning.functional.shard import LatentShard
from kanllama_lightning.functional.sinks import sink_limit, within
from kanllama_lightning.heads.head import CARD, SAEHead, Trained, read_card
from kanllama_lightning.heads.sae import flat_name
from kanllama_lightning.lm.frozen import FrozenLM, overflow_hint
from kanllama_lightning.lm.preflight import check_varied, preflight
from kanllama_lightning.measures.head_batch import run_heads
from kanllama_lightning.runs.checkpoints import buffer_file, load_buffer_
from kanllama_lightning.runs.folder import HEAD
from kanllama_lightning.training.clock import StepClock
from kanllama_lightning.training.dealing import choose_, put_together_
from kanllama_lightning.training.drought import Drought
from kanllama_lightning.training.head_trainer import NEVER, HeadTrainer
from kanllama_lightning.training.later import Later
from kanllama_lightning.training.optim import Adam
from kanllama_lightning.training.schedule import Schedule
from kanllama_lightning.training.side_by_side import SideBySide
from kanllama_lightning.types import (
    ActivationBatch,
    InputError,
    RunDiverged,
    TokenBatch,
    ValidationBatch,
)

log = logging.getLogger(__name__)

DIVERGED_FVU = 10.0
"""Training FVU from which a head is said to have diverged; 1 is what a constant reaches."""
CALIBRATION_TOKENS = 32_768
"""Training activations a threshold is calibrated on."""
FEW_SINKS = 1 / 64
"""Share of sinks up to which a GPU has run the LM ahead often enough for the next step."""
REFUSED_PRECISION = {
    "16-mixed": "fp16 overflows at summed squared errors and its gradient scaler skips steps",
    "16": "fp16 overflows at summed squared errors and its gradient scaler skips steps",
    "16-true": "heads need fp32 master weights",
    "bf16-true": "an Adam step of 1e-5 rounds to no change on most bf16 weights",
}


def check_precision(precision: str) -> None:
    """Refuse number formats that heads cannot be trained in.

    Raises:
        InputError: Says why, and what is allowed.
    """
    if precision in REFUSED_PRECISION:
        raise InputError(
            f"trainer.precision={precision!r}: refused, as {REFUSED_PRECISION[precision]}; "
            "allowed: 32-true, bf16-mixed"
        )


def first_folder(root: Path, name: str) -> Path:
    """Folder of the saved head that a head of this name starts from: a run's, or the head's own."""
    if (root / CARD).is_file() or format_of(root) is not None:
        return root
    own = root / name / HEAD
    return own if (own / CARD).is_file() or not (root / HEAD / CARD).is_file() else root / HEAD


def described(head: SAEHead) -> str:
    """Kind and size of a head."""
    return f"{head.title} of {head.d_sae:,} latents on {head.d_model:,} coordinates"


def to_fit(first: SAEHead, head: SAEHead) -> str:
    """What lets a run start from a head, `first`, that the one it trains does not fit."""
    if first.d_model != head.d_model:
        return "give a head of this LM and hook point"
    if first.transcoder != head.transcoder:
        return f"{'give' if first.transcoder else 'leave out'} --lm.input_point"
    skip = getattr(first, "skip", False)
    if skip != getattr(head, "skip", False):
        return f"give --model.head.skip {str(skip).lower()}"
    return f"give --model.head {type(first).__name__} --model.head.d_sae {first.d_sae}"


class RowsAhead(NamedTuple):
    """Activations that a GPU makes before they are needed, and how many of them count."""

    rows: Float[Tensor, "tok d_row"]
    """Those that count first, the sinks behind them."""
    n_kept: Later
    position: Int[Tensor, " 3"]
    """Where the text goes on behind them."""


class SAEModule(L.LightningModule):
    """Trains a head, or several side by side, on the activations of a frozen LM.

    One step is one batch of `sae_batch_tokens` rows, dealt out evenly where several processes train
    together; the LM runs as often as that takes. Every statistic is that of the whole batch.

    Args:
        lm: The frozen LM and its hook point (linked).
        head: The autoencoder to train, or `SideBySide`: several on the same activations.
        optimizer: Built with the heads' parameters, a group for each head.
        buffer: Where activations are shuffled.
        tokens: Budget: rows to train on. Every schedule follows from it.
        sae_batch_tokens: Rows per step, over all processes.
        start_tokens: Activations that the start statistics are taken of (default: 65,536 or
            1 % of the budget, at most a million).
        decay: Share of the run, at its end, over which the learning rate falls to 0; with 1 it
            falls from its peak on.
        clip_ratio: A gradient longer than this many times its running mean is shortened to
            that; catches spikes whatever the scale of the loss.
        init_from: Run, or folder of a saved head or of another tool's SAE, whose weights the head
            starts from instead of random ones; of heads side by side, a run of heads of the same
            names.
        seed: Seed of the shuffling of activations (linked to `seed_everything`).
        deal_latents: Of several processes: whether each trains a part of the latents on all rows,
            instead of all latents on a part of the rows (DDP). `auto` deals out the heads of which
            less is then sent. The results are the same to rounding.
    """

    def __init__(
        self,
        lm: FrozenLM,
        head: Trained,
        optimizer: OptimizerCallable = Adam,
        buffer: ShuffleBuffer | None = None,
        tokens: int = 300_000_000,
        sae_batch_tokens: int = 4096,
        start_tokens: int | None = None,
        decay: float = 0.2,
        clip_ratio: float = 5.0,
        init_from: str | None = None,
        seed: int = 0,
        deal_latents: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__()
        if not clip_ratio > 1:
            raise InputError(f"model.clip_ratio={clip_ratio}: must be larger than 1 (default 5)")
        self.lm, self.optimizer = lm, optimizer
        self.buffer = buffer or ShuffleBuffer()
        if 0 < self.buffer.capacity_tokens < sae_batch_tokens:
            raise InputError(
                f"model.sae_batch_tokens={sae_batch_tokens}: larger than model.buffer."
                f"capacity_tokens={self.buffer.capacity_tokens}; the buffer must hold a batch"
            )
        if start_tokens is not None and start_tokens < 1:
            raise InputError(f"model.start_tokens={start_tokens}: must be at least 1")
        self.schedule = Schedule.of(tokens, sae_batch_tokens, decay)
        self.start_tokens = start_tokens or self.schedule.start_tokens
        self.seed, self.deal_latents = seed, deal_latents
        self.together = head if isinstance(head, SideBySide) else None
        if isinstance(head, SideBySide):
            members = head.members
        else:
            assert isinstance(head, SAEHead)
            members = {"": head}
        for name, one in members.items():
            if next(one.parameters(), None) is None:
                raise InputError(
                    f"model.head{f'.heads.{name}' if name else ''}={type(one).__name__}: a control "
                    "that is not trained, and is measured beside every run; choose another head"
                )
            if one.transcoder != lm.transcodes:
                raise InputError(
                    f"model.head{f'.heads.{name}' if name else ''}: {type(one).__name__} "
                    + (
                        "cannot be a transcoder: leave lm.input_point out, or choose another head"
                        if lm.transcodes
                        else "is a transcoder, and lm.input_point does not say where it reads"
                    )
                )
        self.trainees = nn.ModuleList(
            HeadTrainer(name, member, self.schedule, clip_ratio) for name, member in members.items()
        )
        self.init_from = init_from
        self._first: dict[str, SAEHead] = {}
        self._imported: set[str] = set()
        self.tokens_seen = 0
        self.clock = StepClock()
        self._drought = Drought()
        self._rows_ahead: list[RowsAhead] = []
        # of this process: rows looked at, rows dropped as sinks; where its text goes on
        self.seen = torch.zeros(2, dtype=torch.int64)
        self.data_position = torch.zeros(3, dtype=torch.int64)
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._started = False  # the same on the host: nothing waits for it
        # of this process, on its device: rows that were NaN or infinite
        self.bad_rows: Tensor
        self.register_buffer("bad_rows", torch.zeros((), dtype=torch.int64), persistent=False)
        self._said: set[str] = set()
        self._dealt = False
        self._checked = False

    def heads(self) -> dict[str, SAEHead]:
        """The heads by name; a head that is trained alone has an empty one."""
        return {trainee.name: trainee.head for trainee in self._trainees()}

    @property
    def head(self) -> SAEHead:
        """The first head; what all heads of a run share (sink limit, mean) is in each of them."""
        return self._trainees()[0].head

    def _trainees(self) -> list[HeadTrainer]:
        return list(self.trainees)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Load the LM onto this rank's device; allocate the buffer for training."""
        check_precision(str(self.trainer.precision))
        device, world = self.trainer.strategy.root_device, self.trainer.world_size
        if self.schedule.batch % world:
            raise InputError(
                f"model.sae_batch_tokens={self.schedule.batch}: cannot be dealt out evenly to "
                f"{world} processes; choose a multiple of {world}"
            )
        kernels.switch_on(device)
        if stage == "fit":
            self.clock = StepClock(cuda=device.type == "cuda")
        if stage == "fit" and world > 1:
            self._choose_dealt(world)
        self.lm.load_(device)
        if stage == "fit":
            self._allocate_buffer()

    # ------------------------------------------------- latents dealt out over processes

    @property
    def sent_dtype(self) -> torch.dtype:
        """The narrowest format that holds all numbers of a row: that of the buffer, or the LM's."""
        formats = (self.buffer.dtype, self.lm.dtype)
        return next((one for one in formats if one.itemsize == 2), torch.float32)

    def _choose_dealt(self, world: int) -> None:
        """Say which tensors are dealt out, to DDP too, which leaves them alone."""
        trainees, size = self._trainees(), self.sent_dtype.itemsize
        choose_(trainees, self.deal_latents, world, self.schedule.batch, size)
        dealt = [f"trainees.{i}.{name}" for i, one in enumerate(trainees) for name in one.dealt]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, dealt)

    def _deal_(self) -> None:
        """Keep this process's latents alone, from the first step of a session on."""
        shard = LatentShard(self.trainer.global_rank, self.trainer.world_size)
        for trainee in self._trainees():
            if trainee.dealt:
                trainee.deal_(shard, self.trainer.optimizers[0])
        self._dealt = True

    def on_train_end(self) -> None:
        """Hold all of the heads: nothing is trained any more, but everything is measured."""
        for trainee in self._trainees():
            trainee.gather_()
        self._dealt = False

    def on_validation_model_eval(self) -> None:
        """Hold all of the heads while they are measured: before anything looks at them."""
        for trainee in self._trainees():
            trainee.gather_()
        super().on_validation_model_eval()

    def _allocate_buffer(self) -> None:
        if self.buffer.allocated:
            return
        data: Any = self.trainer.datamodule
        self.buffer.allocate_(
            self.lm.d_row,
            self.batch_rows + data.lm_batch_seqs * data.ctx_len,
            self.trainer.strategy.root_device,
            self.seed + self.trainer.global_rank,
            self.trainer.world_size,
        )

    @property
    def filling_rows(self) -> int:
        """Rows that start statistics and buffer take before the first step, over all processes."""
        return max(self.start_tokens, self.buffer.capacity_tokens)

    @property
    def batch_rows(self) -> int:
        """Rows of a step that this process works on."""
        return self.schedule.batch // self.trainer.world_size

    def on_fit_start(self) -> None:
        """Check within seconds what would otherwise waste hours."""
        self.check_lm(self.trainer.datamodule, self.device)

    def check_lm(self, data: Any, device: torch.device) -> None:
        """Load the LM and check it on validation text, once.

        Args:
            data: Set up.
            device: Where the LM is to run.

        Raises:
            InputError: It cannot be used.
        """
        if not self._checked:
            self.lm.load_(device)
            preflight(self.lm, next(iter(data.val_dataloader()[0])).to(device))
        self._checked = True

    def read_first(self) -> None:
        """Read the heads that this run starts from, if there are any, once.

        Raises:
            InputError: There is none, or it is of another kind or size than what is trained.
        """
        if self.init_from is None or self._first:
            return
        root = Path(self.init_from)
        for name, head in self.heads().items():
            folder = first_folder(root, name)
            try:
                if format_of(folder) is not None:
                    first, origin = read_foreign(folder)
                    about = origin.provenance()
                    self._imported.add(name)
                else:
                    first = SAEHead.load(folder, allow=head.modules_named())
                    about = read_card(folder).get("provenance", {})
            except InputError as e:
                raise InputError(f"model.init_from={self.init_from!r}: {e}") from e
            if not head.fits(first):
                raise InputError(
                    f"model.init_from={self.init_from!r}: {folder} holds a {described(first)}; "
                    f"this run trains a {described(head)}, which has other weights: "
                    f"{to_fit(first, head)}, or leave --model.init_from out"
                )
            there = (about.get("lm"), about.get("hook_point"))
            if there != (self.lm.name, self.lm.hook.name):
                log.warning(
                    "model.init_from=%r: was trained on %s of %s, not on %s of %s",
                    self.init_from, there[1], there[0], self.lm.hook.name, self.lm.name
                )  # fmt: skip
            self._first[name] = first

    def _take_over_first(self) -> None:
        self.read_first()
        for name, first in self._first.items():
            head = self.heads()[name]
            if name in self._imported:  # their activations were not scaled, or otherwise
                first = linear_form(first).head_at(head.scale.cpu())
            head.take_over_(first)
            log.info("%sstarts from the weights in %s", f"{name}: " if name else "", self.init_from)
        self._first = {}

    def configure_optimizers(self) -> Any:
        """The injected optimizer with a group per head, its rates following the token schedule.

        Side by side a group has all the arguments that the head's optimizer would have alone.
        """
        own = self.together.optimizers if self.together else {}
        groups: list[dict[str, Any]] = []
        for name, head in self.heads().items():
            parameters = list(head.parameters())
            groups.append({"params": parameters, **self._arguments(name, parameters, own)})
        optimizer = self.optimizer(groups)
        if isinstance(optimizer, Adam) and self.trainer.gradient_clip_val is None:
            for trainee in self._trainees():
                if not trainee.dealt:
                    trainee.hand_rows_to(optimizer)
        factor = self.schedule.lr_factor
        # a function without attributes: those of any other are saved with every checkpoint
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _arguments(
        self, name: str, parameters: list[nn.Parameter], own: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Arguments of the optimizer that a head does not share with the others."""
        given = own.get(name)
        if not given:
            return {}
        try:
            made: dict[str, Any] = self.optimizer(parameters, **given).defaults
        except (TypeError, ValueError) as e:
            raise InputError(
                f"model.head.heads.{name}.optimizer={given}: model.optimizer does not take it ({e})"
            ) from e
        return {key: made[key] for key in given}

    # ---------------------------------------------------------------- training

    def _sizes(self, rows: Float[Tensor, "tok d_row"]) -> Float[Tensor, " tok"]:
        """Norms of what is to be written: by these a token is a sink; NaN where an input is."""
        sizes = norms(rows[:, -self.lm.d_model :])
        if not self.lm.transcodes:
            return sizes
        return torch.where(norms(rows).isfinite(), sizes, torch.nan)

    def rows(self, batch: TokenBatch | ActivationBatch) -> Float[Tensor, "tok d_row"]:
        """Kept activations of a batch; counts what is dropped as a sink."""
        rows = batch.activations(self.lm.acts)
        sizes = self._sizes(rows)
        self.bad_rows += (~(sizes < torch.inf)).sum()
        kept = rows[within(sizes, self.head.norm_limit)]
        self._count(len(rows), len(kept), batch.position)
        return kept

    def _count(self, read: int, kept: int, position: Int[Tensor, " 3"]) -> None:
        """Take note of what was read and what of it counts."""
        self.seen += torch.tensor([read, read - kept])
        self._drought.check(read, kept, position)

    def _look_ahead_(self, batches: Iterator[Any]) -> None:
        """Begin to make the rows of one more batch; the text has not been read before `_push_`."""
        position = self.data_position
        batch = self._next_batch(batches)
        self.data_position, position = position, self.data_position
        rows = batch.activations(self.lm.acts)
        sizes = self._sizes(rows)
        self.bad_rows += (~(sizes < torch.inf)).sum()
        keep = within(sizes, self.head.norm_limit)
        order = keep.to(torch.uint8).argsort(descending=True, stable=True)
        self._rows_ahead.append(RowsAhead(rows[order], Later(keep.sum()), position))
        self.clock.marks.append(("lm", self.clock.now()))

    def _push_(self) -> None:
        """Let the oldest of what was made ahead into the buffer."""
        rows, n_kept, self.data_position = self._rows_ahead.pop(0)
        kept = int(n_kept.read())
        self._count(len(rows), kept, self.data_position)
        self.buffer.push_(rows[:kept])
        self.clock.marks.append(("buffer", self.clock.now()))

    def _next_batch(self, batches: Iterator[Any]) -> TokenBatch | ActivationBatch:
        batch: TokenBatch | ActivationBatch = next(batches)[0]
        self.data_position = batch.position.clone()
        batch = batch.to(self.device)
        self.clock.marks.append(("data", self.clock.now()))
        return batch

    @torch.no_grad()
    def start_(self, batches: Iterator[Any]) -> None:
        """Statistics from the first rows; those rows also begin to fill the buffer."""
        began = time.perf_counter()
        log.info("collecting %s activations for the start statistics", f"{self.start_tokens:,}")
        x = self._first_rows(batches, -(-self.start_tokens // self.trainer.world_size))
        check_varied(x, self.lm)
        sizes = self._sizes(x)
        with ranks.pooled():
            limit = sink_limit(ranks.rows(sizes))
        for head in self.heads().values():
            head.norm_limit.copy_(limit)
        filled, kept = len(x), sizes <= limit
        if not kept.all():
            x = x[kept]
        self.seen += torch.tensor([filled, filled - len(x)])
        with ranks.pooled():
            everyone = ranks.rows(x)
        for head in self.heads().values():
            head.start_(everyone)
        del everyone
        self.buffer.push_(x[: self.buffer.capacity])
        with self._phase("filling the buffer", self.buffer.capacity) as progress:
            while self.buffer.filled < self.buffer.capacity:
                self.buffer.push_(self.rows(self._next_batch(batches)))
                progress.add(self.buffer.filled - progress.done)
        self.started.fill_(True)
        self._started = True
        self.trainer.strategy.barrier()
        log.info("statistics and buffer ready after %.1f s", time.perf_counter() - began)

    def _first_rows(self, batches: Iterator[Any], n: int) -> Float[Tensor, "tok d_row"]:
        x = torch.empty(n, self.lm.d_row, dtype=self.buffer.dtype, device=self.device)
        filled = 0
        with self._phase("start statistics", n) as progress:
            while filled < n:
                batch = self._next_batch(batches)
                rows = batch.activations(self.lm.acts)[: n - filled]
                self._drought.check(len(rows), len(rows), batch.position)
                x[filled : filled + len(rows)] = rows.to(x.dtype)
                filled += len(rows)
                progress.add(len(rows))
        return x

    def _phase(self, name: str, rows: int) -> Phase:
        return Phase(name, rows, "activations", self.trainer.is_global_zero)

    def next_batch(self, batches: Iterator[Any]) -> Float[Tensor, "tok d_row"]:
        """One shuffled batch of activations, running the LM as often as needed.

        A GPU begins to make those of the next step as well, so that how many of them are no sinks
        is known by then.
        """
        n = self.batch_rows
        ahead = self.device.type not in sparse.COUNTED_ON
        while self.buffer.wants(n):
            if ahead:
                if not self._rows_ahead:
                    self._look_ahead_(batches)
                self._push_()
                continue
            rows = self.rows(self._next_batch(batches))
            self.clock.marks.append(("lm", self.clock.now()))
            self.buffer.push_(rows)
            self.clock.marks.append(("buffer", self.clock.now()))
        x = self.buffer.swap_(n)
        self.clock.marks.append(("buffer", self.clock.now()))
        while ahead and self._surely_queued() < n:
            self._look_ahead_(batches)
            if not len(self._rows_ahead[-1].rows):
                break  # there may be no more text: `_push_` notices
        return x

    def _surely_queued(self) -> float:
        """Rows that the next step finds, if no more than `FEW_SINKS` are sinks."""
        ahead = sum(len(ahead.rows) for ahead in self._rows_ahead)
        return self.buffer.queued + (1 - FEW_SINKS) * ahead

    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        """One batch through the heads; Lightning does the rest."""
        self.clock.marks.append(("logging", self.clock.now()))
        if not self._started:
            self.start_(dataloader_iter)
            self._after_start()  # the untrained heads are kept as controls
            self._take_over_first()
            self.clock.reset()
        together = self.trainer.world_size > 1
        if together and not self._dealt:
            self._deal_()
        x = self.next_batch(dataloader_iter)
        everyone: Tensor | None = None
        progress, step = self.tokens_seen / self.schedule.tokens, self.trainer.global_step
        logs = step % self.trainer.log_every_n_steps == 0 or step == 0
        loss: Tensor | None = None
        values: dict[str, Tensor] = {}
        for trainee in self._trainees():
            rows, alike = x, together
            if trainee.shard is not None:
                if everyone is None:
                    everyone = trainee.shard.rows(x.to(self.sent_dtype)).float()
                rows, alike = everyone, False
            with ranks.pooled() if alike else contextlib.nullcontext():
                try:
                    losses, out = trainee.step(rows, step, progress)
                except (RuntimeError, ValueError) as e:  # what operators make of NaN, if any
                    self.check_finite(everything=True, cause=e)
                    raise
                if logs:
                    values |= trainee.figures(rows, out, losses)
            own = torch.stack(list(losses.values())).sum()
            trainee.watch_(own, step)
            loss = own if loss is None else loss + own
        assert loss is not None, "no head"
        if logs:
            self.check_finite()
            self._log_step(values, len(x))
            self._say_diverged(values, "train/fvu", DIVERGED_FVU)
        self.clock.marks.append(("head", self.clock.now()))
        return loss

    def check_finite(self, everything: bool = False, cause: Exception | None = None) -> None:
        """Stop a run whose numbers are not finite; waits for the device.

        Args:
            everything: Look at the weights too, as before they are saved.
            cause: What was raised meanwhile, if anything.

        Raises:
            RunDiverged: Says what is not finite, and since when.
        """
        bad = [trainee.bad_step for trainee in self._trainees()]
        found = torch.stack([*bad, -self.bad_rows])
        with ranks.pooled() if cause is None else contextlib.nullcontext():
            *steps, rows = ranks.smallest(found).tolist()
        batch, folder = self.schedule.batch, Path(self.trainer.default_root_dir)
        if rows < 0:
            raise RunDiverged(
                f"{-rows:,} activations of {self.lm.name} were NaN or infinite on text read before "
                f"token {self.tokens_seen:,} (step {self.trainer.global_step}). "
                f"{overflow_hint(self.lm.dtype)}",
                folder,
            ) from cause
        for trainee, step in zip(self._trainees(), steps, strict=True):
            of = f" of head {trainee.name!r}" if trainee.name else ""
            if step < NEVER:
                raise RunDiverged(
                    f"the loss{of} is not finite since step {step} (between token {step * batch:,} "
                    f"and {(step + 1) * batch:,}), noticed at step {self.trainer.global_step}",
                    folder,
                ) from cause
            name = trainee.unsound() if everything else None
            if everything and trainee.shard is not None:  # one process alone may know
                with ranks.pooled():
                    name = next((n for n in ranks.lists([name]) if n is not None), None)
            if name is not None:
                raise RunDiverged(
                    f"weight {name}{of} is not finite after step {self.trainer.global_step} "
                    f"({self.tokens_seen:,} tokens), though all losses up to there were",
                    folder,
                ) from cause

    def _say_diverged(self, values: Mapping[str, Tensor], figure: str, limit: float) -> None:
        """Warn once for each head and figure that is worse than any use of the head allows."""
        for name in self.heads():
            key = f"{name}/{figure}" if name else figure
            if key not in values or key in self._said or float(values[key]) <= limit:
                continue
            self._said.add(key)
            log.warning(
                "DIVERGED? %s is %.3g at step %d (%s tokens); 1 is what the mean alone reaches. "
                "If it does not fall again, start anew with a lower --model.optimizer.lr",
                key,
                float(values[key]),
                self.trainer.global_step,
                f"{self.tokens_seen:,}",
            )

    def _after_start(self) -> None:
        for callback in self.trainer.callbacks:
            hook = getattr(callback, "on_head_started", None)
            if hook is not None:
                hook(self.trainer, self)

    def _log_step(self, values: dict[str, Tensor], n: int) -> None:
        with ranks.pooled():
            seen = ranks.total(self.seen.to(self.device)).tolist()
        for trainee, group in zip(
            self._trainees(), self.trainer.optimizers[0].param_groups, strict=True
        ):
            values[f"{trainee.prefix}train/lr"] = torch.tensor(group["lr"])
        values["train/dropped_frac"] = torch.tensor(seen[1] / max(1, seen[0]))
        values["tokens"] = torch.tensor(float(self.tokens_seen))
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=n, sync_dist=True)
        rate = self.clock.rate()
        times = {f"time/{part}": share for part, share in self.clock.shares().items()}
        if rate is None:
            return  # a part of one step
        times["train/tokens_per_second"] = rate * self.schedule.batch
        self.log_dict(times, on_step=True, on_epoch=False, batch_size=n)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Project gradients; runs before clipping."""
        self.clock.marks.append(("head", self.clock.now()))
        for head in self.heads().values():
            head.project_grad_()

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any, gradient_clip_algorithm: Any
    ) -> None:
        """Shorten spikes, or clip at `trainer.gradient_clip_val` where given; head by head."""
        for trainee in self._trainees():
            values = trainee.clip_(gradient_clip_val, gradient_clip_algorithm or "norm")
            if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
                self.log_dict(values, batch_size=self.schedule.batch)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Step, and free the gradients: the next step's activations take their place."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Bring the parameters back to their constraints."""
        for head in self.heads().values():
            head.project_()
        self.tokens_seen += self.schedule.batch
        self.clock.marks.append(("optimizer", self.clock.now()))

    # -------------------------------------------------------------- validation

    def on_validation_start(self) -> None:
        """Calibrate what inference needs on training activations."""
        self.check_finite(everything=True)
        x = self.sample(CALIBRATION_TOKENS)
        for head in self.heads().values():
            head.calibrate_(x)

    def on_validation_end(self) -> None:
        """Say which heads reconstruct worse than a constant; validation is no part of a step."""
        self._said = {key for key in self._said if not key.endswith("val/fvu")}
        self._say_diverged(self.trainer.callback_metrics, "val/fvu", 1.0)
        for trainee in self._trainees():
            trainee.return_()
        self.clock.restart()

    def sample(self, n: int) -> Float[Tensor, "tok d_model"]:
        """Training activations of all processes, fp32, the same ones for each of them.

        Those that the buffer holds; if it holds none (it is turned off, or a checkpoint did not
        keep it), those that the text would give next.
        """
        with ranks.pooled():
            own = n // ranks.world()
            return ranks.rows(self.buffer.sample(own) if self.buffer.filled else self._ahead(own))

    @torch.no_grad()
    def _ahead(self, n: int) -> Float[Tensor, "tok d_model"]:
        """Activations of the text that comes next; training will read it as if for the first time.

        Raises:
            InputError: Nothing was trained or loaded, so that nobody knows where the text goes on.
        """
        if not self.started:
            raise InputError(
                "validate: the head was neither trained nor loaded; name a run or a checkpoint "
                "with --ckpt_path"
            )
        data: Any = self.trainer.datamodule
        began = data.position
        data.resume_from(self.data_position)
        loader = data.train_dataloader()
        data.resume_from(began)
        parts: list[Tensor] = []
        for batch in loader:
            rows = batch.to(self.device).activations(self.lm.acts).float()
            parts.append(rows[within(self._sizes(rows), self.head.norm_limit)])
            if sum(len(part) for part in parts) >= n:
                break
        return torch.cat(parts)[:n]

    def validation_step(
        self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, ValidationBatch]:
        """One LM pass to the hook, shared with all heads and callbacks; by name of the head."""
        data: Any = self.trainer.datamodule
        prefix = self.lm.prefix(batch.ids)
        return run_heads(prefix, batch, data.val_names[dataloader_idx], self.heads())

    # ------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Nothing but tensors and plain values: checkpoints load with `weights_only=True`."""
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["clock"] = self.clock.state()
        with ranks.pooled():
            checkpoint["data_positions"] = ranks.rows(
                self.data_position[None].to(self.device)
            ).cpu()
            checkpoint["seen"] = ranks.rows(self.seen[None].to(self.device)).cpu()
        if self._dealt:
            keeps = self.trainer.is_global_zero
            put_together_(checkpoint, self._trainees(), self.trainer.optimizers[0], keeps)

    def _refuse_another_head(self, state: dict[str, Tensor]) -> None:
        """Compare the tensors of a checkpoint with those that are to be filled."""
        own = {name: list(value.shape) for name, value in self.state_dict().items()}
        found = {name: list(value.shape) for name, value in state.items()}
        if found == own:
            return
        flat = {flat_name(name) for name in own}
        if flat != own.keys() and flat <= found.keys():
            raise InputError(
                "ckpt_path: the checkpoint was written before heads had parts; its optimizer state "
                "is in another order. Its head can be read; to train, start a new run from its "
                "config.yaml"
            )
        odd = min(n for n in own.keys() | found.keys() if own.get(n) != found.get(n))
        raise InputError(
            "ckpt_path: the checkpoint is of another head than the configuration asks for; give "
            f"the run's own, --config RUN/config.yaml ({odd} is {found.get(odd, 'not in it')}, "
            f"and {own.get(odd, 'nothing')} is asked for)"
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring everything back, whatever is done next: training, its last validation, or another.

        The data goes on behind the last batch that was used.

        Raises:
            InputError: The checkpoint is of another head, or of an earlier version.
        """
        if not any(name.endswith(".x_variance") for name in checkpoint["state_dict"]):
            raise InputError(
                "ckpt_path: the checkpoint was written before the loss was divided by the variance "
                "of the activations; its optimizer state does not fit this loss. Its head can be "
                "read; to train, start a new run from its config.yaml"
            )
        self._refuse_another_head(checkpoint["state_dict"])
        self._started, self._rows_ahead = bool(checkpoint["state_dict"]["started"]), []
        self.tokens_seen = checkpoint["tokens_seen"]
        self.clock.load_(checkpoint.get("clock", {}))
        positions, seen = checkpoint["data_positions"], checkpoint["seen"]
        rank, world = self.trainer.global_rank, self.trainer.world_size
        if len(positions) == world:
            self.data_position, self.seen = positions[rank].clone(), seen[rank].clone()
        else:
            self.data_position = torch.tensor(min(positions.tolist()))
            self.seen = seen.sum(0) if rank == 0 else torch.zeros_like(self.seen)
            log.info(
                "%d processes continue a run that %d processes began: from the place of the one "
                "that had read least, so that no text is left out and little is read twice",
                world,
                len(positions),
            )
        data: Any = self.trainer.datamodule
        data.resume_from(self.data_position)
        self._allocate_buffer()
        path = Path(str(self.trainer.ckpt_path))
        if not load_buffer_(self.buffer, path, rank, world) and self.buffer.capacity_tokens:
            log.warning(
                "%s is missing: the buffer is refilled with later text, so this run will not be "
                "the same as an undisturbed one bit for bit",
                buffer_file(path, rank),
            )
        if self.trainer.state.fn != TrainerFn.FITTING:  # then Lightning does it
            for callback in self.trainer.callbacks:
                if callback.state_key in checkpoint["callbacks"]:
                    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
