"""The contract of a head, and how a head is saved: complete, readable, without pickles."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NotRequired, TypedDict

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kanllama_lightning.functional.moments import mean_and_std, norms
from kanllama_lightning.storage.files import replacing
from kanllama_lightning.storage.named import (
    PACKAGE,
    arguments_of,
    checked_args,
    module_of,
    name_of,
    named_class,
    only,
    ship,
)
from kanllama_lightning.storage.small_files import (
    Count,
    ordinary_size,
    read_json,
    there,
    write_json,
)
from kanllama_lightning.types import Curves, InputError, SAEOutput, StepContext

FORMAT = 3
"""Version of a saved head's format; 2 had no parts, 1 named its class by `class_path` besides."""
FLOATS = ("F32", "F16", "BF16", "F64")
"""Number formats, in safetensors' words, that become a head's own on loading."""
LARGEST = 1e8
"""Largest size of the numbers of a head: their products stay far from what a number can be."""
MOST_LOG = math.log(LARGEST)
"""Largest logarithm of a gain, which is such a number itself."""
AGAIN = "copy the folder anew from its run"
UNIT = "x_variance"
"""The tensor that heads lack which were saved before the loss had one unit."""
WEIGHTS, CARD = "head.safetensors", "head.json"
LATENTS_PER_COORDINATE = 8
"""Where a head does not say how many latents it has."""
ALONE = 64
"""Latents that are decoded alone, each on a row of its own, at once."""


class Provenance(TypedDict, total=False):
    """Where a head comes from, as far as it says."""

    lm: str
    revision: str | None
    hook_point: str
    input_point: str | None
    lm_dtype: str
    init_from: str | None
    tokens: Count
    passes: float | None
    step: Count
    commit: str | None


class Card(TypedDict):
    """`head.json`."""

    format: int
    head: NotRequired[str]
    class_path: NotRequired[str]
    init_args: dict[str, Any]
    provenance: NotRequired[Provenance]


def width(d_model: int, d_sae: int | None) -> int:
    """Number of latents of a head that may not say one."""
    return LATENTS_PER_COORDINATE * d_model if d_sae is None else d_sae


class Trained(nn.Module):
    """What a run trains: a head, or several side by side."""


class SAEHead(Trained, ABC):
    """A sparse autoencoder of activations; takes and returns the LM's own units.

    Every constructor argument is kept as an attribute of the same name: that is what `save`
    writes and `load` builds from.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        d_sae: Number of latents; None for 8 times the width.
        seed: Seed of the initial weights (linked to `seed_everything`); the same seed gives the
            same W_enc and W_dec to every kind of head.
    """

    control: ClassVar[str] = ""
    """What a head that is a control leaves out; empty for the others."""
    optimizer_args: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Arguments of the optimizer that this kind of head is trained with side by side, unless the
    configuration gives it others; alone it is trained with those of its config."""
    former_extras: ClassVar[tuple[str, ...]] = ()
    """Tensors that heads of this kind had in earlier versions, and never used."""
    transcoder: bool = False
    """Whether it reads another place than it writes: then its rows hold first what it reads, then
    what it is to write, `d_model` numbers each; otherwise one activation that is both."""
    scale: Tensor
    norm_limit: Tensor
    x_mean: Tensor
    x_variance: Tensor

    def __init__(self, d_model: int, d_sae: int | None, seed: int = 0) -> None:
        super().__init__()
        d_sae = width(d_model, d_sae)
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

    def __init_subclass__(cls, shipped: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if shipped:
            ship(cls)

    @property
    def least(self) -> Mapping[str, float]:
        """The smallest numbers that tensors of a saved head may hold, by their names."""
        return {}

    @property
    def most(self) -> Mapping[str, float]:
        """The largest numbers that tensors of a saved head may hold, where `LARGEST` is too large
        for them."""
        return {}

    @property
    def title(self) -> str:
        """What tables and pages call it: its class, or what it is a control for."""
        name = f"{self.control} (control)" if self.control else type(self).__name__
        if not self.transcoder:
            return name
        return f"{name}, {'skip ' if getattr(self, 'skip', False) else ''}transcoder"

    @property
    def d_row(self) -> int:
        """Width of the rows that it is given."""
        return self.d_model * (2 if self.transcoder else 1)

    def target(self, x: Float[Tensor, "tok d_row"]) -> Float[Tensor, "tok d_model"]:
        """What is to be written, of rows that it is given."""
        return x[:, self.d_model :] if self.transcoder else x

    @abstractmethod
    def encode(self, x: Float[Tensor, "tok d_row"]) -> Float[Tensor, "tok d_sae"]:
        """Dense latents as at inference, for people and reports.

        A transcoder takes what it reads alone as well: rows of d_model.
        """

    @abstractmethod
    def decode(self, latents: Float[Tensor, "tok d_sae"]) -> Float[Tensor, "tok d_model"]:
        """Reconstruction, in the LM's units, of dense latents; without what a skip adds."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "tok d_row"]) -> SAEOutput:
        """Reconstruction and codes; as in training if `self.training`, else as at inference."""

    @abstractmethod
    def losses(
        self, x: Float[Tensor, "tok d_row"], out: SAEOutput, ctx: StepContext
    ) -> dict[str, Float[Tensor, ""]]:
        """Already weighted loss terms; the first is the reconstruction.

        All are in one unit (METHODS A3): squared errors over the variance of the start sample
        (`unexplained`), penalties over its square root where they are in units of activations.
        So no coefficient depends on d_model or on the units of the activations.
        """

    def start_(self, x: Float[Tensor, "tok d_row"]) -> None:
        """Estimate once, from a sample of raw activations, everything that comes from data.

        Raises:
            InputError: The activations do not vary, or are not finite.
        """
        target = self.target(x)
        self.scale.copy_(self.d_model**0.5 / norms(target).double().mean())
        mean, std = mean_and_std(target)
        self.x_mean.copy_(mean)
        self.x_variance.copy_((std * self.scale).square().sum())
        if not 0 < self.x_variance < torch.inf:
            raise InputError(
                f"the {len(x):,} activations of the start sample have a variance of "
                f"{self.x_variance:.3g} about their mean; it must be positive and finite for a "
                "head to learn from them: check lm.name and lm.hook_point"
            )
        if not self.transcoder:
            self.standardise_(mean * self.scale, std * self.scale)

    def fits(self, other: "SAEHead") -> bool:
        """Whether the tensors of both have the same names and shapes."""
        own, its = self.state_dict(), other.state_dict()
        return own.keys() == its.keys() and all(own[n].shape == its[n].shape for n in own)

    @torch.no_grad()
    def take_over_(self, other: "SAEHead") -> None:
        """Become what another head that fits is, after `start_`.

        Its weights, thresholds and scale are taken over. What is known of the text that is trained
        on now stays: mean, variance, and the norm from which on a token is a sink.
        """
        own = self.x_mean.clone(), self.norm_limit.clone(), self.x_variance / self.scale.square()
        self.load_state_dict(other.state_dict())
        self.x_mean.copy_(own[0])
        self.norm_limit.copy_(own[1])
        self.x_variance.copy_(own[2] * self.scale.square())

    def standardise_(  # noqa: B027
        self, mean: Float[Tensor, " d_model"], std: Float[Tensor, " d_model"]
    ) -> None:
        """Take note of the mean and deviation of every coordinate, in the head's units."""

    def observe_(self, out: SAEOutput, ctx: StepContext) -> None:  # noqa: B027
        """Update running statistics (a threshold, a penalty's weight) from a training batch."""

    def calibrate_(self, x: Float[Tensor, "tok d_row"]) -> None:  # noqa: B027
        """Set what inference needs (a threshold, say) from raw training activations."""

    @property
    def makeshift(self) -> str | None:
        """What inference makes do with, in words, where `calibrate_` has not set what it needs."""
        return None

    @property
    def unit_rows(self) -> nn.Parameter | None:
        """The weight of which `project_` renormalises the rows and does no more; None without."""
        return None

    def keep_rows(self, kept: bool) -> None:  # noqa: B027
        """Whether `project_grad_` and `project_` are to see to `unit_rows`, as they do at first."""

    def project_grad_(self) -> None:  # noqa: B027
        """Drop what the projection would undo from the gradients, before they are clipped."""

    def project_(self) -> None:  # noqa: B027
        """Bring the parameters back to where the head wants them, after a step."""

    def diagnostics(self, x: Float[Tensor, "tok d_row"]) -> dict[str, Float[Tensor, ""]]:
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
    def curves(self, x: Float[Tensor, "tok d_row"], top: int = 64) -> list[Curves]:
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

    def learned_curves(self, x: Float[Tensor, "tok d_row"], top: int) -> list[Curves]:
        """What `curves` returns; called in evaluation mode, without autograd and autocast."""
        return []

    @torch.no_grad()
    def directions(
        self, at: Float[Tensor, " d_sae"], x: Float[Tensor, "tok d_row"]
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

    @staticmethod
    def former_name(name: str) -> str:
        """What a tensor was called in heads saved by earlier versions."""
        return name

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self.state_dict():
            former = f"{prefix}{self.former_name(name)}"
            if former in state_dict and f"{prefix}{name}" not in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict.pop(former)
        for name in self.former_extras:
            state_dict.pop(f"{prefix}{name}", None)
        # heads saved before the loss had this unit: they infer as ever, and cannot be trained on
        state_dict.setdefault(f"{prefix}{UNIT}", torch.full((), torch.nan))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def init_args(self) -> dict[str, Any]:
        """The constructor arguments this head was built with."""
        return {name: getattr(self, name) for name in arguments_of(type(self))}

    def n_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def modules_named(self) -> list[str]:
        """Modules beyond this package that its card names: what loading it has to allow."""
        names = [name_of(type(self)), getattr(self, "kan_class", "")]
        return sorted({module for name in names if name and (module := module_of(name))})

    def save(self, folder: Path, provenance: dict[str, Any] | None = None) -> None:
        """Write `head.safetensors` and `head.json`, from which `SAEHead.load` needs nothing else.

        Args:
            folder: Made if it is missing; both files are replaced whole.
            provenance: Where the head comes from (model, revision, hook point, tokens, ...).
        """
        folder.mkdir(parents=True, exist_ok=True)
        card = {
            "format": FORMAT,
            "head": name_of(type(self)),
            "init_args": self.init_args(),
            "provenance": provenance or {},
        }
        state = {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}
        with replacing(folder / WEIGHTS) as part:
            save_file(state, part)
        write_json(folder / CARD, card)

    @staticmethod
    def load(folder: str | Path, allow: Collection[str] = ()) -> "SAEHead":
        """Rebuild a saved head, on the CPU, in evaluation mode.

        Nothing is imported that the files name: heads and KAN layers of this package are known by
        their names. Files of any age and origin may be loaded.

        Args:
            folder: That of a head: `head/` of a run.
            allow: Modules whose classes the files may name beyond that, such as
                `["my_package.heads"]`. Importing a module runs its code.

        Raises:
            InputError: The folder holds no head, or one this version cannot read; a class is of a
                module that is not allowed; weights are not those of such a head, or no numbers.
        """
        folder = Path(folder)
        if not there(folder / CARD) or not there(folder / WEIGHTS):
            raise InputError(
                f"head folder {str(folder)!r}: holds no {CARD} with {WEIGHTS}; give the folder "
                "`head/` of a finished run"
            )
        return built(read_card(folder), folder / CARD, folder / WEIGHTS, allow)


def built(
    card: Mapping[str, Any], where: Path, weights: Path, allow: Collection[str] = ()
) -> SAEHead:
    """A head from its class, its arguments and its weights, as `SAEHead.load` returns it.

    Args:
        card: `head` (a name) and `init_args`.
        where: The file that says so, for messages.
        weights: Its tensors, as `SAEHead.save` writes them.
        allow: See `SAEHead.load`.

    Raises:
        InputError: They are not those of a head.
    """
    with only(allow), _explained(where, card):
        kind = named_class(card["head"], SAEHead)
        args = checked_args(kind, card["init_args"], "init_args")
        ours = kind.__module__.startswith(f"{PACKAGE}.")
        with torch.device("meta"):  # takes no room, whatever numbers are in the card
            plan = kind(**args) if ours else None
    if plan is not None:
        _check_shapes(weights, plan)
    with only(allow), _explained(where, card):
        head: SAEHead = kind(**args)
    _load_weights(weights, head)
    return head.eval()


@contextmanager
def _explained(path: Path, card: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a constructor does not take into an InputError that names the card."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{path}: {e}") from e
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise InputError(
            f"{path}: {card['head']} cannot be built from init_args={card['init_args']} "
            f"({str(e).splitlines()[0]}); {AGAIN}"
        ) from e


def read_card(folder: Path) -> dict[str, Any]:
    """The `head.json` of a saved head; one of any version has `head`, the name of its class.

    Raises:
        InputError: It is damaged, or of another version than this one can read.
    """
    path = folder / CARD
    card: dict[str, Any] = read_json(path, Card, AGAIN)
    if card["format"] not in range(1, FORMAT + 1):
        raise InputError(f"{path}: format={card['format']}; this version reads 1 to {FORMAT}")
    name = card.get("head", card.pop("class_path", None))
    if name is None:
        raise InputError(f"{path}: head is missing; {AGAIN}")
    return card | {"head": name}


def _check_shapes(path: Path, head: SAEHead) -> None:
    """Compare what a file says it holds with what a head has; raises InputError."""
    want = head.state_dict()
    ordinary_size(path, AGAIN)
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            said = {n: (list(s.get_shape()), str(s.get_dtype())) for n, s in found.items()}
    except (SafetensorError, OSError) as e:
        raise _unfit(path, f"is damaged or cannot be read ({e})") from e
    former = {head.former_name(name): name for name in want}
    # one that is there under both of its names is there once too often
    names = {name: former[name] for name in said if former.get(name, name) not in said}
    said = {names.get(name, name): s for name, s in said.items()}
    said = {name: s for name, s in said.items() if name not in head.former_extras}
    for name in sorted((want.keys() ^ said.keys()) - ({UNIT} - said.keys())):
        how = "is missing" if name in want else f"is nothing that a {type(head).__name__} has"
        raise _unfit(path, f"{name} {how}")
    for name in sorted(want.keys() & said.keys()):
        tensor, (shape, kind) = want[name], said[name]
        if shape != list(tensor.shape):
            raise _unfit(path, f"{name} has the shape {shape} instead of {list(tensor.shape)}")
        if tensor.is_floating_point() and kind not in FLOATS:
            raise _unfit(path, f"{name} holds {kind}, not numbers of {', '.join(FLOATS)}")


def _load_weights(path: Path, head: SAEHead) -> None:
    """Fill a head, and refuse what is no number where a head has some; raises InputError."""
    _check_shapes(path, head)
    fresh = {name: value.clone() for name, value in head.state_dict().items()}
    try:
        state = load_file(path)
        head.load_state_dict(state)
    except (RuntimeError, SafetensorError, OSError) as e:
        raise _unfit(path, f"does not fit {CARD} ({str(e).splitlines()[0]})") from e
    for name, value in head.state_dict().items():
        if name == UNIT and value.isnan():
            continue  # of a head saved before; one in the file is positive, see below
        # not yet known, or without a limit, as in a new head
        odd = value.isnan() & ~fresh[name].isnan() | value.isinf() & ~fresh[name].isinf()
        if odd.any():
            raise _unfit(path, f"{name} holds {int(odd.sum()):,} values that are no finite number")
        largest = value[value.isfinite()].abs().amax() if value.isfinite().any() else 0.0
        if not largest <= LARGEST:
            raise _unfit(path, f"{name} holds {float(largest):.3g}; {LARGEST:g} is the most")
        most = head.most.get(name, LARGEST)
        if value[value.isfinite()].gt(most).any():
            raise _unfit(path, f"{name} holds {float(value.max()):.3g}; {most:.3g} is the most")
        least = head.least.get(name)
        if least is not None and (value < least).any():
            raise _unfit(path, f"{name} holds {float(value.min()):.3g}; {least:g} is the least")
    known = state.get(UNIT, torch.ones(()))
    for name, limit, least in (
        ("scale", head.scale, 1 / LARGEST),
        ("norm_limit", head.norm_limit, 0.0),
        (UNIT, known, 0.0),
    ):
        if not (limit > 0 and limit >= least):
            least_said = f" (at least {least:g})" if least else ""
            raise _unfit(path, f"{name}={float(limit):g} must be larger than 0{least_said}")


def _unfit(path: Path, why: str) -> InputError:
    return InputError(f"{path}: {why}; {AGAIN}")
