"""The words everything else speaks: axes, batches, codes, and the one error for bad input.

Axes, everywhere: `batch` sequences, `pos` positions in a sequence, `tok` tokens (kept rows of
`batch*pos`, flattened), `d_model` the LM's width, `d_row` what a head
is given (twice as wide for a transcoder), `d_sae` latents, `k` kept latents per token,
`nnz` kept activations in a batch, `vocab` the LM's vocabulary, `hidden` a head's inner width.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kanllama_lightning.errors import InputError as InputError
from kanllama_lightning.functional.sparse import SparseCodes, fixed_sizes
from kanllama_lightning.functional.splines import rows_at_once

Acts = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch pos d_row"]]
"""Token ids to what heads are given: `FrozenLM.acts`."""


class TokenBatch(NamedTuple):
    """Packed rows of token ids, on the CPU, as the data module yields them."""

    ids: Int[Tensor, "batch pos"]
    """int64; position 0 of every row is BOS."""
    keep: Bool[Tensor, "batch pos"]
    """True for real text; False for BOS, EOS, PAD and other special tokens, which neither train
    an SAE nor count in any metric."""
    doc: Int[Tensor, "batch pos"]
    """int64 number of the document a token belongs to, unique within a batch; -1 for padding."""
    position: Int[Tensor, " 3"]
    """int64 (epoch, block, row) of the row *after* this batch: where to go on from."""
    kept: Int[Tensor, " tok"] | None = None
    """batch*pos places that `keep` is True for; None on the CPU, where listing them is no wait."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch with its tensors on `device` (the position stays on the CPU)."""
        ids, keep, doc = (t.to(device, non_blocking=True) for t in self[:3])
        if not fixed_sizes(keep):
            return TokenBatch(ids, keep, doc, self.position)
        kept = self.keep.reshape(-1).nonzero().squeeze(1).to(device, non_blocking=True)
        return TokenBatch(ids, keep, doc, self.position, kept)

    def activations(self, acts: Acts) -> Float[Tensor, "tok d_row"]:
        """What to train on, sinks included: the kept tokens' activations, by running the LM."""
        made = acts(self.ids)
        return made[self.keep] if self.kept is None else made.flatten(0, 1)[self.kept]


class ActivationBatch(NamedTuple):
    """Activations that were made earlier: what a cache yields in the place of tokens."""

    rows: Float[Tensor, "tok d_row"]
    """Activations of kept tokens, in the cache's dtype, sinks included, from many documents."""
    position: Int[Tensor, " 3"]
    """int64 (epoch, shard, row) of the row *after* this batch: where to go on from."""

    def to(self, device: torch.device) -> "ActivationBatch":
        """The same batch with its rows on `device` (the position stays on the CPU)."""
        return ActivationBatch(self.rows.to(device, non_blocking=True), self.position)

    def activations(self, acts: Acts) -> Float[Tensor, "tok d_row"]:
        """What to train on: these rows; the LM (`acts`) is left alone."""
        return self.rows


class DenseCodes(NamedTuple):
    """The latents of a head that selects nothing: its penalty sees all of them."""

    latents: Float[Tensor, "tok d_sae"]

    def dense(self) -> Float[Tensor, "tok d_sae"]:
        """These latents."""
        return self.latents

    def l0(self) -> Int[Tensor, " tok"]:
        """Number of non-zero latents of each token."""
        return (self.latents != 0).sum(1)

    def fired(self) -> Int[Tensor, " d_sae"]:
        """Number of tokens on which each latent is non-zero."""
        return (self.latents != 0).sum(0)

    def sparse(self) -> SparseCodes:
        """The non-zero latents alone, for people and reports."""
        rows, latents = self.latents.nonzero(as_tuple=True)
        values = self.latents[rows, latents]
        return SparseCodes(values, rows, latents, *self.latents.shape)


COUNTED_AT_ONCE, COUNTED_BY_GPU = 1 << 19, 1 << 25
"""Latents that `LazyCodes` makes at once where they are only counted, on the CPU and on a GPU."""


class LazyCodes:
    """Dense latents that are made from pre-activations when they are asked for.

    Args:
        pre_acts: Pre-activations of a batch.
        make: The latents of some of its rows. Must not see later changes of the head's weights.
    """

    def __init__(
        self,
        pre_acts: Float[Tensor, "tok d_sae"],
        make: Callable[[Float[Tensor, "some d_sae"]], Float[Tensor, "some d_sae"]],
    ) -> None:
        self._pre_acts, self._make = pre_acts, make

    def dense(self) -> Float[Tensor, "tok d_sae"]:
        """The latents; made anew each time."""
        return self._make(self._pre_acts)

    def l0(self) -> Int[Tensor, " tok"]:
        """Number of non-zero latents of each token."""
        return self._counts[0]

    def fired(self) -> Int[Tensor, " d_sae"]:
        """Number of tokens on which each latent is non-zero."""
        return self._counts[1]

    @cached_property
    def _counts(self) -> tuple[Int[Tensor, " tok"], Int[Tensor, " d_sae"]]:
        pre_acts = self._pre_acts.detach()
        l0, fired = [], torch.zeros(pre_acts.shape[1], dtype=torch.int64, device=pre_acts.device)
        with torch.no_grad():
            size = rows_at_once(pre_acts, pre_acts.shape[1], COUNTED_AT_ONCE, COUNTED_BY_GPU)
            for rows in pre_acts.split(size):
                nonzero = self._make(rows) != 0
                l0.append(nonzero.sum(1))
                fired += nonzero.sum(0)
        return torch.cat(l0), fired

    def sparse(self) -> SparseCodes:
        """The non-zero latents alone, for people and reports."""
        return DenseCodes(self.dense()).sparse()


Codes = SparseCodes | DenseCodes | LazyCodes
"""The latents of a batch: all of them know `dense`, `sparse`, `l0` and `fired`."""


class ByProducts(NamedTuple):
    """What a penalised head knows once it has made its latents, and its losses need."""

    penalty: Float[Tensor, ""]
    """Mean over tokens, without its coefficient."""
    decoded: list[Float[Tensor, "tok d_model"]]
    """What else is decoded beside the latents; without b_dec, in the head's units."""


class SAEOutput(NamedTuple):
    """What a head returns: the reconstruction, in the LM's units, and the codes it came from."""

    x_hat: Float[Tensor, "tok d_model"]
    codes: Codes
    pre_acts: Callable[[Int[Tensor, " some"]], Float[Tensor, "tok some"]] | None = None
    """Pre-activations of some latents (dead ones, say) from the same pass, where that is cheaper
    than another one."""
    by_products: ByProducts | None = None
    """What the losses of a penalised head need beside it; None for the others."""


class StepContext(NamedTuple):
    """What a head may need to know about the step it is in."""

    dead: Int[Tensor, " n_dead"]
    """Indices of the latents that have not fired for `dead_after_tokens` tokens."""
    progress: float
    """Share of the token budget already trained on, 0 to 1."""
    rate: float
    """Weight of this step in a moving average: one over its horizon in steps."""
    dead_of: tuple[int, ...] = ()
    """Where latents are dealt out and some are dead: their number on every process; `dead` are
    those of this one."""


class Curves(NamedTuple):
    """Learned curves of one kind, over what they see in a sample of activations.

    Most bent first: ranked by `size * sqrt(bend)`, the RMS departure of a curve from its best line.
    That is in the units of what the curve adds to, so neither a wild curve that hardly counts nor a
    large one that is all but straight comes first, and its squares add up over the curves of a sum.
    """

    kind: str
    """"edge", "hidden unit", "input", "latent", "decoder edge" or "decoder latent"."""
    names: list[str]
    """What each curve belongs to."""
    axes: tuple[str, str]
    """What lies along the points and along the values, with units."""
    points: Float[Tensor, "curves points"]
    """Evenly spaced over what each curve sees, but for the last 0.1 % on either side."""
    values: Float[Tensor, "curves points"]
    """Curve values. Where a latent owns several curves, the most informative one; see `names`."""
    density: Float[Tensor, "curves points"]
    """Share of what a curve sees that is nearest to each point; adds up to 1."""
    bend: Float[Tensor, " curves"]
    """Share, 0 to 1, of the curve's variance over the sample that no straight line explains."""
    size: Float[Tensor, " curves"]
    """RMS deviation of the curve from its mean over the sample, in the units of the values."""
    out_of_grid: Float[Tensor, " curves"]
    """Share of what the curve sees that lies beyond its grid."""
    mean_bend: float
    """Bend of all curves of this kind, the ones not listed too, weighted by their variance."""
    mean_out_of_grid: float
    """Share of all that the curves of this kind see that lies beyond the grid."""


class Prefix(NamedTuple):
    """An LM run up to the hook point, from which it can go on with other activations."""

    acts: Float[Tensor, "batch pos d_model"]
    """The activations at the hook point, in the LM's dtype."""
    residual: Float[Tensor, "batch pos d_model"] | None
    """What the hook point's output is added to; None where the hook point is the stream itself."""
    inputs: Float[Tensor, "batch pos d_model"] | None = None
    """What a transcoder reads instead of `acts`, which it writes; None where heads read these."""

    @property
    def rows(self) -> Float[Tensor, "batch pos d_row"]:
        """What heads are given: the activations; of a transcoder, its inputs before them."""
        return self.acts if self.inputs is None else torch.cat([self.inputs, self.acts], -1)


class ValidationBatch(NamedTuple):
    """What a validation step hands to the callbacks: one LM pass up to the hook, shared."""

    set_name: str
    """Name of the validation set."""
    tokens: TokenBatch
    prefix: Prefix
    mask: Bool[Tensor, "batch pos"]
    """True where an activation counts: real text, no extreme norm."""
    rows: Float[Tensor, "tok d_row"]
    """What heads are given of the positions under the mask (`Prefix.rows`), fp32, LM's units."""
    out: SAEOutput
    """The head's output on them, as at inference."""

    @property
    def x(self) -> Float[Tensor, "tok d_model"]:
        """The activations at the hook point: what is reconstructed."""
        return self.rows[:, -self.prefix.acts.shape[-1] :]

    def l0(self) -> float:
        """Non-zero latents per token, the mean; NaN of no tokens."""
        return float(self.out.codes.l0().double().mean())


class RunDiverged(Exception):  # noqa: N818
    """A run whose numbers are no longer finite. Nothing of it was saved since.

    Args:
        what: What is not finite, and since when.
        folder: Folder of the run, with its checkpoints from before that.
    """

    def __init__(self, what: str, folder: Path) -> None:
        super().__init__(what)
        self.what, self.folder = what, folder


class RunFinished(Exception):
    """There is nothing left to do in the run that was named; nothing was written."""
