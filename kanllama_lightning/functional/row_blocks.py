"""Latents made, penalised and decoded in blocks of rows: only their pre-activations are held."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kanllama_lightning.functional.sparse import Pattern, fixed_sizes, with_rows_read_
from kanllama_lightning.functional.splines import rows_at_once

BLOCK, LEAST_ROWS = 1 << 20, 256
"""Pre-activations worked on at once on the CPU, where they then stay in the cache; but at least so
many rows, as every block's share is added to the whole weights."""
GPU_BLOCK = 3 << 23
"""The same on a GPU: a block costs some 50 launches, and ten times its size in memory."""
SPARSE = 1 / 16
"""Share of non-zeros up to which bags of rows beat matrix products on the CPU, whose times meet
at 9 % (d_model 2048) to 15 % (256)."""
SAMPLE_ROWS = 16
"""Every so many rows are looked at to see whether it is worth looking at all."""

Make = Callable[..., tuple[list[Tensor], Tensor]]
"""From pre-activations and vectors over latents: what is decoded, each of the same shape, and the
summed penalty. Elementwise, so that it can be given rows [tok d_sae] with vectors [d_sae], or kept
entries [nnz] with the vectors' entries [nnz]."""


def few_above(
    pre_acts: Float[Tensor, "tok d_sae"], level: Float[Tensor, " d_sae"] | float
) -> Pattern | None:
    """Where pre-activations are above a level, if those are few (SPARSE); else None.

    On a GPU always None: it would have to be waited for, to count.

    Args:
        pre_acts: Pre-activations of a batch.
        level: One for all latents, or one each.
    """
    if fixed_sizes(pre_acts) or not pre_acts.numel():
        return None
    for rows in (pre_acts[::SAMPLE_ROWS], pre_acts):
        above = rows > level
        if int(torch.count_nonzero(above)) > SPARSE * above.numel():
            return None
    return Pattern(above.reshape(-1).nonzero().squeeze(1), *pre_acts.shape)


class KeptEntries(NamedTuple):
    """The few entries in which what is decoded is not zero."""

    pattern: Pattern
    values: Float[Tensor, " nnz"]
    penalty: Float[Tensor, ""]


def decode_in_blocks(
    make: Make,
    pre_acts: Float[Tensor, "tok d_sae"],
    bias: Float[Tensor, " d_sae"],
    branches: Sequence[tuple[Float[Tensor, "tok n"], Float[Tensor, "n d_sae"]]],
    dictionary: Float[Tensor, "d_sae d_model"],
    vectors: Sequence[Float[Tensor, " d_sae"]],
    kept: KeptEntries | None = None,
) -> tuple[Float[Tensor, "tok d_sae"], Float[Tensor, ""], list[Float[Tensor, "tok d_model"]]]:
    """Pre-activations tied to what they came from, the penalty of `make`, and what it decodes.

    Autograd would save every step from pre-activations to loss; here the steps are made
    again, block by block, in the backward pass, which holds no other matrix of [tok d_sae].
    Products are made in the type of autocast, forward and backward, all else in fp32.

    Args:
        make: What latents and penalty are; differentiated by autograd.
        pre_acts: Sum of inputs @ weights over the branches, plus the bias; made without autograd.
        bias: What was added to the products.
        branches: Inputs and weights whose products were summed.
        dictionary: One direction per latent; only the first of what is decoded trains it.
        vectors: Further arguments of `make`.
        kept: Where the one thing that `make` decodes is not zero, if that is known and little:
            decoding and the dictionary's gradient then touch nothing else.
    """
    device = pre_acts.device.type
    dtype = (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dictionary.dtype
    )
    flat = [tensor for branch in branches for tensor in branch]
    with torch.autocast(device, enabled=False):
        pre, penalty, *decoded = _InBlocks.apply(
            make, dtype, kept, len(vectors), pre_acts, bias, dictionary, *vectors, *flat
        )
    return pre, penalty, decoded


def _block_rows(pre_acts: Float[Tensor, "tok d_sae"]) -> int:
    """How many rows a block has."""
    return rows_at_once(pre_acts, pre_acts.shape[1], BLOCK, GPU_BLOCK, least=LEAST_ROWS)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        make: Make,
        dtype: torch.dtype,
        kept: KeptEntries | None,
        n_vectors: int,
        pre_acts: Float[Tensor, "tok d_sae"],
        bias: Float[Tensor, " d_sae"],
        dictionary: Float[Tensor, "d_sae d_model"],
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        vectors, pairs = rest[:n_vectors], rest[n_vectors:]
        pre_acts = pre_acts.view_as(pre_acts)
        ctx.save_for_backward(pre_acts, bias, dictionary, *vectors, *pairs)
        ctx.make, ctx.dtype, ctx.kept, ctx.n_vectors = make, dtype, kept, n_vectors
        ctx.set_materialize_grads(False)
        if kept is not None:
            return pre_acts, kept.penalty, kept.pattern.sum_latents(kept.values, dictionary)
        weights = dictionary.to(dtype)
        blocks: list[list[Tensor]] = []
        penalty = pre_acts.new_zeros(())
        for rows in pre_acts.split(_block_rows(pre_acts)):
            latents, part = make(rows, *vectors)
            blocks.append([wide_product(z.to(dtype), weights) for z in latents])
            penalty += part
        return pre_acts, penalty, *(torch.cat(parts) for parts in zip(*blocks, strict=True))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_pre: Tensor | None, to_penalty: Tensor | None, *to_decoded: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        pre_acts, bias, dictionary, *rest = ctx.saved_tensors
        dtype, kept, n_vectors = ctx.dtype, ctx.kept, ctx.n_vectors
        vectors = [v.detach().requires_grad_() for v in rest[:n_vectors]]
        directions, *pairs = (t.to(dtype) for t in (dictionary, *rest[n_vectors:]))
        need_bias, need_dictionary, *need = ctx.needs_input_grad[5:]
        need_pairs = need[n_vectors:]

        for_bias = torch.zeros_like(bias)
        for_vectors: list[Tensor | None] = [None] * n_vectors
        # of a weight transposed: the layout in which it is stored
        for_pairs = [
            torch.zeros_like(t.t() if i % 2 else t, dtype=torch.float32)
            if needed
            else t.new_empty(0)
            for i, (t, needed) in enumerate(zip(pairs, need_pairs, strict=True))
        ]
        for_dictionary, to_z = None, to_decoded[0]
        if need_dictionary and to_z is not None:
            for_dictionary = (
                torch.zeros_like(dictionary)
                if kept is None
                else kept.pattern.sum_rows(kept.values, to_z.contiguous())
            )
        size = _block_rows(pre_acts)
        for start in range(0, len(pre_acts), size):
            rows = slice(start, start + size)
            p = pre_acts[rows].detach().requires_grad_()
            with torch.enable_grad():
                latents, penalty = ctx.make(p, *vectors)
            outputs, gradients = [], []
            if to_penalty is not None:
                outputs, gradients = [penalty], [to_penalty]
            for z, to in zip(latents, to_decoded, strict=True):
                if to is not None:
                    outputs.append(z)
                    gradients.append(wide_product(to[rows].to(dtype), directions.t()))
            if kept is None and for_dictionary is not None and to_z is not None:
                z = latents[0].detach().to(dtype)
                add_product_(for_dictionary, z.t(), to_z[rows].to(dtype))
            to_p, *to_vectors = gradients_of(outputs, [p, *vectors], gradients)
            del latents, outputs, gradients
            for i, part in enumerate(to_vectors):
                total = for_vectors[i]
                for_vectors[i] = part if total is None or part is None else total.add_(part)
            if to_p is None:
                to_p = torch.zeros_like(p)
            if to_pre is not None:
                to_p = to_p + to_pre[rows]
            if need_bias:
                for_bias += to_p.sum(0)
            to_p = to_p.to(dtype)
            for i in range(0, len(pairs), 2):
                if need_pairs[i]:
                    for_pairs[i][rows] = to_p @ pairs[i + 1].t()
                if need_pairs[i + 1]:
                    add_product_(for_pairs[i + 1], to_p.t(), pairs[i][rows])
        if for_dictionary is not None:
            with_rows_read_(for_dictionary, dictionary)
        for total, weights, needed in zip(
            for_pairs[1::2], rest[n_vectors + 1 :: 2], need_pairs[1::2], strict=True
        ):
            if needed:
                with_rows_read_(total, weights)
        return (
            *(None,) * 5,
            for_bias if need_bias else None,
            for_dictionary,
            *for_vectors,
            *(
                (total.t() if i % 2 else total) if needed else None
                for i, (total, needed) in enumerate(zip(for_pairs, need_pairs, strict=True))
            ),
        )


def gradients_of(
    outputs: list[Tensor], inputs: list[Tensor], gradients: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of some outputs; None for an input that none of them depends on."""
    if not outputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))


def wide_product(left: Float[Tensor, "a n"], right: Float[Tensor, "n b"]) -> Float[Tensor, "a b"]:
    """left @ right in fp32, whatever the factors; a GPU does not round sums of bf16 products."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def add_product_(
    total: Float[Tensor, "a b"], left: Float[Tensor, "a n"], right: Float[Tensor, "n b"]
) -> None:
    """total += left @ right, where total may be of a wider type than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
