"""Heads of ours in SAELens: `import kanllama_lightning.exchange.saelens_plugin` registers them.

`SAE.load_from_disk(FOLDER)` then loads what `evaluate.py export RUN --to saelens` wrote of a head
with curves, or of a transcoder that SAELens has no class for, and `save_model` writes it again.
Needs SAELens, and of this package the heads alone: no Lightning, no datasets. The head computes in
fp32 with the very code it was trained with, so that latents and reconstructions are those of its
own record, bit for bit; where SAELens is asked for another number format, inputs and outputs have
that one (SAELens also rounds the weights to it, as it reads them).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, register_sae_class
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEConfig
from torch import Tensor

from kanllama_lightning.exchange.agreement import base
from kanllama_lightning.exchange.saelens import OURS
from kanllama_lightning.heads.decoders import AdditiveCurves, UnitDirections
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.storage.named import checked_args, named_class, only

PREFIX = "head."
STRAIGHT = 1e-4
"""Up to which a decoder's secants may differ for its dictionary to count as one."""


@dataclass
class KANLlamaSAEConfig(SAEConfig):
    """`cfg.json` of a head that is written whole."""

    head_class: str = ""
    """Its name among the heads of this package."""
    head_args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def architecture(cls) -> str:
        """The name it is registered under."""
        return OURS


class KANLlamaSAE(SAE[KANLlamaSAEConfig]):
    """A head of ours, whatever its kind, as an SAE of SAELens."""

    head: SAEHead

    def initialize_weights(self) -> None:
        """The head, on the CPU and in fp32: heads draw their start from CPU generators."""
        with torch.device("cpu"), only(()):
            kind = named_class(self.cfg.head_class, SAEHead)
            args = checked_args(kind, self.cfg.head_args, "head_args")
            self.head = kind(**args).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KANLlamaSAE":
        """Moves the head between devices and leaves its number format: splines need fp32."""

        def moved(one: Tensor) -> Tensor:
            if one.is_meta:
                return fn(one)
            return one.to(fn(one.new_empty(0)).device)

        made: KANLlamaSAE = super()._apply(moved, recurse)
        return made

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """The names that the head itself saves by."""
        for name in [name for name in state_dict if name.startswith(PREFIX)]:
            state_dict[name.removeprefix(PREFIX)] = state_dict.pop(name).contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Back to where the head lies in here, in fp32."""
        fresh = self.head.state_dict()
        for name in list(state_dict):
            value = state_dict.pop(name)
            state_dict[f"{PREFIX}{name}"] = value.to(fresh[name].dtype) if name in fresh else value

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents as at inference."""
        rows = self.process_sae_in(x)
        z = self.head.encode(rows.reshape(-1, self.cfg.d_in).float())
        made: Tensor = self.hook_sae_acts_post(
            z.reshape(*rows.shape[:-1], self.cfg.d_sae).to(self.dtype)
        )
        return made

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Their reconstruction."""
        rows = self.head.decode(feature_acts.reshape(-1, self.cfg.d_sae).float())
        made: Tensor = self.hook_sae_recons(
            rows.reshape(*feature_acts.shape[:-1], self.cfg.d_in).to(self.dtype)
        )
        return made

    def beside(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """What a transcoder's skip adds to what its latents write; zeros without one."""
        rows = x.reshape(-1, self.cfg.d_in).float()
        made = base(self.head, rows).expand(len(rows), -1)
        return made.reshape(x.shape).to(self.dtype)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction; of a transcoder what it writes, the skip included."""
        if self.head.transcoder:
            made: Tensor = self.hook_sae_output(self.decode(self.encode(x)) + self.beside(x))
        else:
            made = super().forward(x)
        return made

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The activations as they are: the head takes off itself what it takes off."""
        made: Tensor = self.hook_sae_input(sae_in.to(self.dtype))
        return made

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:  # noqa: N802
        """What each latent alone writes per unit of its activation; see `W_dec_is_surrogate`."""
        return self._secants(self._typical())

    @property
    def W_dec_is_surrogate(self) -> bool:  # noqa: N802
        """Whether the decoder curves: then `W_dec` are secants, at each latent's reach where it has
        one and else at 1, and logit lens and cosines of them are a first look and no more."""
        if isinstance(getattr(self.head, "decoder", None), UnitDirections):
            return False
        one, two = self._secants(self._typical()), self._secants(2 * self._typical())
        return not bool(((one - two).norm(dim=1) <= STRAIGHT * one.norm(dim=1)).all())

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # noqa: N802
        """The linear part of the encoder, for activations as they are.

        Raises:
            AttributeError: It has none.
        """
        encoder: Any = self.head.encoder
        scale = self.head.input_scale if self.head.transcoder else self.head.scale
        return (encoder.W_enc * scale).detach()

    @property
    def b_dec(self) -> Float[Tensor, " d_in"]:
        """The reconstruction of no latent."""
        none = torch.zeros(1, self.cfg.d_sae, device=self.head.scale.device)
        return self.head.decode(none)[0].detach()

    def _typical(self) -> Float[Tensor, " d_sae"]:
        decoder = getattr(self.head, "decoder", None)
        if isinstance(decoder, AdditiveCurves):
            return decoder.reach
        return torch.ones(self.cfg.d_sae, device=self.head.scale.device)

    def _secants(self, at: Float[Tensor, " d_sae"]) -> Float[Tensor, "d_sae d_in"]:
        decoder = getattr(self.head, "decoder", None)
        if isinstance(decoder, UnitDirections):
            return self.head.directions(at, self.head.x_mean[None]) / self.head.scale
        # of a latent alone: also where latents mix
        return SAEHead.directions(self.head, at, self.head.x_mean[None]) / self.head.scale

    def fold_W_dec_norm(self) -> None:  # noqa: N802
        """Nothing: latents are reported along unit directions, and curves have no norm."""


if OURS not in SAE_CLASS_REGISTRY:
    register_sae_class(OURS, KANLlamaSAE, KANLlamaSAEConfig)
