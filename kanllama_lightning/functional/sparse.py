"""Selecting the largest activations of a batch, and computing with only those."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from kanllama_lightning.functional import ranks
from kanllama_lightning.functional.common_cutoff import largest_in_all
from kanllama_lightning.functional.shard import SHARD

SAMPLE_STRIDE = 61
"""Every so many values are looked at to guess a lower bound of the cut-off; odd, so that the
sample walks through all latents."""
SMALL = 1 << 16
"""Below so many values the guess costs more than it saves."""

COUNTED_ON = ("cpu",)
"""Devices on which it costs nothing to wait for a number. Elsewhere a step has fixed sizes."""

Branch = tuple[Float[Tensor, "tok _"], Float[Tensor, "_ d_sae"]]
"""Inputs and weights whose product is a part of the pre-activations."""


def fixed_sizes(x: Tensor) -> bool:
    """Whether a step must do without sizes that depend on values, as a GPU is waited for to count.

    Selections then have as many entries as they may have at most: where fewer activations are
    positive, entries of value 0 fill up. They count nowhere, and have no gradient.
    """
    return x.device.type not in COUNTED_ON


class SparseCodes(NamedTuple):
    """The kept activations of a batch: nothing of shape [tok d_sae] is held."""

    values: Float[Tensor, " nnz"]
    """Post-activation values (> 0 but for PCA, whose codes are signed, and for `fixed_sizes`)."""
    rows: Int[Tensor, " nnz"]
    """Token of each value, ascending."""
    latents: Int[Tensor, " nnz"]
    """Latent of each value."""
    n_rows: int
    d_sae: int

    def dense(self) -> Float[Tensor, "tok d_sae"]:
        """The codes as one dense matrix, for people and small reports."""
        out = self.values.new_zeros(self.n_rows, self.d_sae)
        return out.index_put((self.rows, self.latents), self.values)

    def l0(self) -> Int[Tensor, " tok"]:
        """Number of non-zero latents of each token."""
        return self._count(self.rows, self.n_rows)

    def fired(self) -> Int[Tensor, " d_sae"]:
        """Number of tokens on which each latent is non-zero."""
        return self._count(self.latents, self.d_sae)

    def _count(self, index: Int[Tensor, " nnz"], size: int) -> Int[Tensor, " size"]:
        out = torch.zeros(size, dtype=torch.int64, device=index.device)
        return out.index_add_(0, index, (self.values != 0).long())

    def sparse(self) -> "SparseCodes":
        """These codes."""
        return self


class Sums(NamedTuple):
    """Pre-activations that are not yet multiplied out: a sum of products, plus a bias."""

    branches: list[Branch]
    """Inputs and weights."""
    bias: Float[Tensor, " d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    """The encoder's own part of the bias: the same in value, but without what b_dec learns by."""

    def dense(
        self, latents: Int[Tensor, " some"] | None = None, after: Tensor | None = None
    ) -> Float[Tensor, "tok _"]:
        """The pre-activations, fp32, of all latents or of some; `after` as in `rows_of`."""
        return products(self.branches, self.bias, latents, after)

    def tied(self, values: Float[Tensor, " nnz"], pattern: "Pattern") -> Float[Tensor, " nnz"]:
        """Some of them, made without autograd, tied to what they came from (`kept_products`)."""
        return kept_products(values, pattern, self.bias, self.branches)


def largest_positive(
    values: Float[Tensor, "tok d_sae"], count: int
) -> tuple[Int[Tensor, " kept"], Float[Tensor, ""]]:
    """Flat positions of the `count` largest positive values, ascending, and the cut-off.

    Exact: among equal values at the cut-off the lowest positions win. Fewer positions come back
    when fewer values are positive. Of several processes (`ranks.pooled`) each gives its part of
    what is largest among the values of all, and the lowest ranks win ties; and so it is where
    latents are dealt out (`SHARD`), with `count` for all. On the CPU a sampled lower bound first
    throws away nearly all values (it only ever saves time: when it leaves too few, all values are
    searched).

    Args:
        values: Activations of a batch, any sign.
        count: How many to keep, >= 1; of several processes, for each of them on average.

    Returns:
        The positions, and the smallest kept value (0 when fewer than `count` were positive).
    """
    shard = SHARD.get()
    if shard is not None:
        with ranks.pooled():
            return _largest_of_all(values, -(-count // shard.world), count)
    if ranks.POOLED.get():
        return _largest_of_all(values, count, count * ranks.world())
    return _largest_here(values, count)


def _largest_of_all(
    values: Float[Tensor, "tok d_sae"], share: int, count: int
) -> tuple[Int[Tensor, " kept"], Float[Tensor, ""]]:
    """This process's part of the `count` largest of all processes; `share` is its even part."""
    _, cutoff = _largest_counted(values, share)
    flat = values.reshape(-1)
    # the common cut-off is no lower than the lowest that a process has for its share
    found = ((flat >= ranks.smallest(cutoff)) & (flat > 0)).nonzero().squeeze(1)
    kept, cutoff = largest_in_all(flat.index_select(0, found), count)
    return found[kept], cutoff


def _largest_here(
    values: Float[Tensor, "tok d_sae"], count: int
) -> tuple[Int[Tensor, " kept"], Float[Tensor, ""]]:
    """`largest_positive` of this process's values alone."""
    return (_largest_fixed if fixed_sizes(values) else _largest_counted)(values, count)


def _largest_fixed(
    values: Float[Tensor, "tok d_sae"], count: int
) -> tuple[Int[Tensor, " kept"], Float[Tensor, ""]]:
    """Exactly `count` positions: the same, and where fewer values are positive the next ones."""
    flat = values.reshape(-1)
    count = min(count, flat.numel())
    cutoff = flat.topk(count, sorted=False).values.min()
    above, equal = (
        torch.nonzero_static(mask(flat, cutoff), size=count).squeeze(1)
        for mask in (torch.gt, torch.eq)
    )
    n_above = (above >= 0).sum()
    place = torch.arange(count, device=flat.device)
    ties = equal.index_select(0, (place - n_above).clamp_min_(0))
    positions = torch.where(place < n_above, above, ties)
    # of NaN neither is any; the run then ends at the next look, and not within a kernel
    return positions.clamp_min_(0).sort().values, cutoff.clamp_min(0)


def _largest_counted(
    values: Float[Tensor, "tok d_sae"], count: int
) -> tuple[Int[Tensor, " kept"], Float[Tensor, ""]]:
    """Only positive ones, however many there are: their number is waited for."""
    flat = values.reshape(-1)
    candidates = None
    if flat.device.type == "cpu" and flat.numel() > SMALL and count * 4 < flat.numel():
        sample = flat[::SAMPLE_STRIDE]
        rank = min(sample.numel(), int(1.3 * count * sample.numel() / flat.numel()) + 50)
        bound = sample.topk(rank, sorted=False).values.min().clamp_min(0.0)
        candidates = (flat > bound).nonzero().squeeze(1)
        if candidates.numel() < count:
            candidates = None
    if candidates is None:
        candidates = (flat > 0).nonzero().squeeze(1)
    kept = flat.index_select(0, candidates)  # like [candidates], at a third of the time
    if candidates.numel() < count:
        return candidates, kept.new_zeros(())
    cutoff = kept.topk(count, sorted=False).values.min()
    above = kept > cutoff
    ties = (kept == cutoff).nonzero().squeeze(1)[: count - int(above.sum())]
    above[ties] = True
    return candidates[above], cutoff


class Pattern:
    """Which latents are kept on which rows: by row as given, and by latent once that is asked for.

    Both orders are what a bag of rows is summed in: a token's latents to decode it, a latent's
    tokens for the gradients of its weights.

    Args:
        flat: Row * n_latents + latent of everything kept, ascending.
        n_rows: Number of tokens.
        n_latents: Number of latents.
    """

    def __init__(self, flat: Int[Tensor, " nnz"], n_rows: int, n_latents: int) -> None:
        self.flat, self.n_rows, self.n_latents = flat, n_rows, n_latents
        self.rows: Int[Tensor, " nnz"] = flat.div(n_latents, rounding_mode="floor")
        self.latents: Int[Tensor, " nnz"] = flat - self.rows * n_latents

    @cached_property
    def row_starts(self) -> Int[Tensor, " tok"]:
        """Where each row begins."""
        return _starts(self.rows, self.rows, self.n_rows)

    @cached_property
    def latent_starts(self) -> Int[Tensor, " d_sae"]:
        """Where each latent begins, in `by_latent` order."""
        return _starts(self.latents, self._sorted.values, self.n_latents)

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"]]:
        """The order that sorts by latent, and the rows in it."""
        order = self._sorted.indices
        return order, self.rows.index_select(0, order)

    @cached_property
    def _sorted(self) -> torch.return_types.sort:
        return self.latents.sort(stable=True)

    def of_latents(self, vectors: Iterable[Float[Tensor, " d_sae"]]) -> list[Float[Tensor, " nnz"]]:
        """The entries of vectors that belong to what is kept."""
        return [vector.index_select(0, self.latents) for vector in vectors]

    def sum_latents(
        self, values: Float[Tensor, " nnz"], table: Float[Tensor, "d_sae n"]
    ) -> Float[Tensor, "tok n"]:
        """For each row, the sum of value * table[latent] over what it keeps."""
        return F.embedding_bag(
            self.latents, table, self.row_starts, mode="sum", per_sample_weights=values
        )

    def sum_rows(
        self, values: Float[Tensor, " nnz"], table: Float[Tensor, "tok n"]
    ) -> Float[Tensor, "d_sae n"]:
        """For each latent, the sum of value * table[row] over the rows that keep it."""
        order, rows = self.by_latent
        values = values.index_select(0, order)
        return F.embedding_bag(
            rows, table, self.latent_starts, mode="sum", per_sample_weights=values
        )


def _starts(
    index: Int[Tensor, " nnz"], ascending: Int[Tensor, " nnz"], size: int
) -> Int[Tensor, " size"]:
    """Where each number up to `size` begins in the ascending index; where it is missing, the next.

    By counting, which a CPU does faster, or by searching, which launches less.
    """
    if fixed_sizes(index):
        return torch.searchsorted(ascending, torch.arange(size, device=index.device))
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    counts.index_add_(0, index, torch.ones_like(index))
    return counts.cumsum(0) - counts


def sparse_decode(
    values: Float[Tensor, " nnz"], pattern: Pattern, dictionary: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, "tok d_model"]:
    """Sum of value * dictionary row over what each token keeps.

    Touches only kept rows of the dictionary, forward and backward.

    Args:
        values: Kept activations.
        pattern: Where they are.
        dictionary: One direction per latent.
    """
    values = values.to(dictionary.dtype)
    summed = pattern.sum_latents(values, dictionary.detach())
    if not dictionary.requires_grad:
        return summed
    out: Tensor = _ToDictionary.apply(summed, values.detach(), dictionary, pattern)
    return out


class _ToDictionary(torch.autograd.Function):
    """The identity; hands the gradient on and gives the dictionary its own."""

    @staticmethod
    def forward(
        ctx: Any,
        summed: Float[Tensor, "tok d_model"],
        values: Float[Tensor, " nnz"],
        dictionary: Float[Tensor, "d_sae d_model"],
        pattern: Pattern,
    ) -> Float[Tensor, "tok d_model"]:
        ctx.save_for_backward(values)
        ctx.pattern, ctx.dictionary = pattern, dictionary
        return summed.view_as(summed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "tok d_model"]) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        to_dictionary = ctx.pattern.sum_rows(values, grad.contiguous())
        return grad, None, with_rows_read_(to_dictionary, ctx.dictionary), None


def kept_products(
    values: Float[Tensor, " nnz"],
    pattern: Pattern,
    bias: Float[Tensor, " d_sae"],
    branches: Sequence[tuple[Float[Tensor, "tok _"], Float[Tensor, "_ d_sae"]]],
) -> Float[Tensor, " nnz"]:
    """Kept entries of sum_b inputs_b @ weights_b + bias, with sparse gradients.

    The products themselves were made, without autograd, to find out what to keep; this ties
    the kept values to what they came from. Backward costs one pass over the kept entries per
    weight (and per input that wants a gradient), not a product of the batch's size. It is
    fastest for weights stored transposed, [d_sae n], whose gradients then need no transposing.

    Args:
        values: The kept entries.
        pattern: Where they are.
        bias: What was added to the products.
        branches: Inputs and weights whose products were summed.

    Returns:
        The entries; 0 for those that only fill up what is of `fixed_sizes`.
    """
    out: Tensor = _KeptProducts.apply(
        values, pattern, bias, *(tensor for branch in branches for tensor in branch)
    )
    return filled_up(out)


def filled_up(values: Float[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
    """Kept activations; 0 for those that only fill up what is of `fixed_sizes`."""
    return values.relu() if fixed_sizes(values) else values


class _KeptProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Float[Tensor, " nnz"],
        pattern: Pattern,
        bias: Float[Tensor, " d_sae"],
        *pairs: Tensor,
    ) -> Float[Tensor, " nnz"]:
        ctx.save_for_backward(bias, *pairs)
        ctx.pattern = pattern
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " nnz"]) -> tuple[Tensor | None, ...]:
        bias, *pairs = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        need_bias, *need = ctx.needs_input_grad[2:]
        found: list[Tensor | None] = [
            torch.zeros_like(bias).index_add_(0, pattern.latents, grad.to(bias.dtype))
            if need_bias
            else None
        ]
        for i in range(0, len(pairs), 2):
            inputs, weights = pairs[i], pairs[i + 1]
            found.append(
                pattern.sum_latents(grad.to(weights.dtype), weights.t().contiguous()).to(
                    inputs.dtype
                )
                if need[i]
                else None
            )
            to_weights = None
            if need[i + 1]:
                to_weights = pattern.sum_rows(grad.to(weights.dtype), inputs.to(weights.dtype))
                to_weights = with_rows_read_(to_weights, weights).t()
            found.append(to_weights)
        return None, None, *found


ROWS_READ: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Gradients of rows of weights on their way into the weights' own: places and rows, by weight."""


def rows_of(
    weight: Float[Tensor, "n d"], latents: Int[Tensor, " some"], after: Tensor | None = None
) -> Float[Tensor, "some d"]:
    """Rows of a weight, or of the transposed of one, that a loss reads beside the pass over all.

    Alone their gradient is a matrix of the weight's size, most of it zeros, and it is added to that
    of the pass. On a GPU it is handed to the pass, which adds the rows in place.

    Args:
        weight: A parameter, or a view of one, as the pass over all has it (or its transposed).
        latents: Which rows, none twice.
        after: What comes of the pass over all, so that this is differentiated first; None where
            there is no such pass. It must be one that calls `with_rows_read_`.
    """
    base = weight if weight._base is None else weight._base
    own = base.is_leaf and base.requires_grad
    in_place = own and after is not None and after.requires_grad and fixed_sizes(weight)
    if not (in_place and torch.is_grad_enabled()):
        return weight[latents]
    out: Tensor = _RowsOf.apply(weight, latents, after, base)
    return out


class _RowsOf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Float[Tensor, "n d"],
        latents: Int[Tensor, " some"],
        after: Tensor,  # noqa: ARG004 (comes first in backward)
        base: Tensor,
    ) -> Float[Tensor, "some d"]:
        ctx.latents, ctx.base = latents, base
        return weight.index_select(0, latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "some d"]) -> tuple[Tensor | None, ...]:
        ROWS_READ.setdefault(ctx.base, []).append((ctx.latents, grad))
        return None, None, None, None


def with_rows_read_(grad: Float[Tensor, "n d"], weight: Tensor) -> Float[Tensor, "n d"]:
    """The gradient of a weight (or of its transposed), and that of rows read beside it."""
    base = weight if weight._base is None else weight._base
    for latents, rows in ROWS_READ.pop(base, ()):
        grad.index_add_(0, latents, rows.to(grad.dtype))
    return grad


def products(
    branches: list[Branch],
    bias: Float[Tensor, " d_sae"],
    latents: Int[Tensor, " some"] | None = None,
    after: Tensor | None = None,
) -> Float[Tensor, "tok _"]:
    """Inputs @ weights, summed over the branches, plus the bias; fp32, of all latents or some."""
    total: Tensor | None = None
    for inputs, weights in branches:
        some = weights if latents is None else rows_of(weights.T, latents, after).T
        if total is None:
            total = product(inputs, some).float()
        # in place: each sum would be one more tensor of the batch's size, and so would each product
        elif total.dtype == inputs.dtype == some.dtype and not mixed_precision(inputs):
            total.addmm_(inputs, some)
        else:
            total.add_(product(inputs, some))
    assert total is not None, "a head without an encoder"
    return total.add_(bias if latents is None else bias[latents])


def product(left: Float[Tensor, "a n"], right: Float[Tensor, "n b"]) -> Float[Tensor, "a b"]:
    """left @ right in the type of autocast, whose sums a GPU need not round to it.

    Rounded to bf16 many pre-activations are equal, and which are kept would depend on their places.
    Where gradients are made this is the plain product: the other one has none.
    """
    if left.is_cuda and mixed_precision(left) and not torch.is_grad_enabled():
        dtype = torch.get_autocast_dtype("cuda")
        return torch.mm(left.to(dtype), right.to(dtype), out_dtype=torch.float32)
    return left @ right


def mixed_precision(like: Tensor) -> bool:
    """Whether autocast is on where a tensor is; it leaves operations in place alone."""
    return torch.is_autocast_enabled(like.device.type)
