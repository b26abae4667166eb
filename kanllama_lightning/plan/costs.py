"""What a token costs: floating-point operations of a head's step and of the LM up to the hook."""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kanllama_lightning.heads import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.types import StepContext

TOKENS = (32, 64)
"""Batches that are counted: what both have in common is per step, the rest per token."""

SPLICED = 3
"""Runs of the LM on from the hook point beside those of the heads: untouched, zeros, mean."""

PICKING = {
    torch.ops.aten._embedding_bag: (0, 1),
    torch.ops.aten._embedding_bag_forward_only: (0, 1),
    torch.ops.aten._embedding_bag_per_sample_weights_backward: (1, 2),
}
"""Sums of rows of a table picked by index, which torch has no formula for: the places of the
table and of the indices among the arguments."""

IN_PLACE = {
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
}
"""Products that torch has a formula for under another name only."""


class Work(NamedTuple):
    """What a report takes, in things that have a price; a position is a token of one run."""

    upto: float = 0.0
    """Positions that the LM is run on up to the hook point."""
    on: float = 0.0
    """Positions that it is run on from there, through its last block."""
    logits: float = 0.0
    """Positions whose logits are made, and made into losses."""
    directions: float = 0.0
    """Directions that the logit lens reads."""
    requests: float = 0.0
    """Calls of a judge, whose time nobody knows here."""


class HeadCost(NamedTuple):
    """What training a head takes."""

    parameters: int
    flops_per_token: float
    """Forward and backward; one multiplication with its addition is 2."""
    flops_per_step: float
    """What comes on top, whatever the size of the batch."""
    saved_per_token: float
    """Bytes kept from the forward pass for the backward pass."""


def head_cost(head: SAEHead, autocast: bool) -> HeadCost:
    """Count, with torch's own formulas, one step of a head on random rows on the CPU.

    Counted are matrix products and sums of rows picked by index (sparse decoding and gradients);
    not counted is what works element by element. No latent is dead, so AuxK is not in it.

    Args:
        head: Untrained, on the CPU; its gradients are gone afterwards.
        autocast: Whether it trains in bf16-mixed.
    """
    few, many = (_count(head, n, autocast) for n in TOKENS)
    more = TOKENS[1] - TOKENS[0]
    flops, saved = ((b - a) / more for a, b in zip(few, many, strict=True))
    return HeadCost(head.n_parameters(), flops, few[0] - TOKENS[0] * flops, max(0.0, saved))


def step_bytes(heads: Iterable[SAEHead], rows: int) -> int:
    """What a step on so many rows keeps for its backward pass, and a plane of pre-activations.

    Args:
        heads: Untrained, on the CPU; copies of them are run.
        rows: Of one process.
    """
    per_row = 0.0
    for head in heads:
        per_row += head_cost(copy.deepcopy(head), autocast=False).saved_per_token + 4 * head.d_sae
    return int(rows * per_row)


def start_bytes(tokens: int, row: int, world: int = 1) -> int:
    """What the start statistics take: their sample, and what is left of it without sinks.

    Args:
        tokens: Activations they are taken of.
        row: Bytes of one.
        world: Processes; where there are several, each gathers what all of them have.
    """
    return tokens * row * (2 if world == 1 else 3)


def _count(head: SAEHead, n: int, autocast: bool) -> tuple[int, int]:
    """Operations of a step on n rows, and bytes saved for its backward pass."""
    x = torch.randn(n, head.d_row, generator=torch.Generator().manual_seed(0))
    own = {p.untyped_storage().data_ptr() for p in head.parameters()}
    saved: dict[int, int] = {x.untyped_storage().data_ptr(): 0}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    counter = _Counter()
    context = StepContext(torch.empty(0, dtype=torch.int64), progress=0.5, rate=0.01)
    head.train()
    with counter, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = head(x)
            loss = torch.stack(list(head.losses(x, out, context).values())).sum()
        if loss.requires_grad:
            loss.backward()
    head.zero_grad(set_to_none=True)
    return counter.flops, sum(saved.values())


class _Counter(TorchDispatchMode):
    """Adds up the operations of whatever runs.

    (torch's FlopCounterMode also follows modules; in some KAN heads that ends in "Expected gradient
    function to be set".)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if packet in PICKING:
            table, indices = (args[i] for i in PICKING[packet])
            self.flops += 2 * indices.numel() * table.shape[1]
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def lm_flops(lm: FrozenLM, ctx_len: int) -> float:
    """Operations per position of the LM up to its hook point, from its configuration.

    Matrix products only: projections, attention (a position sees half the row on average), MLP.

    Args:
        lm: Its weights need not be loaded.
        ctx_len: Positions per row.
    """
    attention, mlp = _block_flops(lm, ctx_len)
    inside = {
        "resid_pre": 0.0,
        "attn_out": attention,
        "resid_mid": attention,
        "mlp_out": attention + mlp,
        "resid_post": attention + mlp,
    }
    return float(lm.hook.layer * (attention + mlp) + inside[lm.hook.kind])


def lm_rest_flops(lm: FrozenLM, ctx_len: int) -> float:
    """Operations per position of going on from the hook point to the logits, counted the same way.

    Args:
        lm: Its weights need not be loaded.
        ctx_len: Positions per row.
    """
    blocks = lm.config.num_hidden_layers * sum(_block_flops(lm, ctx_len))
    return blocks - lm_flops(lm, ctx_len) + 2 * lm.d_model * lm.vocab_size


def _block_flops(lm: FrozenLM, ctx_len: int) -> tuple[float, float]:
    """Operations per position of a block's attention and of its MLP."""
    c = lm.config
    width, head_dim, kv = lm.attention_shape
    attention = 2 * width * head_dim * (2 * c.num_attention_heads + 2 * kv)
    attention += 4 * head_dim * c.num_attention_heads * (ctx_len + 1) / 2
    return attention, 6 * width * c.intermediate_size
