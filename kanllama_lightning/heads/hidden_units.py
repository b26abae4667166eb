"""Hidden units of an encoder: a KAN layer, an MLP's, or splines, on equal terms."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kanllama_lightning.functional.curves import densities, line_residual, pooled, ranked
from kanllama_lightning.functional.spline_activation import spline_activation
from kanllama_lightning.functional.splines import greville
from kanllama_lightning.types import Curves, InputError

LO, HI = -3.0, 3.0
"""Ends of a grid over standardised inputs, in deviations."""


class HiddenUnits(nn.Module, ABC):
    """h(x~): what an encoder has beside its linear part.

    Args:
        n_units: How many there are.
    """

    def __init__(self, n_units: int) -> None:
        super().__init__()
        if n_units < 1:
            raise InputError(f"head.d_hidden={n_units}: must be at least 1")
        self.n_units = n_units

    @abstractmethod
    def forward(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok hidden"]:
        """The units at standardised activations."""

    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:  # noqa: B027
        """Set what follows from the first standardised activations."""

    def learned_curves(
        self, x: Float[Tensor, "tok d_model"], top: int, gain: Float[Tensor, " hidden"]
    ) -> list[Curves]:
        """The curves inside, the most bent ones first.

        Args:
            x: Standardised activations.
            top: Curves of each kind.
            gain: What one unit of each is worth further on.
        """
        return []

    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """Numbers worth logging about standardised activations."""
        return {}


class MLPUnits(HiddenUnits):
    """ReLU(x~ V + c): V Gaussian with columns of norm about 1, c = 0 at the start.

    Args:
        d_model: Width of the activations.
        n_units: How many.
        seed: That of the head; V is drawn from a stream of its own.
    """

    def __init__(self, d_model: int, n_units: int, seed: int) -> None:
        super().__init__(n_units)
        self.V = nn.Parameter(drawn(d_model, n_units, seed))
        self.c = nn.Parameter(torch.zeros(n_units))

    def forward(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok hidden"]:
        """ReLU(x~ V + c)."""
        return torch.relu(x @ self.V + self.c)


class SplineUnits(HiddenUnits):
    """phi(x~ V): a cubic B-spline of its own for every unit, on [-3, 3] with linear tails.

    At the start phi is a ReLU with its corner rounded off (coefficients ReLU(greville)), and the
    columns of V are scaled so that x~ V has deviation 1.

    Args:
        d_model: Width of the activations.
        n_units: How many.
        grid_size: Cells between the ends of the grid.
        seed: That of the head; V is drawn from a stream of its own.
    """

    def __init__(self, d_model: int, n_units: int, grid_size: int, seed: int) -> None:
        super().__init__(n_units)
        self.grid_size = grid_size
        self.V = nn.Parameter(drawn(d_model, n_units, seed))
        rounded = greville(LO, HI, grid_size).relu().float()
        self.spline = nn.Parameter(rounded[:, None].repeat(1, n_units))

    @torch.no_grad()
    def start_(self, x: Float[Tensor, "tok d_model"]) -> None:
        """Scale V to what it will see."""
        self.V.div_((x @ self.V).std(0).clamp_min(1e-6))

    def forward(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok hidden"]:
        """phi(x~ V)."""
        # a CPU gives the same numbers whatever the batch
        return self._spline(x @ self.V, self.spline, compiled=x.is_cuda)

    def _spline(self, at: Tensor, coefficients: Tensor, compiled: bool) -> Tensor:
        return spline_activation(
            at, coefficients, LO, HI, self.grid_size, linear_tails=True, compiled=compiled
        )

    def learned_curves(
        self, x: Float[Tensor, "tok d_model"], top: int, gain: Float[Tensor, " hidden"]
    ) -> list[Curves]:
        """The units."""

        def bent(z: Tensor, which: Tensor) -> Tensor:
            return self._spline(z, self.spline[:, which], compiled=False)

        axes = ("input of the unit, in deviations", "unit times |U|, in units of pre-activations")
        return [spline_curves("hidden unit", "hidden", axes, x @ self.V, bent, top, gain)]

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the units' inputs beyond the grid."""
        return {"out_of_grid": out_of_grid(x @ self.V)}


def spline_curves(
    kind: str,
    owner: str,
    axes: tuple[str, str],
    seen: Float[Tensor, "tok n"],
    bent: Callable[[Float[Tensor, "rows some"], Int[Tensor, " some"]], Float[Tensor, "rows some"]],
    top: int,
    gain: Float[Tensor, " n"] | None = None,
) -> Curves:
    """Curves of columns that each have a spline on [LO, HI], over what they see.

    Args:
        kind: What such a curve is called.
        owner: What it belongs to, before its number.
        axes: What lies along the inputs and along the curves, with units.
        seen: Inputs of the splines.
        bent: Outputs of some of them.
        top: How many, the most bent ones first.
        gain: What one unit of each output is worth further on (default: 1).
    """
    every = torch.arange(seen.shape[1], device=seen.device)
    size, bend, _ = (a.float() for a in line_residual(seen, bent(seen, every)))
    gain = torch.ones_like(size) if gain is None else gain
    size, outside = size * gain, ((seen < LO) | (seen > HI)).float().mean(0)
    best = ranked(size, bend, top)
    points, density = densities(seen[:, best].unbind(1))
    return Curves(
        kind,
        [f"{owner} {i}" for i in best.tolist()],
        axes,
        points,
        bent(points.T, best).T * gain[best].unsqueeze(1),
        density,
        bend[best],
        size[best],
        outside[best],
        pooled(size, bend)[1].item(),
        outside.mean().item(),
    )


def out_of_grid(x: Float[Tensor, "tok n"]) -> Float[Tensor, ""]:
    """Share of the entries that lie beyond [LO, HI]."""
    return ((x < LO) | (x > HI)).float().mean()


def own_stream(seed: int) -> torch.Generator:
    """Where a head draws what its linear twin of the same seed does not have."""
    return torch.Generator().manual_seed(seed + 1)


def drawn(d_model: int, n_units: int, seed: int) -> Float[Tensor, "d_model hidden"]:
    """Gaussian weights of hidden units, with columns of norm about 1."""
    return torch.randn(d_model, n_units, generator=own_stream(seed)) / d_model**0.5


PLANES = 1 + 5 + 3
"""Planes of KANEncoder's default layer: the base, and the bases of 5 cells at order 3."""


def kan_size(d_model: int, d_sae: int) -> int:
    """Parameters that KANEncoder with its default layer has beyond a linear encoder."""
    return d_model * (PLANES * d_model + d_sae + 1)


def as_large_as_kan(d_model: int, d_sae: int, per_unit: int) -> int:
    """How many hidden units give a head the size of KANEncoder with its default layer.

    Args:
        d_model: Width of the activations.
        d_sae: Number of latents.
        per_unit: Parameters a hidden unit has of its own, beside d_model inputs and d_sae outputs.
    """
    return max(1, round(kan_size(d_model, d_sae) / (d_model + d_sae + per_unit)))
