"""Which tensors of a head have a row for each latent, and so can be dealt out over processes.

A part that is not listed here computes something that needs all latents, or all of its own units,
on one process; a head with such a part is trained with all of it on every process.
"""

from collections.abc import Mapping

from torch import nn

from kanllama_lightning.heads.decoders import (
    FreeDirections,
    FrozenDirections,
    SoftlyFrozenDirections,
    UnitDirections,
)
from kanllama_lightning.heads.encoders import (
    FrozenLinearEncoder,
    HiddenEncoder,
    KANReader,
    LinearEncoder,
    UncentredEncoder,
)
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.heads.hidden_units import MLPUnits
from kanllama_lightning.heads.kan_linear import KANLinear, KANUnits
from kanllama_lightning.heads.penalties import L1, Gate, Jump
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Nested, Thresholded, TokenTopK
from kanllama_lightning.types import InputError

DEALT: Mapping[type[nn.Module], Mapping[str, int]] = {
    LinearEncoder: {"W_enc": 1, "b_enc": 0},
    UncentredEncoder: {"W_enc": 1, "b_enc": 0},
    FrozenLinearEncoder: {"W_enc": 1, "b_enc": 0},
    HiddenEncoder: {"W_enc": 1, "U": 1, "b_enc": 0},
    KANReader: {"kan.weight": 0, "b_enc": 0},
    KANUnits: {"kan.weight": 0, "kan_bias": 0},
    MLPUnits: {"V": 1, "c": 0},
    TokenTopK: {},
    Thresholded: {},
    Nested: {},
    L1: {},
    Jump: {"theta": 0},
    Gate: {"r_mag": 0, "b_mag": 0},
    UnitDirections: {"W_dec": 0},
    FreeDirections: {"W_dec": 0},
    FrozenDirections: {"W_dec": 0},
    SoftlyFrozenDirections: {"W_dec": 0, "W_start": 0},
}
"""Tensors of a part that are dealt out, and the dimension along which its latents, or its hidden
units, lie."""

STEP = ("forward", "losses", "observe_")
"""What a head that is dealt out leaves as it is in every head."""
LEFT_OUT = "leave the option out, and every process holds all of the head"


def dealt_tensors(head: SAEHead, world: int) -> dict[str, int]:
    """Names of a head's tensors that are dealt out, and along which dimension.

    Args:
        head: The whole of it.
        world: Processes that it is dealt out to.

    Raises:
        InputError: It cannot be dealt out; says why, and what can.
    """
    kind, found = type(head).__name__, {}
    if any(getattr(type(head), name) is not getattr(SAE, name, None) for name in STEP):
        raise InputError(_refused(f"{kind} makes its step in a way of its own", LEFT_OUT))
    tensors = dict(head.named_parameters()) | dict(head.named_buffers())
    for where in ("encoder", "encoder.units", "selection", "decoder"):
        try:
            part = head.get_submodule(where)
        except AttributeError:  # an encoder without hidden units
            continue
        foreign = isinstance(part, KANUnits) and not isinstance(part.kan, KANLinear)
        if type(part) not in DEALT or foreign:
            odd = type(part.kan if isinstance(part, KANUnits) else part).__name__
            raise InputError(_refused(f"the {odd} of {kind} is not made for it", LEFT_OUT))
        for name, dim in DEALT[type(part)].items():
            size = tensors[f"{where}.{name}"].shape[dim]
            if size % world:
                what = "hidden units" if where.endswith("units") else "latents"
                why = f"{kind} has {size:,} {what}, which {world} processes cannot share evenly"
                raise InputError(_refused(why, f"choose a multiple of {world}"))
            found[f"{where}.{name}"] = dim
    return found


def _refused(why: str, instead: str) -> str:
    return f"model.deal_latents=true: {why}; {instead}"
