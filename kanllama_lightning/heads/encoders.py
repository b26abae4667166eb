"""Encoders: what the pre-activations of a head are made of."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kanllama_lightning.functional.shard import SHARD
from kanllama_lightning.functional.sparse import Branch
from kanllama_lightning.functional.spline_activation import spline_activation
from kanllama_lightning.heads.head import LARGEST
from kanllama_lightning.heads.hidden_units import HI, LO, HiddenUnits, out_of_grid, spline_curves
from kanllama_lightning.heads.kan_linear import KANLinear
from kanllama_lightning.types import Curves, InputError


class Standardising(nn.Module):
    """x~ = (x - mean) / deviation, both of the start sample and frozen (METHODS B3a).

    Args:
        d_model: Width of the activations.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.register_buffer("input_mean", torch.zeros(d_model))
        self.register_buffer("input_std", torch.ones(d_model))

    @torch.no_grad()
    def set_(self, mean: Float[Tensor, " d_model"], std: Float[Tensor, " d_model"]) -> None:
        """Freeze mean and deviation."""
        self.input_mean.copy_(mean)
        self.input_std.copy_(std.clamp_min(1e-6))

    def forward(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok d_model"]:
        """x~ of activations in the head's units."""
        return (x - self.input_mean) / self.input_std


class Encoder(nn.Module, ABC):
    """Pre-activations p as a sum of products of inputs with weights, plus a bias.

    The products are left to the selection, which may need only some of their entries.

    Args:
        d_sae: Number of latents.
    """

    in_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers that are in units of activations, so that they fold (METHODS 0.1)."""
    b_dec_starts_at_zero: ClassVar[bool] = False
    """Whether b_dec is 0 at the start, because it is not taken off the input."""
    b_enc: Tensor
    standardised: Standardising | None
    """x~, for encoders whose curves lie on a fixed grid. These have no form without the head's
    scale: a curve of x~ has no other units."""

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.standardised = None
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    @property
    def least(self) -> Mapping[str, float]:
        """The smallest numbers that tensors of a saved head may hold."""
        return {"standardised.input_std": 1 / LARGEST} if self.standardised is not None else {}

    @abstractmethod
    def branches(
        self, x: Float[Tensor, "tok d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> list[Branch]:
        """Inputs and weights whose products add up to p, the bias apart.

        Args:
            x: Activations in the head's units, fp32.
            b_dec: The head's; no gradient reaches it from here (see `bias`).
        """

    def bias(self, b_dec: Float[Tensor, " d_model"]) -> Float[Tensor, " d_sae"]:
        """What is added to the products."""
        return self.b_enc

    @abstractmethod
    def set_linear_(
        self, W: Float[Tensor, "d_model d_sae"], b_dec: Float[Tensor, " d_model"]
    ) -> None:
        """Make the encoder the map (x - b_dec) W, with no other part."""

    def standardise_(self, mean: Float[Tensor, " d_model"], std: Float[Tensor, " d_model"]) -> None:
        """Freeze mean and deviation of every coordinate, in the head's units."""
        if self.standardised is not None:
            self.standardised.set_(mean, std)

    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:  # noqa: B027
        """Set what else follows from the first activations, in the head's units."""

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """Its curves over activations in the head's units, the most bent ones first."""
        return []

    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """Numbers worth logging about activations in the head's units."""
        return {}


class LinearEncoder(Encoder):
    """p = (x - b_dec) W_enc + b_enc.

    Args:
        W: Directions that the encoder starts from, one per latent.
    """

    def __init__(self, W: Float[Tensor, "d_sae d_model"]) -> None:
        super().__init__(len(W))
        # stored as [d_sae, d_model]: the layout its sparse gradient comes in
        self.W_enc = nn.Parameter(W.detach().clone().T)

    def branches(
        self, x: Float[Tensor, "tok d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> list[Branch]:
        """The centred activations with W_enc."""
        return [(x - b_dec.detach(), self.W_enc)]

    def bias(self, b_dec: Float[Tensor, " d_model"]) -> Float[Tensor, " d_sae"]:
        """b_enc, by which b_dec learns too."""
        return bias_with_offset(self.b_enc, b_dec, self.W_enc.detach())

    @torch.no_grad()
    def set_linear_(
        self, W: Float[Tensor, "d_model d_sae"], b_dec: Float[Tensor, " d_model"]
    ) -> None:
        """Make W_enc W."""
        self.W_enc.copy_(W)


class UncentredEncoder(LinearEncoder):
    """p = x W_enc + b_enc: nothing is taken off the input, and b_dec is 0 at the start."""

    b_dec_starts_at_zero: ClassVar[bool] = True

    def branches(
        self, x: Float[Tensor, "tok d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> list[Branch]:
        """The activations with W_enc."""
        return [(x, self.W_enc)]

    def bias(self, b_dec: Float[Tensor, " d_model"]) -> Float[Tensor, " d_sae"]:
        """b_enc alone."""
        return self.b_enc


class FrozenLinearEncoder(Encoder):
    """p = (x - c) W_enc + b_enc with c, W_enc and b_enc those of the start; nothing is trained.

    Args:
        W: Directions that the encoder starts from, one per latent.
    """

    in_units: ClassVar[tuple[str, ...]] = ("b_enc", "centre")
    W_enc: Tensor
    centre: Tensor

    def __init__(self, W: Float[Tensor, "d_sae d_model"]) -> None:
        nn.Module.__init__(self)
        self.standardised = None
        self.register_buffer("W_enc", W.detach().clone().T)
        self.register_buffer("b_enc", torch.zeros(len(W)))
        self.register_buffer("centre", torch.zeros(W.shape[1]))

    def branches(
        self, x: Float[Tensor, "tok d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> list[Branch]:
        """The activations, the first b_dec taken off, with the first W_enc."""
        return [(x - self.centre, self.W_enc)]

    @torch.no_grad()
    def set_linear_(
        self, W: Float[Tensor, "d_model d_sae"], b_dec: Float[Tensor, " d_model"]
    ) -> None:
        """Keep this W and this b_dec."""
        self.W_enc.copy_(W)
        self.centre.copy_(b_dec)


class HiddenEncoder(LinearEncoder):
    """p = (x - b_dec) W_enc + h(x~) U + b_enc, h hidden units.

    U = 0 at the start, so that the first step is that of the linear encoder, bit for bit.

    Args:
        W: Directions that the linear part starts from, one per latent.
        units: The hidden units; they see standardised activations.
    """

    standardised: Standardising

    def __init__(self, W: Float[Tensor, "d_sae d_model"], units: HiddenUnits) -> None:
        super().__init__(W)
        self.U = nn.Parameter(torch.zeros(len(W), units.n_units).T)
        self.standardised = Standardising(W.shape[1])
        self.units = units

    def branches(
        self, x: Float[Tensor, "tok d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> list[Branch]:
        """The linear branch, and the hidden units with their weights U."""
        hidden, shard = self.units(self.standardised(x)), SHARD.get()
        if shard is not None:
            hidden = shard.joined(hidden)
        return [(x - b_dec.detach(), self.W_enc), (hidden, self.U)]

    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Let the units see their first inputs."""
        self.units.start_(self.standardised(x))

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """Those of the units, times the length of U's rows."""
        return self.units.learned_curves(self.standardised(x), top, self.U.norm(dim=1))

    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """Those of the units."""
        return self.units.diagnostics(self.standardised(x))


class ReLUKANEncoder(Encoder):
    """p = ReLU(KAN(x~) + c_in) U + b_enc: hidden units alone, without a linear branch.

    Args:
        U: Weights of the hidden units at the start.
        kan_in: The KAN layer, from d_model to the hidden units.
    """

    standardised: Standardising

    def __init__(self, U: Float[Tensor, "d_sae hidden"], kan_in: KANLinear) -> None:
        super().__init__(len(U))
        self.kan_in = kan_in
        self.c_in = nn.Parameter(torch.zeros(U.shape[1]))
        self.U = nn.Parameter(U.clone().T)
        self.standardised = Standardising(kan_in.in_features)

    def branches(
        self, x: Float[Tensor, "tok d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> list[Branch]:
        """The hidden units with their weights."""
        return [(torch.relu(self.kan_in(self.standardised(x)) + self.c_in), self.U)]

    def set_linear_(
        self, W: Float[Tensor, "d_model d_sae"], b_dec: Float[Tensor, " d_model"]
    ) -> None:
        """Refused: hidden units behind a ReLU are no line."""
        raise NotImplementedError(type(self).__name__)

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """Edges, hidden units and inputs, times the length of U's rows."""
        return self.kan_in.curves(
            self.standardised(x),
            top,
            ends=("input", "hidden"),
            axes=(
                "input, in deviations of the start sample",
                "edge times |U|, in units of pre-activations",
            ),
            gain=self.U.norm(dim=1),
            pools=("hidden", "input"),
        )

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the KAN layer's inputs beyond its grid."""
        return {"out_of_grid": self.kan_in.out_of_grid(self.standardised(x))}


class KANReader(Encoder):
    """p = KAN(x~) + b_enc: every latent reads every coordinate through a curve of its own.

    Every curve is a line at the start.

    Args:
        W: Directions that the lines start from, one per latent.
        grid_size: Cells between the ends of the grid.
    """

    standardised: Standardising

    def __init__(self, W: Float[Tensor, "d_sae d_model"], grid_size: int) -> None:
        super().__init__(len(W))
        self.standardised = Standardising(W.shape[1])
        self.kan = KANLinear(
            W.shape[1],
            len(W),
            grid_size,
            grid_range=(LO, HI),
            linear_tails=True,
            generator=torch.Generator(),
        )
        self.set_linear_(W.detach().T, W.new_zeros(W.shape[1]))

    @torch.no_grad()
    def set_linear_(
        self, W: Float[Tensor, "d_model d_sae"], b_dec: Float[Tensor, " d_model"]
    ) -> None:
        """Make every curve the line of (x - b_dec) W."""
        self.kan.set_linear_(self.standardised.input_std[:, None] * W)
        self.b_enc.copy_((self.standardised.input_mean - b_dec) @ W)

    def branches(
        self, x: Float[Tensor, "tok d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> list[Branch]:
        """The KAN layer's features with its weights."""
        planes = self.kan.features(self.standardised(x)).flatten(1)
        return [(planes, self.kan.weight.flatten(1).T)]

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """The edges, latents and inputs."""
        return self.kan.curves(
            self.standardised(x),
            top,
            ends=("input", "latent"),
            axes=("input, in deviations of the start sample", "added to the pre-activation"),
            pools=("latent", "input"),
        )

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the inputs beyond the grid."""
        return {"out_of_grid": self.kan.out_of_grid(self.standardised(x))}


class BentInputEncoder(LinearEncoder):
    """p = (x + std phi(x~) - b_dec) W_enc + b_enc, phi a spline per coordinate, 0 at the start.

    Args:
        W: Directions that W_enc starts from, one per latent.
        grid_size: Cells between the ends of the grid.
    """

    standardised: Standardising

    def __init__(self, W: Float[Tensor, "d_sae d_model"], grid_size: int) -> None:
        super().__init__(W)
        if grid_size < 1:
            raise InputError(f"head.grid_size={grid_size}: must be at least 1 (default 5)")
        self.grid_size = grid_size
        self.standardised = Standardising(W.shape[1])
        self.spline = nn.Parameter(torch.zeros(grid_size + 3, W.shape[1]))

    def branches(
        self, x: Float[Tensor, "tok d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> list[Branch]:
        """The bent coordinates with W_enc."""
        bend = spline_activation(
            self.standardised(x),
            self.spline,
            LO,
            HI,
            self.grid_size,
            linear_tails=True,
            compiled=x.is_cuda,  # a CPU gives the same numbers whatever the batch
        )
        return [(x - b_dec.detach() + self.standardised.input_std * bend, self.W_enc)]

    def learned_curves(self, x: Float[Tensor, "tok d_model"], top: int) -> list[Curves]:
        """Inputs: the identity and what their splines add to it."""

        def bent(z: Tensor, which: Tensor) -> Tensor:
            return z + spline_activation(
                z,
                self.spline[:, which],
                LO,
                HI,
                self.grid_size,
                linear_tails=True,
                compiled=False,
            )

        axes = ("input, in deviations of the start sample", "bent input, in the same units")
        return [spline_curves("input", "input", axes, self.standardised(x), bent, top)]

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the coordinates beyond the grid."""
        return {"out_of_grid": out_of_grid(self.standardised(x))}


def bias_with_offset(
    bias: Float[Tensor, " d_sae"],
    offset: Float[Tensor, " d_model"],
    weights: Float[Tensor, "d_model d_sae"],
) -> Float[Tensor, " d_sae"]:
    """The bias; what is taken off the inputs learns by it as through (x - offset) @ weights.

    So the inputs want no gradient, which would be a product of the batch's size.

    Args:
        bias: What is added to the products.
        offset: What is taken off the inputs, detached there.
        weights: What the inputs are multiplied by; they learn nothing here.
    """
    if not (torch.is_grad_enabled() and offset.requires_grad):
        return bias
    out: Tensor = _BiasWithOffset.apply(bias, offset, weights)
    return out


class _BiasWithOffset(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        bias: Float[Tensor, " d_sae"],
        offset: Float[Tensor, " d_model"],  # noqa: ARG004 (its gradient is made)
        weights: Float[Tensor, "d_model d_sae"],
    ) -> Float[Tensor, " d_sae"]:
        ctx.save_for_backward(weights)
        # on the CPU as autocast would have it; a GPU would only write one more copy of the weights
        cast = weights.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        ctx.dtype = torch.get_autocast_dtype("cpu") if cast else weights.dtype
        return bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " d_sae"]) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        moved = grad.to(ctx.dtype).unsqueeze(0) @ weights.to(ctx.dtype).t()
        return grad, -moved.squeeze(0).to(grad.dtype), None
