"""The contract of a head, and how a head is saved: complete, readable, without pickles."""

import importlib
import inspect
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kanllama_lightning.files import replacing, write_text
from kanllama_lightning.functional.losses import reconstruction
from kanllama_lightning.functional.moments import mean_and_std, norms
from kanllama_lightning.types import Curves, InputError, SAEOutput, StepContext

FORMAT = 1
WEIGHTS, CARD = "head.safetensors", "head.json"
ALONE = 64
"""Latents that are decoded alone, each on a row of its own, at once."""


class Trained(nn.Module):
    """What a run trains: a head, or several side by side."""


class SAEHead(Trained, ABC):
    """A sparse autoencoder of activations; takes and returns the LM's own units.

    Every constructor argument is kept as an attribute of the same name: that is what `save`
    writes and `load` builds from.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents.
        seed: Seed of the initial weights (linked to `seed_everything`); the same seed gives the
            same W_enc and W_dec to every kind of head.
    """

    scale: Tensor
    norm_limit: Tensor
    x_mean: Tensor
    x_variance: Tensor

    def __init__(self, d_model: int, d_sae: int, seed: int = 0) -> None:
        super().__init__()
        if d_sae < 1:
            raise InputError(f"head.d_sae={d_sae}: a dictionary needs at least 1 latent")
        self.d_model, self.d_sae, self.seed = d_model, d_sae, seed
        # multiplies raw activations so that their mean norm is sqrt(d_model)
        self.register_buffer("scale", torch.ones(()))
        # rows with a larger raw norm are attention sinks: not trained on, not measured
        self.register_buffer("norm_limit", torch.full((), torch.inf))
        # mean raw activation of the start sample: what mean ablation splices in
        self.register_buffer("x_mean", torch.zeros(d_model))
        # of the start sample, summed over coordinates, in the head's units: the unit of the loss
        self.register_buffer("x_variance", torch.ones(()))

    @abstractmethod
    def encode(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_sae"]:
        """Dense latents as at inference, for people and reports."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Reconstruction, in the LM's units, of dense latents."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "tok d_model"]) -> SAEOutput:
        """Reconstruction and codes; as in training if `self.training`, else as at inference."""

    @abstractmethod
    def losses(
        self, x: Float[Tensor, "tok d_model"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """Already weighted loss terms; the first is the reconstruction.

        All are in one unit (METHODS A3): squared errors over the variance of the start sample
        (`unexplained`), penalties over its square root where they are in units of activations.
        So no coefficient depends on d_model or on the units of the activations.
        """

    def unexplained(
        self, x: Float[Tensor, "tok d_model"], x_hat: Float[Tensor, "tok d_model"]
    ) -> Float[Tensor, ""]:
        """Mean squared error, summed over d_model, as a share of the start sample's variance.

        Args:
            x: Activations in the head's units.
            x_hat: Their reconstructions, in the same units.
        """
        return reconstruction(x, x_hat) / self.x_variance

    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Estimate once, from a sample of raw activations, everything that comes from data.

        Raises:
            InputError: The activations do not vary, or are not finite.
        """
        self.scale.copy_(self.d_model**0.5 / norms(x).double().mean())
        mean, std = mean_and_std(x)
        self.x_mean.copy_(mean)
        self.x_variance.copy_((std * self.scale).square().sum())
        if not 0 < self.x_variance < torch.inf:
            raise InputError(
                f"the {len(x):,} activations of the start sample have a variance of "
                f"{self.x_variance:.3g} about their mean; it must be positive and finite for a "
                "head to learn from them: check lm.name and lm.hook_point"
            )
        self.standardise_(mean * self.scale, std * self.scale)

    def standardise_(  # noqa: B027
        self, mean: Float[Tensor, " d_model"], std: Float[Tensor, " d_model"]
    ) -> None:
        """Take note of the mean and deviation of every coordinate, in the head's units."""

    def observe_(self, out: SAEOutput, ctx: StepContext) -> None:  # noqa: B027
        """Update running statistics (a threshold, a penalty's weight) from a training batch."""

    def calibrate_(self, x: Float[Tensor, "tok d_model"]) -> None:  # noqa: B027
        """Set what inference needs (a threshold, say) from raw training activations."""

    def project_grad_(self) -> None:  # noqa: B027
        """Drop what the projection would undo from the gradients, before they are clipped."""

    def project_(self) -> None:  # noqa: B027
        """Bring the parameters back to where the head wants them, after a step."""

    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """Further numbers worth logging about a batch of raw activations."""
        return {}

    def folded(self) -> "SAEHead":
        """A copy whose scale is 1, for tools that know none; linear heads only.

        Raises:
            InputError: This kind of head cannot do without its scale.
        """
        raise InputError(
            f"{type(self).__name__}: has no form without its scale, as its curves are not linear; "
            "keep the scale beside the weights (it is in head.safetensors)"
        )

    @torch.no_grad()
    def curves(self, x: Float[Tensor, "tok d_model"], top: int = 64) -> list[Curves]:
        """Its learned curves, the most bent of each kind; nothing for a head that has none.

        As at inference, whatever mode the head is in; the encoder's first.

        Args:
            x: Raw activations over which the curves are judged; a few thousand rows.
            top: Curves of each kind.
        """
        if top < 1 or not len(x):
            raise InputError(f"top={top}, x={list(x.shape)}: one curve and one row are the least")
        training = self.training
        try:
            with torch.autocast(x.device.type, enabled=False):
                return self.eval().learned_curves(x, top)
        finally:
            self.train(training)

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """What `curves` returns; called in evaluation mode, without autograd and autocast."""
        return []

    @torch.no_grad()
    def directions(
        self, at: Float[Tensor, " d_sae"], x: Float[Tensor, "tok d_model"]
    ) -> Float[Tensor, "d_sae d_model"]:
        """What each latent writes per unit of its activation; both in the units of the codes.

        Here the secant (f(a e_j) - f(0)) / a, f the decoder; a linear head has its dictionary
        instead, and one whose latents mix in the decoder its mean Jacobian over x (METHODS B6).
        A row of NaN where a latent has no direction.

        Args:
            at: Activation a of each latent, positive: the median over the tokens on which it
                fires; NaN for a latent that does not.
            x: Raw activations, a few thousand rows.
        """
        found = at.new_full((self.d_sae, self.d_model), torch.nan)
        for some in (at > 0).nonzero().squeeze(1).split(ALONE):
            found[some] = self.alone(some, at[some]) / at[some].unsqueeze(1)
        return found

    @torch.no_grad()
    def alone(
        self, latents: Int[Tensor, " n"], values: Float[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """f(a e_j) - f(0), head's units: what a latent adds to an empty code.

        Args:
            latents: Which, one per row.
            values: Activation a of each.
        """
        codes = values.new_zeros(len(latents) + 1, self.d_sae)
        codes[torch.arange(len(latents), device=latents.device), latents] = values
        made = self.decode(codes) * self.scale
        return made[:-1] - made[-1]

    def straightness(
        self, latents: Int[Tensor, " n"], upto: Float[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """How straight what latents alone write is, 0 to 1; a direction from 0.95 on; 1 here.

        Args:
            latents: Which.
            upto: Activation up to which each is judged: the 0.99 quantile of its positive ones.
        """
        return torch.ones_like(upto)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # heads saved before the loss had this unit: they infer as ever, and cannot be trained on
        state_dict.setdefault(f"{prefix}x_variance", torch.full((), torch.nan))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def init_args(self) -> dict[str, Any]:
        """The constructor arguments this head was built with."""
        names = [n for n in inspect.signature(type(self).__init__).parameters if n != "self"]
        return {name: getattr(self, name) for name in names}

    def n_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def save(self, folder: Path, provenance: dict[str, Any] | None = None) -> None:
        """Write `head.safetensors` and `head.json`, from which `SAEHead.load` needs nothing else.

        Args:
            folder: Made if it is missing; both files are replaced whole.
            provenance: Where the head comes from (model, revision, hook point, tokens, ...).
        """
        folder.mkdir(parents=True, exist_ok=True)
        kind = type(self)
        card = {
            "format": FORMAT,
            "class_path": f"{kind.__module__}.{kind.__qualname__}",
            "init_args": self.init_args(),
            "provenance": provenance or {},
        }
        state = {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}
        with replacing(folder / WEIGHTS) as part:
            save_file(state, part)
        write_text(folder / CARD, json.dumps(card, indent=2) + "\n")

    @staticmethod
    def load(folder: str | Path) -> "SAEHead":
        """Rebuild a saved head, on the CPU, in evaluation mode.

        Raises:
            InputError: The folder holds no head, or one this version cannot read.
        """
        folder = Path(folder)
        if not (folder / CARD).is_file() or not (folder / WEIGHTS).is_file():
            raise InputError(
                f"head folder {str(folder)!r}: holds no {CARD} with {WEIGHTS}; give the folder "
                "`head/` of a finished run"
            )
        card = read_card(folder)
        if card.get("format") != FORMAT:
            raise InputError(
                f"{folder / CARD}: format={card.get('format')!r}; this version reads {FORMAT}"
            )
        kind = import_class(card["class_path"], SAEHead)
        try:
            head: SAEHead = kind(**card["init_args"])
            head.load_state_dict(load_file(folder / WEIGHTS))
        except (TypeError, RuntimeError, SafetensorError) as e:
            raise InputError(
                f"head folder {str(folder)!r}: {CARD} and {WEIGHTS} do not fit together or are "
                f"damaged ({str(e).splitlines()[0]}); copy the folder anew from its run"
            ) from e
        return head.eval()


def read_card(folder: Path) -> dict[str, Any]:
    """The `head.json` of a saved head."""
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text())
    except ValueError as e:
        raise InputError(f"{folder / CARD}: is no valid JSON ({e})") from e
    return card


def import_class(class_path: str, base: type) -> Any:
    """The class at `package.module.Name`.

    Raises:
        InputError: There is no such class, or it is no subclass of `base`.
    """
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as e:
        raise InputError(f"class_path {class_path!r}: cannot be imported ({e})") from e
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"class_path {class_path!r}: is no {base.__name__}")
    return found
