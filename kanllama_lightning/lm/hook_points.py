"""The places in a Llama where activations are read: their names, and what each is in a block."""

import difflib
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

from jaxtyping import Bool
from torch import Tensor, nn

from kanllama_lightning.types import InputError, Prefix

Kind = Literal["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]

SPELLINGS: dict[str, Kind] = {
    "model.layers.{i}": "resid_post",
    "model.layers.{i}.self_attn": "attn_out",
    "model.layers.{i}.mlp": "mlp_out",
    "blocks.{i}.hook_resid_pre": "resid_pre",
    "blocks.{i}.hook_attn_out": "attn_out",
    "blocks.{i}.hook_resid_mid": "resid_mid",
    "blocks.{i}.hook_mlp_out": "mlp_out",
    "blocks.{i}.hook_resid_post": "resid_post",
}


InputKind = Literal["resid_pre", "attn_out", "resid_mid", "mlp_in"]
INPUT_SPELLINGS: dict[str, InputKind] = {
    "model.layers.{i}.self_attn": "attn_out",
    "blocks.{i}.hook_resid_pre": "resid_pre",
    "blocks.{i}.hook_attn_out": "attn_out",
    "blocks.{i}.hook_resid_mid": "resid_mid",
    "blocks.{i}.mlp.hook_in": "mlp_in",
}
"""Where a transcoder may read; `mlp_in` is what the MLP itself gets, behind the norm."""
ORDER = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
"""The places in a block, in the order in which they are computed."""


Block = Any
"""A block of transformers' Llama: two norms, `self_attn` and `mlp`."""


class Sight(NamedTuple):
    """Where the tokens of a run stand, and what they see."""

    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of their positions."""
    mask: Bool[Tensor, "batch 1 pos pos"] | None = None
    """Which tokens (last axis) each one sees; None for all before it and itself."""


def attention_out(block: Block, h: Tensor, sight: Sight) -> Tensor:
    """What a block's attention adds to the residual stream `h`."""
    # without a mask scaled_dot_product_attention is causal by itself
    out: Tensor = block.self_attn(
        hidden_states=block.input_layernorm(h),
        position_embeddings=sight.rotary,
        attention_mask=sight.mask,
    )[0]
    return out


def mlp_out(block: Block, h: Tensor) -> Tensor:
    """What a block's MLP adds to the residual stream `h`."""
    out: Tensor = block.mlp(block.post_attention_layernorm(h))
    return out


def whole(block: Block, h: Tensor, sight: Sight) -> Tensor:
    """The residual stream after a block, from that before it."""
    return after_attention(block, h + attention_out(block, h, sight), sight)


def after_attention(block: Block, h: Tensor, _: Sight) -> Tensor:
    """The residual stream after a block, from that between its attention and its MLP."""
    return h + mlp_out(block, h)


def _nothing(_: Block, h: Tensor, __: Sight) -> Tensor:
    return h


def _read_mlp(block: Block, h: Tensor, sight: Sight) -> Prefix:
    h = h + attention_out(block, h, sight)
    return Prefix(mlp_out(block, h), h)


class Site(NamedTuple):
    """What a hook point is in its block."""

    read: Callable[[Block, Tensor, Sight], Prefix]
    """From the residual stream before the block to the activation, and what it is added to."""
    resume: Callable[[Block, Tensor, Sight], Tensor]
    """From the residual stream at the hook point to that after the block."""
    watched: Callable[[Block], tuple[nn.Module, bool]]
    """The module of the model that has the activation, and whether it is its input."""


SITES: dict[Kind, Site] = {
    "resid_pre": Site(
        lambda _, h, __: Prefix(h, None), whole, lambda block: (block.input_layernorm, True)
    ),
    "attn_out": Site(
        lambda block, h, sight: Prefix(attention_out(block, h, sight), h),
        after_attention,
        lambda block: (block.self_attn, False),
    ),
    "resid_mid": Site(
        lambda block, h, sight: Prefix(h + attention_out(block, h, sight), None),
        after_attention,
        lambda block: (block.post_attention_layernorm, True),
    ),
    "mlp_out": Site(_read_mlp, _nothing, lambda block: (block.mlp, False)),
    "resid_post": Site(
        lambda block, h, sight: Prefix(whole(block, h, sight), None),
        _nothing,
        lambda block: (block, False),
    ),
}


class HookPoint(NamedTuple):
    """A place in the residual stream of a Llama."""

    layer: int
    kind: Kind

    @property
    def site(self) -> Site:
        """What it is in its block."""
        return SITES[self.kind]

    @property
    def name(self) -> str:
        """The canonical spelling: short, and the same for both spellings of one place."""
        return f"blocks.{self.layer}.hook_{self.kind}"


class InputPoint(NamedTuple):
    """A place in a Llama that a transcoder reads, before the one that it writes."""

    layer: int
    kind: InputKind

    @property
    def name(self) -> str:
        """The canonical spelling."""
        last = "mlp.hook_in" if self.kind == "mlp_in" else f"hook_{self.kind}"
        return f"blocks.{self.layer}.{last}"

    def read(self, block: Block, h: Tensor, sight: Sight, middle: Tensor | None = None) -> Tensor:
        """The activation there.

        Args:
            block: The block it is in.
            h: The residual stream before that block.
            sight: Where the tokens stand.
            middle: The stream between attention and MLP, where it is known already.
        """
        if self.kind == "resid_pre":
            return h
        if self.kind == "attn_out":
            return attention_out(block, h, sight)
        middle = h + attention_out(block, h, sight) if middle is None else middle
        if self.kind == "resid_mid":
            return middle
        normed: Tensor = block.post_attention_layernorm(middle)
        return normed

    def watched(self, block: Block) -> tuple[nn.Module, bool]:
        """The module of the model that has the activation, and whether it is its input."""
        return (block.mlp, True) if self.kind == "mlp_in" else SITES[self.kind].watched(block)


def parse_input_point(name: str, hook: HookPoint) -> InputPoint:
    """The place that `name` means, before the hook point `hook`; its kind alone: in the same block.

    Raises:
        InputError: No such place, or it is not before the hook point.
    """
    found = re.search(r"\.(\d+)(?=\.|$)", name)
    pattern = name[: found.start(1)] + "{i}" + name[found.end(1) :] if found else ""
    kind = INPUT_SPELLINGS.get(pattern) if found else None
    if name in INPUT_SPELLINGS.values():
        kind, layer = cast(InputKind, name), hook.layer
    elif found and kind:
        layer = int(found[1])
    else:
        listed = ", ".join(s.replace("{i}", "N") for s in INPUT_SPELLINGS)
        raise InputError(
            f"lm.input_point={name!r}: no place that a transcoder reads. Allowed: mlp_in, "
            f"resid_mid, attn_out, resid_pre (of the block of lm.hook_point), or {listed}"
        )
    if not (layer, ORDER.index(kind)) < (hook.layer, ORDER.index(hook.kind)):
        raise InputError(
            f"lm.input_point={name!r}: a transcoder reads before it writes, and this is not before "
            f"lm.hook_point={hook.name!r}; give an earlier place, such as mlp_in with "
            f"--lm.hook_point model.layers.{hook.layer}.mlp"
        )
    return InputPoint(layer, kind)


def parse_hook_point(name: str, n_layers: int) -> HookPoint:
    """The place that `name` means in a model of `n_layers` blocks.

    Raises:
        InputError: No such place; names the nearest ones and lists all.
    """
    found = re.search(r"\.(\d+)(?=\.|$)", name)
    if found:
        layer = int(found[1])
        pattern = name[: found.start(1)] + "{i}" + name[found.end(1) :]
        if pattern in SPELLINGS:
            if layer < n_layers:
                return HookPoint(layer, SPELLINGS[pattern])
            raise InputError(
                f"lm.hook_point={name!r}: the model has {n_layers} blocks, 0 to {n_layers - 1}"
            )
    names = [s.replace("{i}", found[1] if found else "0") for s in SPELLINGS]
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    listed = ", ".join(s.replace("{i}", "N") for s in SPELLINGS)
    raise InputError(
        f"lm.hook_point={name!r}: no such place.{hint} "
        f"Allowed, with N from 0 to {n_layers - 1}: {listed}"
    )
