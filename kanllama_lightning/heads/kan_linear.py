"""KANLinear: the KAN layer of efficient-kan, with one folded weight and a frugal backward."""

import logging
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kanllama_lightning.functional.splines import kan_linear, spline_knots
from kanllama_lightning.types import InputError

log = logging.getLogger(__name__)


class KANLinear(nn.Module):
    """y_o = sum_i [ W_o0i SiLU(x_i) + sum_c W_o(1+c)i B_c(x_i) ]: B-splines and SiLU, no bias.

    Liu et al. 2024 (arXiv 2404.19756) in the form of Blealtan's efficient-kan, whose spline
    scaler is multiplied into the weight here. The grid is uniform, the same for every input, and
    never moves. Backward keeps nothing but x and the weight.

    Init: W_o0i ~ U(+-1/sqrt(in)), as a linear layer; W_o(1+c)i ~ U(+-0.1 / (sqrt(in) * bases)), the
    size of efficient-kan's (3e-4 at in = 2048 and 8 bases), so a new layer is SiLU, then linear.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        grid_size: Number of spline cells between the ends of the grid.
        spline_order: Degree of the spline pieces, at least 1; 3 (cubic) is the fast one.
        grid_range: The two ends of the grid, in the units of the inputs.
        linear_tails: Beyond the grid, continue each spline by its tangent at the end. Otherwise it
            fades to zero over `spline_order` more cells, as in efficient-kan.
        generator: Source of the initial weights; left out, torch's default generator.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        linear_tails: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "in_features": in_features,
            "out_features": out_features,
            "grid_size": grid_size,
            "spline_order": spline_order,
        }
        for name, count in counts.items():
            if count < 1:
                raise InputError(f"{name}={count}: must be at least 1")
        if len(grid_range) != 2 or not grid_range[0] < grid_range[1]:
            raise InputError(
                f"grid_range={grid_range}: must be two numbers, the smaller first, such as (-1, 1)"
            )
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order = grid_size, spline_order
        self.lo, self.hi = float(grid_range[0]), float(grid_range[1])
        self.linear_tails = linear_tails
        n_bases = grid_size + spline_order
        self.weight: Float[nn.Parameter, "out planes in"] = nn.Parameter(
            torch.empty(out_features, 1 + n_bases, in_features)
        )
        bound = in_features**-0.5
        with torch.no_grad():
            self.weight[:, 0].uniform_(-bound, bound, generator=generator)
            small = 0.1 * bound / n_bases
            self.weight[:, 1:].uniform_(-small, small, generator=generator)

    def forward(self, x: Float[Tensor, "tok in"]) -> Float[Tensor, "tok out"]:
        """The layer at x, in the type of the weight, or of the autocast where that is on."""
        return kan_linear(
            x,
            self.weight,
            self.lo,
            self.hi,
            self.grid_size,
            self.spline_order,
            linear_tails=self.linear_tails,
        )

    @torch.no_grad()
    def out_of_grid(self, x: Float[Tensor, "tok in"]) -> Float[Tensor, ""]:
        """Share of the entries of x beyond the grid, 0 to 1; 0 where x is empty."""
        return ((x < self.lo) | (x > self.hi)).sum() / max(1, x.numel())

    def extra_repr(self) -> str:
        """The arguments, for `repr` of this module."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"grid_size={self.grid_size}, spline_order={self.spline_order}, "
            f"grid_range=({self.lo:g}, {self.hi:g}), linear_tails={self.linear_tails}"
        )

    @classmethod
    def from_efficient_kan(cls, source: nn.Module | Mapping[str, Tensor]) -> "KANLinear":
        """The layer that computes what an efficient-kan `KANLinear` does.

        Args:
            source: That module, or its state dict: `base_weight` [out in], `spline_weight`
                [out in bases], `grid` [in knots], and `spline_scaler` [out in] where it has one.
                The base activation must be SiLU, the grid uniform and the same for every input.
        """
        if isinstance(source, nn.Module):
            activation = getattr(source, "base_activation", None)
            if not isinstance(activation, nn.SiLU):
                raise InputError(f"base_activation={activation}: only SiLU can be imported")
            source = source.state_dict()
        missing = {"base_weight", "spline_weight", "grid"} - source.keys()
        if missing:
            raise InputError(
                f"source has no {', '.join(sorted(missing))}: give one efficient-kan KANLinear, or "
                f"its state dict without a prefix (it has {', '.join(source) or 'nothing'})"
            )
        base, spline, grid = (source[key] for key in ("base_weight", "spline_weight", "grid"))
        n_out, n_in, n_bases = spline.shape
        order = grid.shape[1] - n_bases - 1
        lo, hi = grid[0, order].item(), grid[0, n_bases].item()
        uniform = spline_knots(lo, hi, n_bases - order, order).to(grid.device)
        off = (grid.double() - uniform).abs().max().item()
        # What fp32 leaves of a uniform grid is within 1e-6 cells; update_grid moves knots by more.
        if not off <= 1e-4 * (hi - lo) / (n_bases - order):
            raise InputError(
                f"grid: its knots are off a uniform grid of [{lo:g}, {hi:g}] by up to {off:g} "
                "(update_grid does that); only a uniform grid, the same for every input, can be "
                "imported. Refit or retrain the layer on its initial grid"
            )
        scaler = source.get("spline_scaler")
        if scaler is not None:
            spline = spline * scaler.unsqueeze(-1)
        own = torch.Generator()  # its draws are overwritten: leave the default generator alone
        layer = cls(n_in, n_out, n_bases - order, order, (lo, hi), generator=own)
        with torch.no_grad():
            layer.weight[:, 0] = base
            layer.weight[:, 1:] = spline.transpose(1, 2)
        return layer

    @torch.no_grad()
    def to_efficient_kan(self) -> dict[str, Tensor]:
        """A state dict for efficient-kan's `KANLinear`, with a spline scaler of ones.

        It computes the same on the grid, and beyond it where this layer has no linear tails:
        efficient-kan knows none (a warning is logged).
        """
        if self.linear_tails:
            log.warning(
                "efficient-kan has no linear tails: equal on [%g, %g] only", self.lo, self.hi
            )
        base, spline = self.weight[:, 0], self.weight[:, 1:]
        knots = spline_knots(self.lo, self.hi, self.grid_size, self.spline_order)
        return {
            "base_weight": base.clone(),
            "spline_weight": spline.transpose(1, 2).contiguous(),
            "spline_scaler": torch.ones_like(base),
            "grid": knots.to(base).expand(self.in_features, -1).contiguous(),
        }
