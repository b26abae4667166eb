"""Checks in the seconds before the first step, of what would otherwise waste hours."""

import logging
import math
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from kanllama_lightning.lm import FrozenLM
from kanllama_lightning.splice import put, spliced_losses
from kanllama_lightning.types import InputError, TokenBatch
from kanllama_lightning.units import size

log = logging.getLogger(__name__)

ROWS, POSITIONS = 4, 128
"""How much text the checks look at."""
CE_LIMIT = 0.8
"""Share of ln V (the loss of a uniform guess) above which a model does not know its tokens."""


@torch.no_grad()
def preflight(lm: FrozenLM, tokens: TokenBatch) -> None:
    """Check that tokens, model and hook point fit together.

    Args:
        lm: Loaded LM.
        tokens: Some real text, on the LM's device.

    Raises:
        InputError: They do not; says which check failed and what to do.
    """
    ids, keep, doc = (t[:ROWS, :POSITIONS] for t in tokens[:3])
    part = TokenBatch(ids, keep, doc, tokens.position)
    largest = int(part.ids.max())
    if largest >= lm.vocab_size:
        raise InputError(
            f"data: token id {largest} is beyond the vocabulary of {lm.name} "
            f"({lm.vocab_size}); use text, or ids made with this model's own tokenizer"
        )
    _check_hook(lm, part)
    prefix = lm.prefix(part.ids)
    everywhere = torch.ones_like(part.keep)
    runs = {
        "same": put(prefix.acts, part.keep, prefix.acts[part.keep].float()),
        "zero": put(prefix.acts, everywhere, torch.zeros_like(prefix.acts[everywhere])),
    }
    losses = spliced_losses(lm, prefix, part, runs).ce
    if not len(losses["clean"]):
        raise InputError("data: the first validation rows hold no two neighbouring real tokens")
    ce = {name: float(value.double().mean()) for name, value in losses.items()}
    uniform = math.log(lm.vocab_size)
    log.info(
        "pre-flight: loss %.3f nats per token (uniform guess %.2f), with %s spliced back in %.3f, "
        "zero-ablated %.3f",
        ce["clean"],
        uniform,
        lm.hook.name,
        ce["same"],
        ce["zero"],
    )
    if abs(ce["same"] - ce["clean"]) > 1e-4 * max(1.0, ce["clean"]):
        raise InputError(
            f"lm.hook_point={lm.hook_point!r}: splicing the activations back in changes the loss "
            f"({ce['clean']:.4f} to {ce['same']:.4f}); this model cannot be spliced there"
        )
    if lm.untrained:
        return
    if ce["clean"] > CE_LIMIT * uniform:
        raise InputError(
            f"lm.name={lm.name!r}: loss {ce['clean']:.2f} nats per token on the validation text is "
            f"close to a uniform guess ({uniform:.2f}): are the ids from another tokenizer? "
            "If the model has random weights on purpose, say so: --lm.untrained true"
        )
    if ce["zero"] <= ce["clean"]:
        raise InputError(
            f"lm.hook_point={lm.hook_point!r}: replacing its activations by zeros does not raise "
            f"the loss ({ce['clean']:.4f} to {ce['zero']:.4f}); an autoencoder there has nothing "
            "to preserve. Choose another hook point, or declare --lm.untrained true"
        )


def _check_hook(lm: FrozenLM, tokens: TokenBatch) -> None:
    """The plain transformers forward meets the hook point once, with the same activations."""
    block = lm.model.model.layers[lm.hook.layer]
    seen: list[Tensor] = []

    def keep_output(_: nn.Module, __: tuple[Tensor, ...], out: object) -> None:
        value = out[0] if isinstance(out, tuple) else out
        if isinstance(value, Tensor):
            seen.append(value)

    def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    handle = {
        "resid_pre": lambda: block.input_layernorm.register_forward_pre_hook(keep_input),
        "attn_out": lambda: block.self_attn.register_forward_hook(keep_output),
        "resid_mid": lambda: block.post_attention_layernorm.register_forward_pre_hook(keep_input),
        "mlp_out": lambda: block.mlp.register_forward_hook(keep_output),
        "resid_post": lambda: block.register_forward_hook(keep_output),
    }[lm.hook.kind]()
    try:
        with torch.autocast(tokens.ids.device.type, enabled=False):
            full = lm.model.model(tokens.ids, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    prefix = lm.prefix(tokens.ids)
    where = f"lm.hook_point={lm.hook_point!r}"
    if len(seen) != 1:
        raise InputError(f"{where}: met {len(seen)} times in one forward pass; must be once")
    got, want = prefix.acts, seen[0]
    if (got.shape, got.dtype, got.device) != (want.shape, want.dtype, want.device):
        raise InputError(
            f"{where}: {tuple(want.shape)} {want.dtype} in the model's own forward pass, "
            f"{tuple(got.shape)} {got.dtype} when stopped there; not a Llama-like block"
        )
    tolerance = 1e-4 if got.dtype == torch.float32 else 0.05
    for name, a, b in (("activations", got, want), ("output", lm.resume(prefix, got), full)):
        gap = float((a - b).float().norm() / b.float().norm().clamp_min(1e-12))
        if gap > tolerance:
            raise InputError(
                f"{where}: {name} differ from the model's own forward pass by {gap:.1e} "
                "(relative); its blocks do not compute what a Llama's do"
            )


def check_room(heads: nn.Module, buffer_bytes: int, lm_bytes: int, folder: Path) -> None:
    """Estimate memory and disk of a run, log them, and refuse what cannot fit.

    Args:
        heads: The heads to train: weights, gradients and two Adam moments.
        buffer_bytes: Size of the activation buffer and its queue.
        lm_bytes: Size of the LM's weights in its dtype.
        folder: Where the run is written: two checkpoints and one being written, and the head.
    """
    weights = sum(p.numel() * p.element_size() for p in heads.parameters())
    memory = 4 * weights + buffer_bytes + lm_bytes
    disk = disk_bytes(weights, buffer_bytes)
    free_disk, free = shutil.disk_usage(folder).free, free_memory()
    log.info(
        "needs about %s of memory before batches (%s free) and %s of disk (%s free)",
        size(memory),
        size(free),
        size(disk),
        size(free_disk),
    )
    if disk > free_disk:
        raise InputError(
            f"run folder {str(folder)!r}: the run needs {size(disk)}, {size(free_disk)} are "
            "free; choose another --runs_dir or a smaller buffer"
        )
    if memory > max(free, 1) * 1.5:
        raise InputError(
            f"memory: the run needs about {size(memory)}, {size(free)} are free; "
            "lower model.buffer.capacity_tokens, model.head.d_sae or use lm.dtype=bfloat16"
        )


def disk_bytes(weights: int, buffer_bytes: int) -> int:
    """Disk of a run: two checkpoints and one being written, and the head (all in bytes)."""
    return 3 * (3 * weights + buffer_bytes) + 2 * weights


def free_memory() -> int:
    """Bytes of memory that are free: the GPU's, where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
