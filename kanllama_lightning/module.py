"""SAEModule: a frozen LM's hook and a head; one step, one optimizer."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from kanllama_lightning.buffer import ShuffleBuffer
from kanllama_lightning.functional.losses import fvu
from kanllama_lightning.functional.moments import norms
from kanllama_lightning.heads.base import SAEHead
from kanllama_lightning.lm import FrozenLM
from kanllama_lightning.preflight import preflight
from kanllama_lightning.schedule import Schedule
from kanllama_lightning.types import (
    ActivationBatch,
    InputError,
    StepContext,
    TokenBatch,
    ValidationBatch,
)
from kanllama_lightning.view import regular, view

log = logging.getLogger(__name__)

SINK_RATIO = 10.0
"""Rows whose norm is so many times the median are attention sinks (METHODS 0.5)."""
DEAD_REFRESH_STEPS = 10
"""The list of dead latents is made anew so often; it is looked at in every step."""
CALIBRATION_TOKENS = 32_768
"""Training activations a threshold is calibrated on."""
REFUSED_PRECISION = {
    "16-mixed": "fp16 overflows at summed squared errors and its gradient scaler skips steps",
    "16": "fp16 overflows at summed squared errors and its gradient scaler skips steps",
    "16-true": "heads need fp32 master weights",
    "bf16-true": "an Adam step of 1e-4 rounds to no change on most bf16 weights",
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


class SAEModule(L.LightningModule):
    """Trains a head on the activations of a frozen LM.

    One step is one batch of `sae_batch_tokens` rows; the LM runs as often as that takes.

    Args:
        lm: The frozen LM and its hook point (linked).
        head: The autoencoder to train.
        optimizer: Built with the head's parameters.
        buffer: Where activations are shuffled.
        tokens: Budget: rows to train on. Every schedule follows from it.
        sae_batch_tokens: Rows per step.
        start_tokens: Rows the start statistics are taken of; left out, 65,536 or 1 % of the
            budget, at most a million.
        clip_ratio: A gradient longer than this many times its running mean is shortened to
            that; catches spikes whatever the scale of the loss.
        seed: Seed of the shuffling of activations (linked to `seed_everything`).
    """

    dead_mask: Tensor
    silent_tokens: Tensor
    grad_norm_mean: Tensor
    seen: Tensor
    data_position: Tensor

    def __init__(
        self,
        lm: FrozenLM,
        head: SAEHead,
        optimizer: OptimizerCallable = torch.optim.Adam,
        buffer: ShuffleBuffer | None = None,
        tokens: int = 300_000_000,
        sae_batch_tokens: int = 4096,
        start_tokens: int | None = None,
        clip_ratio: float = 5.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if clip_ratio <= 1:
            raise InputError(f"model.clip_ratio={clip_ratio}: must be larger than 1 (default 5)")
        self.lm, self.head, self.optimizer = lm, head, optimizer
        self.buffer = buffer or ShuffleBuffer()
        if sae_batch_tokens > self.buffer.capacity_tokens:
            raise InputError(
                f"model.sae_batch_tokens={sae_batch_tokens}: larger than model.buffer."
                f"capacity_tokens={self.buffer.capacity_tokens}; the buffer must hold a batch"
            )
        if start_tokens is not None and start_tokens < 1:
            raise InputError(f"model.start_tokens={start_tokens}: must be at least 1")
        self.schedule = Schedule.of(tokens, sae_batch_tokens)
        self.start_tokens = start_tokens or self.schedule.start_tokens
        self.clip_ratio, self.seed = clip_ratio, seed
        self.tokens_seen = 0
        self.register_buffer("silent_tokens", torch.zeros(head.d_sae, dtype=torch.int64))
        self.register_buffer("dead_mask", torch.zeros(head.d_sae, dtype=torch.bool))
        self.register_buffer("grad_norm_mean", torch.zeros(()))
        # tokens looked at, and dropped as sinks
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("data_position", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Load the LM onto this rank's device; allocate the buffer for training."""
        check_precision(str(self.trainer.precision))
        device = self.trainer.strategy.root_device
        self.lm.load_(device)
        if stage == "fit" and not len(self.buffer.held):
            data: Any = self.trainer.datamodule
            queue = self.schedule.batch + data.lm_batch_seqs * data.ctx_len
            self.buffer.allocate_(
                self.lm.d_model, queue, device, self.seed + self.trainer.global_rank
            )

    def on_fit_start(self) -> None:
        """Check within seconds what would otherwise waste hours."""
        data: Any = self.trainer.datamodule
        loaders = data.val_dataloader()
        preflight(self.lm, next(iter(loaders[0])).to(self.device))

    def configure_optimizers(self) -> Any:
        """The injected optimizer, its rate following the token schedule."""
        optimizer = self.optimizer(self.head.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.lr_factor)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    # ---------------------------------------------------------------- training

    def rows(self, batch: TokenBatch | ActivationBatch) -> Float[Tensor, "tok d_model"]:
        """Kept activations of a batch; counts what is dropped as a sink."""
        rows = batch.activations(self.lm.acts)
        kept = rows[regular(rows, self.head.norm_limit)]
        self.seen += torch.tensor([len(rows), len(rows) - len(kept)], device=self.seen.device)
        return kept

    def _next_tokens(self, batches: Iterator[Any]) -> TokenBatch | ActivationBatch:
        batch: TokenBatch | ActivationBatch = next(batches)[0]
        self.data_position = batch.position.clone()
        return batch.to(self.device)

    @torch.no_grad()
    def start_(self, batches: Iterator[Any]) -> None:
        """Statistics from the first rows; those rows also begin to fill the buffer."""
        began = time.perf_counter()
        log.info("collecting %s activations for the start statistics", f"{self.start_tokens:,}")
        shape = (self.start_tokens, self.lm.d_model)
        x = torch.empty(shape, dtype=self.buffer.dtype, device=self.device)
        filled = 0
        while filled < len(x):
            tokens = self._next_tokens(batches)
            rows = tokens.activations(self.lm.acts)[: len(x) - filled]
            x[filled : filled + len(rows)] = rows.to(x.dtype)
            filled += len(rows)
        sizes = norms(x)
        self.head.norm_limit.copy_(SINK_RATIO * sizes.median())
        regular = sizes <= self.head.norm_limit
        if not regular.all():
            x = x[regular]
        self.seen += torch.tensor([filled, filled - len(x)], device=self.seen.device)
        self.head.start_(x)
        self.buffer.push_(x[: self.buffer.capacity_tokens])
        while self.buffer.filled < self.buffer.capacity_tokens:
            self.buffer.push_(self.rows(self._next_tokens(batches)))
        self.started.fill_(True)
        self.trainer.strategy.barrier()
        log.info("statistics and buffer ready after %.1f s", time.perf_counter() - began)

    def next_batch(self, batches: Iterator[Any]) -> Float[Tensor, "tok d_model"]:
        """One shuffled batch of activations, running the LM as often as needed."""
        while self.buffer.wants(self.schedule.batch):
            self.buffer.push_(self.rows(self._next_tokens(batches)))
        return self.buffer.swap_(self.schedule.batch)

    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        """One batch through the head; Lightning does the rest."""
        if not self.started:
            self.start_(dataloader_iter)
            self._after_start()
        x = self.next_batch(dataloader_iter)
        out = self.head(x)
        ctx = self._context()
        losses = self.head.losses(x, out, ctx)
        loss = torch.stack(list(losses.values())).sum()
        with torch.no_grad():
            self.head.observe_(out, ctx)
            self._count_silence(out.codes.fired(), len(x))
            self._log_step(x, out, losses, loss)
        return loss

    def _after_start(self) -> None:
        for callback in self.trainer.callbacks:
            hook = getattr(callback, "on_head_started", None)
            if hook is not None:
                hook(self.trainer, self)

    def _context(self) -> StepContext:
        if self.trainer.global_step % DEAD_REFRESH_STEPS == 0:
            self.dead_mask = self.silent_tokens >= self.schedule.dead_after_tokens
        progress = self.tokens_seen / self.schedule.tokens
        dead = self.dead_mask.nonzero().squeeze(1)
        return StepContext(dead, progress, self.schedule.threshold_rate)

    def _count_silence(self, fired: Tensor, n: int) -> None:
        self.silent_tokens = (self.silent_tokens + n).masked_fill(fired > 0, 0)

    def _log_step(self, x: Tensor, out: Any, losses: dict[str, Tensor], loss: Tensor) -> None:
        step = self.trainer.global_step
        if step % self.trainer.log_every_n_steps and step > 0:
            return
        dead = (self.silent_tokens >= self.schedule.dead_after_tokens).float().mean()
        values = {f"train/{name}": value for name, value in losses.items()}
        values |= {f"train/{name}": v for name, v in self.head.diagnostics(x).items()}
        batch_fvu = fvu(x, out.x_hat.float())
        values |= {
            "train/loss": loss,
            "train/fvu": batch_fvu,
            "train/ev": 1 - batch_fvu,
            "train/l0": out.codes.l0().float().mean(),
            "train/dead_frac": dead,
            "train/lr": torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"]),
            "train/dropped_frac": self.seen[1] / self.seen[0].clamp_min(1),
            "tokens": torch.tensor(float(self.tokens_seen)),
        }
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=len(x))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Project gradients; runs before clipping."""
        self.head.project_grad_()

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any, gradient_clip_algorithm: Any
    ) -> None:
        """Shorten spikes, or clip at `trainer.gradient_clip_val` where that is given."""
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm or "norm")
            return
        gradients = [p.grad for p in self.head.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        limit = torch.where(self.grad_norm_mean > 0, self.clip_ratio * self.grad_norm_mean, norm)
        torch._foreach_mul_(gradients, (limit / norm.clamp_min(1e-30)).clamp_max(1.0))
        clipped = norm > limit
        used = torch.minimum(norm, limit)
        mean = torch.where(self.grad_norm_mean > 0, self.grad_norm_mean, used)
        self.grad_norm_mean = mean.lerp(used, 0.01)
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            values = {"train/grad_norm": norm, "train/grad_clipped": clipped.float()}
            self.log_dict(values, batch_size=self.schedule.batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Bring the parameters back to their constraints."""
        self.head.project_()
        self.tokens_seen += self.schedule.batch

    # -------------------------------------------------------------- validation

    def on_validation_start(self) -> None:
        """Calibrate what inference needs on training activations, where there are any."""
        if self.buffer.filled:
            self.head.calibrate_(self.buffer.sample(CALIBRATION_TOKENS))

    def validation_step(
        self, batch: TokenBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> ValidationBatch:
        """One LM pass to the hook, shared with all callbacks."""
        data: Any = self.trainer.datamodule
        return self.validation_batch(batch, data.val_names[dataloader_idx])

    def validation_batch(self, tokens: TokenBatch, set_name: str) -> ValidationBatch:
        """What callbacks see of a token batch."""
        return view(self.lm.prefix(tokens.ids), tokens, set_name, self.head)

    # ------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Nothing but tensors and plain values: checkpoints load with `weights_only=True`."""
        checkpoint["tokens_seen"] = self.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the data go on behind the last batch that was used."""
        self.tokens_seen = checkpoint["tokens_seen"]
        data: Any = self.trainer.datamodule
        data.resume_from(checkpoint["state_dict"]["data_position"])
