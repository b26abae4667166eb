"""Names of the places in a Llama where activations are read."""

import difflib
import re
from typing import Literal, NamedTuple

from kanllama_lightning.types import InputError

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


class HookPoint(NamedTuple):
    """A place in the residual stream of a Llama."""

    layer: int
    kind: Kind

    @property
    def name(self) -> str:
        """The canonical spelling: short, and the same for both spellings of one place."""
        return f"blocks.{self.layer}.hook_{self.kind}"


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
