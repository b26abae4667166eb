"""Checks in the seconds before the first step, of what would otherwise waste hours."""

import contextlib
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.console.units import size
from kanllama_lightning.functional.moments import mean_and_std, norms
from kanllama_lightning.functional.sinks import regular, sink_limit
from kanllama_lightning.lm.frozen import FrozenLM, overflow_hint
from kanllama_lightning.lm.splice import ablated, put, spliced_losses
from kanllama_lightning.types import InputError, TokenBatch

log = logging.getLogger(__name__)

ROWS, TOKENS = 4, 512
"""How much text the checks look at: whole rows, at most so many, and no second one beyond so many
tokens. Whole, since a model may see only so far back (a window), and rows are where that shows."""
CE_LIMIT = 0.8
"""Share of ln V (the loss of a uniform guess) above which a model does not know its tokens."""
CONSTANT = {torch.float32: 1e-9, torch.bfloat16: 1.5e-5, torch.float16: 2.5e-7}
"""Variance over squared mean up to which activations are one vector and its rounding errors:
a hundred times what rounding makes of one."""
FEW = 16
"""Tokens that may well be alike by chance, as the first ones of a few rows are."""


@torch.no_grad()
def preflight(lm: FrozenLM, tokens: TokenBatch, norm_limit: Tensor | None = None) -> None:
    """Check that tokens, model and hook point fit together.

    Ablations are those of validation: BOS and the like, and attention sinks, keep their activation.

    Args:
        lm: Loaded LM.
        tokens: Some real text in rows of `ctx_len`, on the LM's device.
        norm_limit: Activations with a larger norm are sinks (default: by the text's own norms).

    Raises:
        InputError: They do not; says which check failed and what to do.
    """
    part = check_forward(lm, tokens)
    prefix = lm.prefix(part.ids)
    kept = prefix.acts[part.keep].float()
    if not len(kept):
        raise InputError("data: the first validation rows hold no token that counts")
    limit = sink_limit(norms(kept)) if norm_limit is None else norm_limit
    mask = part.keep & regular(prefix.acts, limit)
    x = prefix.acts[mask].float()
    runs = {k: put(prefix.acts, mask, rows) for k, rows in ablated(x, x.mean(0)).items()}
    runs["same"] = put(prefix.acts, part.keep, kept)
    losses = spliced_losses(lm, prefix, part, runs).ce
    if not len(losses["clean"]):
        raise InputError("data: the first validation rows hold no two neighbouring real tokens")
    ce = {name: float(value.double().mean()) for name, value in losses.items()}
    for name, value in ce.items():
        if not math.isfinite(value):
            where = "" if name != "zero" else f" with {lm.hook.name} zero-ablated"
            raise InputError(
                f"lm.name={lm.name!r}: its loss{where} is {value}, though its hidden states are "
                f"finite: its logits are not. {overflow_hint(lm.dtype)}Give an undamaged model"
            )
    uniform = math.log(lm.vocab_size)
    log.info(
        "pre-flight: loss %.3f nats per token (uniform guess %.2f), with %s spliced back in %.3f, "
        "mean-ablated %.3f, zero-ablated %.3f",
        ce["clean"],
        uniform,
        lm.hook.name,
        ce["same"],
        ce["mean"],
        ce["zero"],
    )
    if not abs(ce["same"] - ce["clean"]) <= 1e-4 * max(1.0, ce["clean"]):
        raise InputError(
            f"lm.hook_point={lm.hook_point!r}: splicing the activations back in changes the loss "
            f"({ce['clean']:.4f} to {ce['same']:.4f}); this model cannot be spliced there"
        )
    if lm.untrained:
        return
    if not ce["clean"] <= CE_LIMIT * uniform:
        raise InputError(
            f"lm.name={lm.name!r}: loss {ce['clean']:.2f} nats per token on the validation text is "
            f"close to a uniform guess ({uniform:.2f}): are the ids from another tokenizer? "
            "If the model has random weights on purpose, say so: --lm.untrained true"
        )
    if not ce["zero"] > ce["clean"]:
        raise InputError(
            f"lm.hook_point={lm.hook_point!r}: replacing its activations by zeros does not raise "
            f"the loss ({ce['clean']:.4f} to {ce['zero']:.4f}); an autoencoder there has nothing "
            "to preserve. Choose another hook point, or declare --lm.untrained true"
        )


@torch.no_grad()
def check_forward(lm: FrozenLM, tokens: TokenBatch) -> TokenBatch:
    """Check that the LM can be given these rows, and computes what a Llama does; numbers finite.

    Args:
        lm: Loaded LM.
        tokens: Some real text in rows of `ctx_len`, on the LM's device.

    Returns:
        The whole rows that were looked at: those with most text.

    Raises:
        InputError: It cannot, or its activations are of no use; says what, where and what to do.
    """
    length = tokens.ids.shape[1]
    lm.check_length(length, f"ctx_len={length}", f"set --data.ctx_len {lm.positions} or less")
    most = tokens.keep.sum(1).argsort(descending=True, stable=True)
    rows = most[: max(1, min(ROWS, TOKENS // length))].sort().values
    ids, keep, doc = (t[rows] for t in tokens[:3])
    part = TokenBatch(ids, keep, doc, tokens.position)
    largest = int(part.ids.max())
    if not largest < lm.vocab_size:
        raise InputError(
            f"data: token id {largest} is beyond the vocabulary of {lm.name} "
            f"({lm.vocab_size}); use text, or ids made with this model's own tokenizer"
        )
    _check_hook(lm, part)
    prefix = lm.prefix(part.ids)
    check_varied(prefix.acts[part.keep], lm)
    if prefix.inputs is not None:
        check_varied(prefix.inputs[part.keep], lm)
    return part


def check_varied(rows: Float[Tensor, "tok d_model"], lm: FrozenLM) -> None:
    """Refuse activations that an autoencoder cannot learn anything from.

    Args:
        rows: Activations of real tokens, sinks included.
        lm: Whose they are.

    Raises:
        InputError: They are not all finite, all zero, or all the same but for rounding.
    """
    where = f"lm.hook_point={lm.hook_point!r} of {lm.name!r}"
    if not len(rows):
        return
    sizes = norms(rows)
    bad = int((~sizes.isfinite()).sum())
    if bad:
        raise InputError(
            f"{where}: {bad:,} of {len(rows):,} activations are NaN or infinite. "
            f"{overflow_hint(lm.dtype)}Give an undamaged model or another hook point"
        )
    x = rows[sizes <= sink_limit(sizes)]
    mean, std = mean_and_std(x)
    square, variance = float(mean.square().sum()), float(std.square().sum())
    if not square + variance > 0:
        raise InputError(
            f"{where}: the activations are zero on all {len(x):,} tokens looked at; an autoencoder "
            "there has nothing to learn. Choose another hook point"
        )
    if len(x) >= FEW and not variance > CONSTANT[lm.dtype] * square:
        raise InputError(
            f"{where}: the activations are the same on all {len(x):,} tokens looked at (but for "
            "rounding); an autoencoder there has nothing to learn. Choose another hook point"
        )


class Watched:
    """What a module of the model gets or gives in a forward pass.

    Args:
        module: The module.
        is_input: Whether what it gets is looked at.
    """

    def __init__(self, module: nn.Module, is_input: bool) -> None:
        self.module, self.is_input = module, is_input
        self.seen: list[Tensor] = []

    def begin(self) -> Any:
        """Look from now on; what is returned has `remove`, which ends it."""
        if self.is_input:
            return self.module.register_forward_pre_hook(self._gets, with_kwargs=True)
        return self.module.register_forward_hook(self._gives)

    def _gets(self, _: nn.Module, args: tuple[Tensor, ...], more: dict[str, Any]) -> None:
        self.seen.append(args[0] if args else more["hidden_states"])

    def _gives(self, _: nn.Module, __: tuple[Tensor, ...], out: object) -> None:
        value = out[0] if isinstance(out, tuple) else out
        if isinstance(value, Tensor):
            self.seen.append(value)


def _check_hook(lm: FrozenLM, tokens: TokenBatch) -> None:
    """The plain transformers forward meets the hook point once, with the same activations."""
    blocks = lm.model.model.layers
    place = lm.hook.site.watched(blocks[lm.hook.layer])
    watched = {f"lm.hook_point={lm.hook_point!r}": Watched(*place)}
    if lm.input is not None:
        place = lm.input.watched(blocks[lm.input.layer])
        watched[f"lm.input_point={lm.input.name!r}"] = Watched(*place)
    with contextlib.ExitStack() as stack:
        for one in watched.values():
            stack.callback(one.begin().remove)
        full = _own_forward(lm, tokens)
    every = [full, *(value for one in watched.values() for value in one.seen)]
    if not all(bool(value.isfinite().all()) for value in every):
        raise InputError(_not_finite(lm, tokens))
    prefix = lm.prefix(tokens.ids)
    pairs = []
    for (where, one), got in zip(watched.items(), (prefix.acts, prefix.inputs), strict=False):
        assert got is not None, "a transcoder reads something"
        if len(one.seen) != 1:
            raise InputError(
                f"{where}: met {len(one.seen)} times in one forward pass; must be once"
            )
        want = one.seen[0]
        if (got.shape, got.dtype, got.device) != (want.shape, want.dtype, want.device):
            raise InputError(
                f"{where}: {tuple(want.shape)} {want.dtype} in the model's own forward pass, "
                f"{tuple(got.shape)} {got.dtype} when stopped there; not a Llama-like block"
            )
        pairs.append((where, "activations", got, want))
    where, _, got, _ = pairs[0]
    pairs.append((where, "output", lm.resume(prefix, got), full))
    tolerance = 1e-4 if got.dtype == torch.float32 else 0.05
    for where, name, a, b in pairs:
        gap = float((a - b).float().norm() / b.float().norm().clamp_min(1e-12))
        if not gap <= tolerance:
            raise InputError(
                f"{where}: {name} differ from the model's own forward pass by {gap:.1e} "
                f"(relative) on rows of {tokens.ids.shape[1]} tokens; its blocks do not compute "
                f"what a Llama's do{_window(lm, tokens.ids.shape[1])}"
            )


def _window(lm: FrozenLM, length: int) -> str:
    """What to do where a model does not see the whole row."""
    window = getattr(lm.config, "sliding_window", None)
    if type(window) is not int or not window < length:
        return ""
    return (
        f": it sees {window} tokens back (sliding_window), and all of a row is needed here; set "
        f"--data.ctx_len {window} or less"
    )


def _own_forward(lm: FrozenLM, tokens: TokenBatch) -> Float[Tensor, "batch pos d_model"]:
    """Final hidden state of transformers' own forward pass."""
    with torch.autocast(tokens.ids.device.type, enabled=False):
        out: Tensor = lm.model.model(tokens.ids, use_cache=False).last_hidden_state
    return out


def _not_finite(lm: FrozenLM, tokens: TokenBatch) -> str:
    """Which part of the model is the first whose output is not finite."""
    found: list[tuple[str, int]] = []

    def look(name: str, out: object) -> None:
        value = out[0] if isinstance(out, tuple) else out
        if isinstance(value, Tensor) and not found and not bool(value.isfinite().all()):
            found.append((name, int((~value.isfinite()).flatten(2).any(-1).sum())))

    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: look(name, out))
        for name, module in lm.model.model.named_modules(prefix="model")
        if name not in ("model", "model.rotary_emb")
    ]
    try:
        _own_forward(lm, tokens)
    finally:
        for handle in handles:
            handle.remove()
    name, positions = found[0] if found else ("model", 0)
    return (
        f"lm.name={lm.name!r}: its activations are NaN or infinite in "
        f"{str(lm.dtype).removeprefix('torch.')}, first in the output of {name}, on {positions:,} "
        f"of {tokens.ids.numel():,} tokens. {overflow_hint(lm.dtype)}Give an undamaged model"
    )


def check_room(
    heads: nn.Module, buffer_bytes: int, lm_bytes: int, folder: Path, passing: int = 0
) -> None:
    """Estimate memory and disk of a run, log them, and refuse what cannot fit.

    On a CPU the copy that a checkpoint is written from is part of it; on a GPU it is in the host's
    memory, of which nothing is said.

    Args:
        heads: The heads to train: weights, gradients and two Adam moments.
        buffer_bytes: Size of the activation buffer and its queue.
        lm_bytes: Size of the LM's weights in its dtype.
        folder: Where the run is written: two checkpoints and one being written, and the head.
        passing: Memory that comes and goes: of the start statistics, or of a step.
    """
    weights = sum(p.numel() * p.element_size() for p in heads.parameters())
    memory = 4 * weights + buffer_bytes + lm_bytes + passing
    if not torch.cuda.is_available():
        memory += checkpoint_bytes(weights, buffer_bytes)
    disk = disk_bytes(weights, buffer_bytes)
    free_disk, free = shutil.disk_usage(folder).free, free_memory()
    log.info(
        "needs about %s of memory (%s free) and %s of disk (%s free)",
        size(memory),
        size(free),
        size(disk),
        size(free_disk),
    )
    if not disk <= free_disk:
        raise InputError(
            f"run folder {str(folder)!r}: the run needs {size(disk)}, {size(free_disk)} are "
            "free; choose another --runs_dir or a smaller buffer"
        )
    if not memory <= max(free, 1) * 1.5:
        raise InputError(
            f"memory: the run needs about {size(memory)}, {size(free)} are free; "
            "lower model.buffer.capacity_tokens, model.head.d_sae or use lm.dtype=bfloat16"
        )


def disk_bytes(weights: int, buffer_bytes: int) -> int:
    """Disk of a run: two checkpoints and one being written, and the head (all in bytes)."""
    return 3 * checkpoint_bytes(weights, buffer_bytes) + 2 * weights


def checkpoint_bytes(weights: int, buffer_bytes: int) -> int:
    """A checkpoint: weights, two moments of Adam, the buffer (all in bytes)."""
    return 3 * weights + buffer_bytes


def free_memory() -> int:
    """Bytes of memory that are free: the GPU's, where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
