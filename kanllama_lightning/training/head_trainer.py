"""One head in training: its step, its counters, its clipping."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.functional import ranks, sparse
from kanllama_lightning.functional.losses import fvu
from kanllama_lightning.functional.row_step import squared_norm
from kanllama_lightning.functional.shard import LatentShard
from kanllama_lightning.functional.sparse import fixed_sizes
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.training.later import Later
from kanllama_lightning.training.optim import Adam, RowPass
from kanllama_lightning.training.schedule import Schedule
from kanllama_lightning.types import SAEOutput, StepContext

DEAD_REFRESH_STEPS = 10
"""The list of dead latents is made anew so often; it is looked at in every step. On a GPU it is the
list of the time before: how many there are is then known without waiting."""
NEVER = 2**62
"""The step in which a loss stopped being finite, as long as it is."""


class HeadTrainer(nn.Module):
    """A head with what training knows about it, and nothing that other heads share.

    Args:
        name: Under which its figures are logged and its files are kept; empty for the only head
            of a run.
        head: The head.
        schedule: Lengths of the run.
        clip_ratio: A gradient longer than this many times its running mean is shortened to that.
    """

    dead_mask: Tensor
    silent_tokens: Tensor
    grad_norm_mean: Tensor
    bad_step: Tensor

    def __init__(self, name: str, head: SAEHead, schedule: Schedule, clip_ratio: float) -> None:
        super().__init__()
        self.name, self.head, self.schedule, self.clip_ratio = name, head, schedule, clip_ratio
        self.dead_after_tokens = schedule.dead_after_tokens
        self.threshold_rate = schedule.threshold_rate
        self.dealt: dict[str, int] = {}
        """Own tensors that are dealt out over processes, and the dimension that latents lie along;
        empty where every process trains all of them."""
        self.shard: LatentShard | None = None
        """The latents that its tensors now are of; None for all of them."""
        self._laid_by: tuple[LatentShard, dict[str, Tensor]] | None = None
        self._dead: Tensor | None = None
        self._dead_of: tuple[int, ...] = ()
        self._next_dead: tuple[Tensor, Later] | None = None
        self._rows: RowPass | None = None
        self.register_buffer("silent_tokens", torch.zeros(head.d_sae, dtype=torch.int64))
        self.register_buffer("dead_mask", torch.zeros(head.d_sae, dtype=torch.bool))
        self.register_buffer("grad_norm_mean", torch.zeros(()))
        self.register_buffer("bad_step", torch.tensor(NEVER), persistent=False)

    # -------------------------------------------------------- latents dealt out over processes

    def dealt_now(self) -> Iterator[tuple[str, Tensor, int]]:
        """Its tensors that are dealt out, or are to be: name, tensor, dimension of the latents."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, dim in self.dealt.items():
            yield name, tensors[name], dim

    def deal_(self, shard: LatentShard, optimizer: torch.optim.Optimizer) -> None:
        """Keep the rows of some latents alone, of weights, counters and what the optimizer knows.

        Args:
            shard: Which latents.
            optimizer: The run's; it holds the same parameters afterwards.
        """
        for _, tensor, dim in self.dealt_now():
            state = optimizer.state.get(tensor, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    state[key] = shard.own(value, dim)
            tensor.grad = None
            tensor.data = shard.own(tensor.data, dim)
        self.shard, self._dead, self._next_dead = shard, None, None

    def gather_(self) -> None:
        """Hold the whole of it, for measuring and saving, until `return_`; what the optimizer
        knows stays dealt out."""
        shard = self.shard
        if shard is None:
            return
        self._laid_by = shard, {name: tensor.data for name, tensor, _ in self.dealt_now()}
        for _, tensor, dim in self.dealt_now():
            tensor.grad = None
            tensor.data = shard.whole(tensor.data, dim)
        self.shard = None

    def return_(self) -> None:
        """Go on with the latents that were this process's before `gather_`."""
        if self._laid_by is None:
            return
        self.shard, own = self._laid_by
        for name, tensor, _ in self.dealt_now():
            tensor.data = own[name]
        self._laid_by = None

    @property
    def prefix(self) -> str:
        """In front of the names of its figures."""
        return f"{self.name}/" if self.name else ""

    def step(
        self, x: Float[Tensor, "tok d_row"], step: int, progress: float
    ) -> tuple[dict[str, Tensor], SAEOutput]:
        """Losses of a batch and the output they are of; updates every running statistic.

        Args:
            x: Raw activations.
            step: Optimizer steps taken so far.
            progress: Share of the token budget already trained on, 0 to 1.
        """
        if self.shard is None:
            return self._step(x, step, progress)
        with self.shard.used():
            return self._step(x, step, progress)

    def _step(
        self, x: Float[Tensor, "tok d_row"], step: int, progress: float
    ) -> tuple[dict[str, Tensor], SAEOutput]:
        if step % DEAD_REFRESH_STEPS == 0:
            self._look_for_dead_()
        if self._dead is None:
            self._dead = self.dead_mask.nonzero().squeeze(1)
            if self.shard is not None:
                counts = self.shard.each(len(self._dead), x.device)
                self._dead_of = tuple(counts) if any(counts) else ()
        ctx = StepContext(self._dead, progress, self.threshold_rate, self._dead_of)
        out = self.head(x)
        losses = self.head.losses(x, out, ctx)
        with torch.no_grad():
            self.head.observe_(out, ctx)
            fired, seen = out.codes.fired() > 0, len(x)
            if ranks.POOLED.get():
                fired = ranks.largest(fired.to(torch.uint8)) > 0
                seen *= ranks.world()
            self.silent_tokens += seen
            self.silent_tokens.masked_fill_(fired, 0)
        return losses, out

    def _look_for_dead_(self) -> None:
        """Make `dead_mask` anew; on a GPU what it was to become at the last look, and list it."""
        silent = self.silent_tokens >= self.dead_after_tokens
        if self.shard is not None or not fixed_sizes(silent):
            self.dead_mask, self._dead = silent, None
            return
        if self._next_dead is not None:
            self.dead_mask, n_dead = self._next_dead
            size = int(n_dead.read())
            self._dead = torch.nonzero_static(self.dead_mask, size=size).squeeze(1)
        self._next_dead = silent, Later(silent.sum())

    @torch.no_grad()
    def watch_(self, loss: Float[Tensor, ""], step: int) -> None:
        """Remember the first step whose loss is not finite, on the device: waits for nothing."""
        finite = loss - loss == 0
        self.bad_step = torch.where(finite, self.bad_step, self.bad_step.clamp_max(step))

    def unsound(self) -> str | None:
        """The first of its weights that is not finite; None if all are."""
        for name, weight in self.head.named_parameters():
            if not bool(weight.isfinite().all()):
                return name
        return None

    @torch.no_grad()
    def figures(
        self, x: Float[Tensor, "tok d_row"], out: SAEOutput, losses: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is worth logging about a training batch, under the head's name."""
        dead = (self.silent_tokens >= self.dead_after_tokens).float().mean()
        l0 = out.codes.l0().float().mean()
        if self.shard is not None:
            dead, l0 = self.shard.total(dead) / self.shard.world, self.shard.total(l0)
        batch_fvu = fvu(self.head.target(x), out.x_hat.float())
        values = dict(losses) | self.head.diagnostics(x)
        values |= {
            "loss": torch.stack(list(losses.values())).sum(),
            "fvu": batch_fvu,
            "ev": 1 - batch_fvu,
            "l0": l0,
            "dead_frac": dead,
        }
        return {f"{self.prefix}train/{name}": v.detach() for name, v in values.items()}

    def hand_rows_to(self, optimizer: Adam) -> None:
        """Leave projection, clipping and norm of the dictionary to the optimizer, if it can."""
        rows = self.head.unit_rows
        self._rows = None if rows is None else optimizer.hand_over(rows)
        self.head.keep_rows(self._rows is None)

    @torch.no_grad()
    def clip_(self, value: float | None, by: str) -> dict[str, Tensor]:
        """Shorten its own gradients, or clip them at a given value; what happened, for the log.

        Args:
            value: Fixed limit; None for `clip_ratio` times the running mean of the norm.
            by: With a fixed limit, `norm` or `value`, as in `trainer.gradient_clip_algorithm`.
        """
        assert not sparse.ROWS_READ, (
            "a pass over all rows of a weight left out those read beside it"
        )
        parameters = [p for p in self.head.parameters() if p.grad is not None]
        if value is not None and by == "value":
            nn.utils.clip_grad_value_(parameters, value)
            return {}
        if value is not None:
            norm = self._grad_norm()
            nn.utils.clip_grads_with_norm_(parameters, value, norm)
            clipped = norm > value
        else:
            norm, clipped = self._shorten_spikes_(
                [p.grad for p in parameters if p.grad is not None]
            )
        return {
            f"{self.prefix}train/grad_norm": norm,
            f"{self.prefix}train/grad_clipped": clipped.float(),
        }

    def _grad_norm(self) -> Tensor:
        """Norm of the gradients of all its parameters, those of other processes included."""
        found = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        if self.shard is not None:
            own = [grad for name, grad in found.items() if name in self.dealt]
            alike = [grad for name, grad in found.items() if name not in self.dealt]
            squared = self.shard.total(nn.utils.get_total_norm(own).square())
            return (squared + nn.utils.get_total_norm(alike).square()).sqrt()
        handed = self._rows.weight.grad if self._rows is not None else None
        norm = nn.utils.get_total_norm([g for g in found.values() if g is not handed])
        if self._rows is not None and handed is not None:
            norm = (norm.square() + squared_norm(self._rows.weight, handed)).sqrt()
        return norm

    def _shorten_spikes_(self, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        norm = self._grad_norm()
        handed = self._rows.weight.grad if self._rows is not None else None
        found = [g for g in gradients if g is not handed]
        limit = torch.where(self.grad_norm_mean > 0, self.clip_ratio * self.grad_norm_mean, norm)
        factor = (limit / norm.clamp_min(1e-30)).clamp_max(1.0)
        torch._foreach_mul_(found, factor)
        if self._rows is not None:
            self._rows.factor = factor
        used = torch.minimum(norm, limit)
        mean = torch.where(self.grad_norm_mean > 0, self.grad_norm_mean, used)
        self.grad_norm_mean = mean.lerp(used, 0.01)
        return norm, norm > limit
