"""What formats say beside the weights: which LM, where in it, on which text."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.lm.hook_points import SPELLINGS, HookPoint

TEXTS = ("lm", "hook_point", "input_point", "revision", "text", "tokenizer")
MOST_L0 = 1e9
"""More latents per token than any dictionary has."""
KEY = "kanllama_lightning"
"""Under which a folder that we wrote says what its format has no word for."""


class Origin(NamedTuple):
    """Where an SAE comes from, as far as that is known."""

    lm: str | None = None
    """Hub name or folder."""
    hook_point: str | None = None
    """In any spelling; `spellings` has the others."""
    input_point: str | None = None
    """Where a transcoder reads, in the spelling of ours; it writes at `hook_point`."""
    revision: str | None = None
    bos: str | int | None = None
    """Token that every row begins with; None for the tokenizer's own."""
    ctx_len: int | None = None
    text: str | None = None
    """What it was trained on."""
    tokenizer: str | None = None
    """Where the tokenizer is from."""
    l0: float | None = None
    """Mean latents per token on held-out text."""
    trained: Mapping[str, Any] | None = None
    """Further facts about its training."""
    frequency: Float[Tensor, " d_sae"] | None = None
    """Share of tokens on which each latent fires."""

    @property
    def site(self) -> HookPoint | None:
        """The hook point; None where it is not known to be one of ours."""
        return site(self.hook_point)

    def spellings(self) -> dict[str, str]:
        """What the hook point is called by others, where it has a name there."""
        at = self.site
        if at is None:
            return {}
        own = [s.replace("{i}", str(at.layer)) for s, kind in SPELLINGS.items() if kind == at.kind]
        module = next((s for s in own if s.startswith("model.")), None)
        found = {"transformer_lens": at.name}
        if module is not None:
            found |= {"transformers": module, "sparsify": module.removeprefix("model.")}
        return found

    def said(self) -> dict[str, Any]:
        """All of it as plain values, for the key of ours."""
        named = self._replace(frequency=None)._asdict()
        own = {name: value for name, value in named.items() if value is not None}
        return own | {"spellings": self.spellings()}

    def provenance(self) -> dict[str, Any]:
        """As the card of a head says it."""
        known = {
            "lm": self.lm,
            "revision": self.revision,
            "hook_point": self.hook_point if self.site is None else self.site.name,
            "input_point": self.input_point,
            "bos": self.bos,
        }
        return {name: value for name, value in known.items() if value is not None}


def site(name: str | None) -> HookPoint | None:
    """The hook point of a name in any spelling, SAELens' and sparsify's too."""
    found = re.search(r"\.(\d{1,6})(?=\.|$)", f".{name or ''}")
    if name is None or found is None:
        return None
    at = found.start(1) - 1
    pattern = name[:at] + "{i}" + name[at + len(found[1]) :]
    for one in (pattern, f"model.{pattern}"):
        if one in SPELLINGS:
            return HookPoint(int(found[1]), SPELLINGS[one])
    return None


def from_said(said: Any) -> Origin:
    """What a folder says under our key; of something else there, nothing."""
    if not isinstance(said, dict):
        return Origin()
    texts: dict[str, Any] = {k: v for k, v in said.items() if k in TEXTS and isinstance(v, str)}
    bos, l0, ctx_len = said.get("bos"), said.get("l0"), said.get("ctx_len")
    return Origin(
        **texts,
        bos=bos if isinstance(bos, str) or type(bos) is int else None,
        l0=float(l0) if isinstance(l0, int | float) and 0 < l0 < MOST_L0 else None,
        ctx_len=ctx_len if type(ctx_len) is int else None,
    )
