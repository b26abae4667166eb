"""KANLinear: the KAN layer of efficient-kan, with one folded weight and a frugal backward.

`KANUnits` are the hidden units of an encoder that such a layer makes.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kanllama_lightning.functional.curves import (
    densities,
    edge_bends,
    plane_covariances,
    pooled,
    ranked,
)
from kanllama_lightning.functional.splines import greville, kan_linear, kan_planes, spline_knots
from kanllama_lightning.heads.hidden_units import HI, LO, HiddenUnits
from kanllama_lightning.storage.named import checked_args, named_class, ship
from kanllama_lightning.types import Curves, InputError

log = logging.getLogger(__name__)

BASE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.SiLU(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "tanh": nn.Tanh(),
    "identity": nn.Identity(),
    "zero": torch.zeros_like,
}
"""What plane 0 may be, by name; `zero` leaves the splines alone."""


@ship
class KANLinear(nn.Module):
    """y_o = sum_i [ W_o0i b(x_i) + sum_c W_o(1+c)i B_c(x_i) ]: a base b and B-splines, no bias.

    Liu et al. 2024 (arXiv 2404.19756) in the form of Blealtan's efficient-kan, whose spline
    scaler is multiplied into the weight here. The grid is uniform, the same for every input, and
    never moves. Backward keeps nothing but x and the weight.

    Init: W_o0i ~ U(+-1/sqrt(in)), as a linear layer; W_o(1+c)i ~ U(+-0.1 / (sqrt(in) * bases)), the
    size of efficient-kan's (3e-4 at in = 2048 and 8 bases): at first the spline hardly counts.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        grid_size: Number of spline cells between the ends of the grid.
        spline_order: Degree of the spline pieces, at least 1; 3 (cubic) is the fast one.
        grid_range: The two ends of the grid, in the units of the inputs.
        linear_tails: Beyond the grid, continue each spline by its tangent at the end. Otherwise it
            fades to zero over `spline_order` more cells, as in efficient-kan.
        base_activation: The function b of plane 0, a name in `BASE_ACTIVATIONS`.
        compiled: Make the planes with torch.compile: the same to rounding, for GPUs (a CPU gains
            only where it is busy); needs a compiler, and some ten seconds in the first step.
        generator: Source of the initial weights (default: torch's own generator).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: Sequence[float] = (-1.0, 1.0),
        linear_tails: bool = False,
        base_activation: str = "silu",
        *,
        compiled: bool = False,
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
        if base_activation not in BASE_ACTIVATIONS:
            raise InputError(
                f"base_activation={base_activation!r}: must be one of {', '.join(BASE_ACTIVATIONS)}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order = grid_size, spline_order
        self.lo, self.hi = float(grid_range[0]), float(grid_range[1])
        self.linear_tails, self.base_activation = linear_tails, base_activation
        self.compiled = compiled
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
        return kan_linear(x, self.weight, **self._settings())

    def features(self, x: Float[Tensor, "tok in"]) -> Float[Tensor, "tok planes in"]:
        """The planes that the weight multiplies: y = sum over planes and inputs of both.

        In fp32 (fp64 if x is); on a GPU under autocast in its type. For callers that make the
        product themselves; no gradient flows to x.
        """
        return kan_planes(x, **self._settings())

    def edge_curves(
        self,
        out_index: Int[Tensor, " edges"],
        in_index: Int[Tensor, " edges"],
        points: Float[Tensor, " points"],
    ) -> Float[Tensor, "edges points"]:
        """The function on each edge: what output `out_index` gets of input `in_index`.

        All of it, base and spline, in the type of the weight whatever the autocast; a layer is the
        sum of its edges. Differentiable by the weight and the points.

        Args:
            out_index: Output of each edge.
            in_index: Input of each edge, as many.
            points: Values of that input, in the units of the grid; the same for every edge.
        """
        for name, index, size in (
            ("out_index", out_index, self.out_features),
            ("in_index", in_index, self.in_features),
        ):
            if index.shape != out_index.shape or ((index < 0) | (index >= size)).any():
                raise InputError(
                    f"{name}={index.tolist()}: must be numbers from 0 to {size - 1}, one for each "
                    f"edge, and there are {len(out_index)} in out_index"
                )
        edges = self.weight[out_index, :, in_index].unsqueeze(2)
        with torch.autocast(edges.device.type, enabled=False):
            return kan_linear(points.unsqueeze(1), edges, **self._settings()).t()

    def smoothness(self) -> Float[Tensor, ""]:
        """How much the splines bend, differentiable by the weight; 0 where each is a line.

        The mean over edges of sum_c (W_c - 2 W_(c+1) + W_(c+2))^2, bases c only, with the scaler
        folded in. A second difference is a second derivative by x counted in cells: in the units of
        y per cell^2, so divide by the width of a cell to the fourth for (d2y / dx2)^2.

        Source: P-splines (Eilers and Marx 1996, Statistical Science 11(2)).
        """
        bends = self.weight[:, 1:].diff(n=2, dim=1)
        return bends.square().sum() / (self.out_features * self.in_features)

    @torch.no_grad()
    def set_linear_(self, W: Float[Tensor, "in out"]) -> "KANLinear":
        """Make the layer x @ W: exactly (but for rounding) on the grid, with tails everywhere.

        The base gets no weight; the spline coefficients are W times the Greville abscissae.
        """
        if W.shape != (self.in_features, self.out_features):
            raise InputError(
                f"W: is {list(W.shape)}, must be [in_features, out_features] = "
                f"[{self.in_features}, {self.out_features}]; a weight of nn.Linear is its transpose"
            )
        line = greville(self.lo, self.hi, self.grid_size, self.spline_order).to(W)
        self.weight[:, 0] = 0
        self.weight[:, 1:] = W.t().unsqueeze(1) * line.unsqueeze(1)
        return self

    @torch.no_grad()
    def out_of_grid(self, x: Float[Tensor, "tok in"]) -> Float[Tensor, ""]:
        """Share of the entries of x beyond the grid, 0 to 1; 0 where x is empty."""
        return ((x < self.lo) | (x > self.hi)).sum() / max(1, x.numel())

    def bends(
        self, x: Float[Tensor, "tok in"]
    ) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
        """Size and bend (0 to 1) of the curve on every edge, over x; exact."""
        return edge_bends(self.weight.detach(), plane_covariances(self.features, x))

    @torch.no_grad()
    def curves(
        self,
        x: Float[Tensor, "tok in"],
        top: int,
        ends: tuple[str, str],
        axes: tuple[str, str],
        kind: str = "edge",
        gain: Float[Tensor, " out"] | None = None,
        pools: tuple[str, ...] = (),
    ) -> list[Curves]:
        """The most bent edges, and what bends most over all edges of an output or of an input.

        An output or input has the pooled size and bend of its edges (variances added up); drawn
        is its most bent edge, a curve of the layer itself, which the name gives.

        Args:
            x: What the layer sees.
            top: Curves of each kind.
            ends: What an input and an output of the layer are called.
            axes: What lies along the inputs and along the curves, with units.
            kind: What an edge is called.
            gain: What one unit of each output is worth further on (default: 1).
            pools: Which `ends` to pool edges at, each a kind of its own.
        """
        size, bend = self.bends(x)
        if gain is not None:
            size *= gain.unsqueeze(1)
        mean_bend = pooled(size, bend)[1].item()
        mean_out = self.out_of_grid(x).item()

        def drawn(
            kind: str,
            names: list[str],
            which: Int[Tensor, " edges"],
            size: Float[Tensor, " edges"],
            bend: Float[Tensor, " edges"],
        ) -> Curves:
            outs, ins = which // self.in_features, which % self.in_features
            seen = x[:, ins]
            points, density = densities(seen.unbind(1))
            weights = self.weight[outs, :, ins]
            values = torch.einsum("pqe,eq->ep", self.features(points.T), weights)
            if gain is not None:
                values *= gain[outs].unsqueeze(1)
            out = ((seen < self.lo) | (seen > self.hi)).float().mean(0)
            return Curves(
                kind, names, axes, points, values, density, bend, size, out, mean_bend, mean_out
            )

        source, target = ends
        which = ranked(size.flatten(), bend.flatten(), top)
        pairs = [divmod(i, self.in_features) for i in which.tolist()]
        names = [f"{source} {i} -> {target} {o}" for o, i in pairs]
        found = [drawn(kind, names, which, size.flatten()[which], bend.flatten()[which])]
        for end in pools:
            at_output = end == target
            all_size, all_bend = pooled(size, bend, dim=1 if at_output else 0)
            best = ranked(all_size, all_bend, top)
            rest = size * bend.sqrt()
            most = (rest.argmax(1) if at_output else rest.argmax(0))[best]
            which = best * self.in_features + most if at_output else most * self.in_features + best
            joint, other = ("by", source) if at_output else ("into", target)
            names = [
                f"{end} {a} ({joint} {other} {b})"
                for a, b in zip(best.tolist(), most.tolist(), strict=True)
            ]
            pool_kind = "hidden unit" if end == "hidden" else end
            found.append(drawn(pool_kind, names, which, all_size[best], all_bend[best]))
        return found

    def extra_repr(self) -> str:
        """The arguments, for `repr` of this module."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"grid_size={self.grid_size}, spline_order={self.spline_order}, "
            f"grid_range=({self.lo:g}, {self.hi:g}), linear_tails={self.linear_tails}, "
            f"base_activation={self.base_activation}"
        )

    def _settings(self) -> dict[str, Any]:
        """What the functions of `splines` want to know."""
        return {
            "lo": self.lo,
            "hi": self.hi,
            "grid_size": self.grid_size,
            "order": self.spline_order,
            "base": BASE_ACTIVATIONS[self.base_activation],
            "linear_tails": self.linear_tails,
            "compiled": self.compiled,
        }

    @classmethod
    def from_efficient_kan(
        cls, source: nn.Module | Mapping[str, Tensor], base_activation: str | None = None
    ) -> "KANLinear":
        """The layer that computes what an efficient-kan `KANLinear` does.

        Args:
            source: That module, or its state dict: `base_weight` [out in], `spline_weight`
                [out in bases], `grid` [in knots], and `spline_scaler` [out in] where it has one.
                The grid must be uniform and the same for every input.
            base_activation: Name of its base activation (default: that of the module, and silu,
                efficient-kan's own, for a state dict, which does not say).
        """
        if isinstance(source, nn.Module):
            base_activation = base_activation or _name(getattr(source, "base_activation", None))
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
        layer = cls(
            n_in,
            n_out,
            n_bases - order,
            order,
            (lo, hi),
            base_activation=base_activation or "silu",
            generator=own,
        )
        with torch.no_grad():
            layer.weight[:, 0] = base
            layer.weight[:, 1:] = spline.transpose(1, 2)
        return layer

    @torch.no_grad()
    def to_efficient_kan(self) -> dict[str, Tensor]:
        """A state dict for efficient-kan's `KANLinear`, with a spline scaler of ones.

        Build that layer with the same base activation, which the state dict does not hold. It
        computes the same on the grid, and beyond it where this layer has no linear tails:
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


class KANUnits(HiddenUnits):
    """ReLU(KAN(x~) + c), with c = 0 at the start.

    Args:
        d_model: Width of the activations.
        n_units: Outputs of the KAN layer.
        kan_class: Name or import path of the layer's class.
        kan_args: Its further arguments; None for a cubic spline on 5 intervals of [-3, 3].
        seed: That of the head; the layer draws from a stream of its own.
    """

    def __init__(
        self,
        d_model: int,
        n_units: int,
        kan_class: str,
        kan_args: dict[str, Any] | None,
        seed: int,
    ) -> None:
        super().__init__(n_units)
        layer = named_class(kan_class, nn.Module)
        args = kan_args
        if args is None:
            args = {"grid_size": 5, "spline_order": 3, "grid_range": [LO, HI]}
            if layer is KANLinear:
                args["linear_tails"] = True
        if layer is KANLinear:
            ends = {"in_features": d_model, "out_features": n_units}
            checked_args(layer, ends | args, "head.kan_args")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            try:
                self.kan = layer(d_model, n_units, **args)
            except TypeError as e:
                raise InputError(
                    f"head.kan_args={args}: {kan_class} does not take them ({e})"
                ) from e
        self.kan_bias = nn.Parameter(torch.zeros(n_units))

    def forward(self, x: Float[Tensor, "tok d_model"]) -> Float[Tensor, "tok hidden"]:
        """ReLU(KAN(x~) + c)."""
        return torch.relu(self.kan(x) + self.kan_bias)

    def learned_curves(
        self, x: Float[Tensor, "tok d_model"], top: int, gain: Float[Tensor, " hidden"]
    ) -> list[Curves]:
        """Edges of our own KAN layer, hidden units and inputs; none of another layer."""
        if not isinstance(self.kan, KANLinear):
            return []
        return self.kan.curves(
            x,
            top,
            ends=("input", "hidden"),
            axes=(
                "input, in deviations of the start sample",
                "edge times |U|, in units of pre-activations",
            ),
            gain=gain,
            pools=("hidden", "input"),
        )

    @torch.no_grad()
    def diagnostics(self, x: Float[Tensor, "tok d_model"]) -> dict[str, Float[Tensor, ""]]:
        """`out_of_grid`: share of the KAN layer's inputs beyond its grid."""
        if not hasattr(self.kan, "out_of_grid"):
            return {}
        return {"out_of_grid": self.kan.out_of_grid(x)}


def _name(activation: object) -> str:
    """The name of an activation module of efficient-kan's, which its arguments tell apart too."""
    for name, ours in BASE_ACTIVATIONS.items():
        if type(ours) is type(activation) and repr(ours) == repr(activation):
            return name
    known = [repr(f) for f in BASE_ACTIVATIONS.values() if isinstance(f, nn.Module)]
    raise InputError(
        f"base_activation={activation}: only {', '.join(known)} can be imported; if it computes "
        f"the same as one of {', '.join(BASE_ACTIVATIONS)}, give that name as base_activation"
    )
