"""How much learned curves bend, what they look like, and how straight the curves of a decoder are.

A curve is judged over the values that it sees, x of n tokens. Its size is its RMS deviation from
its mean; its bend is the share of that variance left over by the best straight line.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

POINTS = 101
"""Points a curve is drawn and read at."""
TAIL = 1e-3
"""Share of what a curve sees that may lie beyond its first and beyond its last point."""
FITS = 0.98
"""Share of a curve's variance that a family must explain to be its reading."""
BLOCK = 1 << 22
"""Elements, in fp64, that are worked on at once."""

Covariances = tuple[Float[Tensor, "in planes planes"], Float[Tensor, "in planes planes"]]
"""Covariances of a layer's planes over a sample, for each input: whole, and without lines."""


def line_residual(
    x: Float[Tensor, "tok #n"], y: Float[Tensor, "tok n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Size, bend (0 to 1) and best slope of each column's curve y(x); fp64.

    Args:
        x: What the curves see, each its own column or all the same one.
        y: Their values there.
    """
    x, y = x.double(), y.double()
    x, y = x - x.mean(0), y - y.mean(0)
    slope = _ratio((x * y).sum(0), x.square().sum(0))
    total, rest = y.square().mean(0), (y - slope * x).square().mean(0)
    return total.sqrt(), _ratio(rest, total).clamp(0, 1), slope


def plane_covariances(
    features: Callable[[Float[Tensor, "tok some"]], Float[Tensor, "tok planes some"]],
    x: Float[Tensor, "tok in"],
) -> Covariances:
    """What the curves of a layer need to know of the sample, some inputs at a time.

    Args:
        features: The planes of some inputs; each curve is a weighted sum of its input's planes.
        x: What the layer sees.
    """
    planes = features(x[:1, :1].double()).shape[1]
    found = []
    for some in x.split(max(1, BLOCK // (planes * max(1, len(x)))), dim=1):
        seen = some.double()
        seen_planes = features(seen)
        seen = (seen - seen.mean(0)).unsqueeze(1)
        seen_planes = seen_planes - seen_planes.mean(0)
        slopes = _ratio((seen * seen_planes).sum(0), seen.square().sum(0))
        rest = seen_planes - seen * slopes
        found.append([torch.einsum("tpi,tqi->ipq", a, a) / len(x) for a in (seen_planes, rest)])
    every, bent = (torch.cat(parts) for parts in zip(*found, strict=True))
    return every, bent


def kept_covariances(
    values: Float[Tensor, " nnz"],
    planes: Float[Tensor, "nnz planes"],
    latents: Int[Tensor, " nnz"],
    d_sae: int,
) -> Covariances:
    """The same for curves that see kept activations only, each those of its latent.

    Args:
        values: What the curves see.
        planes: The planes there.
        latents: Whose curve sees each value.
        d_sae: Number of latents.
    """
    n = torch.bincount(latents, minlength=d_sae).clamp_min(1).double()

    def mean(a: Float[Tensor, "nnz *shape"]) -> Float[Tensor, "d_sae *shape"]:
        total = a.new_zeros(d_sae, *a.shape[1:]).index_add_(0, latents, a)
        return total / n.view(-1, *[1] * (a.ndim - 1))

    x, y = values.double().unsqueeze(1), planes.double()
    x, y = x - mean(x)[latents], y - mean(y)[latents]
    slopes = _ratio(mean(x * y), mean(x * x))
    width = y.shape[1]
    found = []
    for part in (y, y - x * slopes[latents]):
        total = part.new_zeros(d_sae, width, width)
        size = max(1, BLOCK // width**2)
        for rows, which in zip(part.split(size), latents.split(size), strict=True):
            total.index_add_(0, which, rows.unsqueeze(2) * rows.unsqueeze(1))
        found.append(total / n.view(-1, 1, 1))
    return found[0], found[1]


def edge_bends(
    weight: Float[Tensor, "out planes in"], covariances: Covariances
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
    """Size and bend (0 to 1) of the curve on every edge of a layer, in the type of the weight.

    Exact, and nothing of shape [tok out in] is held: a curve is w . planes, so its variance is
    w' C w with C the covariance of its input's planes, and what no line explains is the same form
    of what no line explains of the planes.

    Args:
        weight: Weights of every edge's planes.
        covariances: From `plane_covariances` or `kept_covariances`.
    """
    every, bent = covariances
    n_out, width, n_in = weight.shape
    size, bend = (weight.new_empty(n_out, n_in) for _ in range(2))
    step = max(1, BLOCK // (n_out * width))
    for start in range(0, n_in, step):
        some = slice(start, start + step)
        w = weight[:, :, some].permute(2, 0, 1).double()
        total, rest = (((w @ c[some]) * w).sum(2).clamp_min(0).T for c in (every, bent))
        size[:, some] = total.sqrt()
        bend[:, some] = _ratio(rest, total).clamp(0, 1)
    return size, bend


def ranked(
    size: Float[Tensor, " curves"], bend: Float[Tensor, " curves"], top: int
) -> Int[Tensor, " top"]:
    """The curves that depart most from their best lines, in RMS; at most `top`, largest first."""
    return (size * bend.sqrt()).topk(min(top, len(size))).indices


def pooled(
    size: Float[Tensor, "*shape"], bend: Float[Tensor, "*shape"], dim: int | None = None
) -> tuple[Float[Tensor, "*left"], Float[Tensor, "*left"]]:
    """Size and bend of many curves together: their variances added up.

    Args:
        size: Sizes of the curves.
        bend: Bends of the curves.
        dim: Axis to pool over; None pools all.
    """
    total = size.double().square()
    rest = total * bend
    total, rest = (a.sum() if dim is None else a.sum(dim) for a in (total, rest))
    return total.sqrt().to(size.dtype), _ratio(rest, total).to(size.dtype)


def densities(
    seen: Sequence[Float[Tensor, " _"]], start: float | None = None, n: int = POINTS
) -> tuple[Float[Tensor, "curves n"], Float[Tensor, "curves n"]]:
    """Evenly spaced points over what each curve sees, and the share of it nearest to each.

    Args:
        seen: What each curve sees, in any order; one value at least.
        start: First point of all curves; None takes each one's own 0.1 % quantile.
        n: Number of points.
    """
    points, density = [], []
    for x in seen:
        x = x.float().contiguous()
        lo, hi = x.quantile(x.new_tensor([TAIL, 1 - TAIL])).tolist()
        at = torch.linspace(lo if start is None else start, hi, n, device=x.device)
        cell = torch.bucketize(x, (at[1:] + at[:-1]) / 2)
        points.append(at)
        density.append(torch.bincount(cell, minlength=n) / len(x))
    return torch.stack(points), torch.stack(density)


def reading(
    points: Float[Tensor, " points"],
    values: Float[Tensor, " points"],
    density: Float[Tensor, " points"],
) -> tuple[str, float]:
    """The simplest family that explains a curve, and the R2 of its best fit.

    Families by their number of parameters: linear (2); quadratic (3); hinge (two slopes and a
    kink), saturating (tanh) and bump (Gaussian), with 4 each. The first number at which a family
    reaches an R2 of 0.98 decides, and among equals the better fit; where none does it is "none"
    with the best R2 of all. A constant counts as linear.

    Least squares weighted by the density, in closed form but for kink, centre and width, which are
    searched for inside the range of the points. A bump shows both its flanks: its inflections lie
    within the middle 95 % of what the curve sees, as half a bump is no bump.

    Args:
        points: Ascending, evenly spaced.
        values: The curve there.
        density: Share of the sample near each point.
    """
    x, y, w = (a.detach().double().cpu() for a in (points, values, density))
    span = (x[-1] - x[0]).item()
    root = (w / w.sum()).sqrt()
    y = (y - (root.square() * y).sum()) * root
    if span <= 0 or y.norm() <= 1e-6 * values.abs().max().item():
        return "linear", 1.0
    t = (x - x[0]) / span
    below = root.square().cumsum(0)
    left, right = t[below > 0.025][0], t[below >= 0.975 * below[-1]][0]

    total = y.square().sum()
    rests: dict[bool, tuple[Tensor, Tensor]] = {}
    for with_line in (False, True):
        plain = torch.stack([torch.ones_like(t), t][: 1 + with_line], dim=1) * root[:, None]
        q = torch.linalg.qr(plain).Q
        rests[with_line] = q, y - q @ (q.T @ y)

    def explained(shapes: Float[Tensor, "n points"], with_line: bool) -> Float[Tensor, " n"]:
        """R2 of a constant, or a line, plus a multiple of each shape."""
        q, y_rest = rests[with_line]
        shapes = shapes * root
        whole = shapes.square().sum(1)
        # of what q leaves of a shape: its length, and its product with y_rest, which q leaves alone
        sizes = whole - (shapes @ q).square().sum(1)
        known = sizes > 1e-12 * whole.clamp_min(1e-300)
        gain = torch.where(known, (shapes @ y_rest).square() / sizes.clamp_min(1e-300), 0.0)
        return 1 - (y_rest.square().sum() - gain) / total

    def searched(shape: Callable[[Tensor], Tensor], widest: float, whole: bool) -> float:
        """Best R2 over centres and widths, on ever finer lattices."""
        centre, width, reach = 0.5, (0.02 * widest) ** 0.5, 1.0
        spread = (widest / 0.02) ** 0.5
        best = 0.0
        for _ in range(4):
            lattice = torch.linspace(-1, 1, 15).double() * reach
            centres = (centre + 0.5 * lattice).clamp(0, 1)
            widths = (width * spread**lattice).clamp(0.02, widest)
            at, by = (a.reshape(-1, 1) for a in torch.meshgrid(centres, widths, indexing="ij"))
            r2 = explained(shape((t - at) / by), with_line=False)
            if whole:
                r2[((at - by < left) | (at + by > right)).squeeze(1)] = 0
            i = int(r2.argmax())
            best = max(best, r2[i].item())
            centre, width, reach = at[i].item(), by[i].item(), reach / 4
        return best

    def richer() -> Iterator[dict[str, float]]:
        """R2 of families of 2, 3 and 4 parameters; most curves need no search for the last."""
        yield {"linear": explained(torch.zeros_like(t)[None], with_line=True).item()}
        yield {"quadratic": explained(t.square()[None], with_line=True).item()}
        yield {
            "hinge": explained((t - t[1:-1, None]).clamp_min(0), with_line=True).max().item(),
            "saturating": searched(torch.tanh, 1.0, whole=False),
            "bump": searched(lambda u: (-u.square() / 2).exp(), 0.5, whole=True),
        }

    most = 0.0
    for families in richer():
        name, r2 = max(families.items(), key=lambda item: item[1])
        if r2 >= FITS:
            return name, r2
        most = max(most, r2)
    return "none", most


def straightness(curve: Float[Tensor, "*n points d"]) -> Float[Tensor, "*n"]:
    """sigma_1^2 / sum sigma^2 of a curve from the origin: 1 for a line, and for no curve at all.

    From 0.95 on what a latent writes may be drawn as a direction (METHODS B6).

    Args:
        curve: Points of the curve, in order or not.
    """
    power = torch.linalg.svdvals(curve.double()).square()
    total = power.sum(-1)
    share = torch.where(total > 0, power[..., 0] / total.clamp_min(1e-300), 1.0)
    return share.to(curve.dtype)


def along_first(curve: Float[Tensor, "points d"]) -> Float[Tensor, " points"]:
    """A curve from the origin as it looks along its first singular direction; its end is positive.

    Args:
        curve: Points of the curve, in order.
    """
    direction = torch.linalg.svd(curve.double(), full_matrices=False).Vh[0]
    seen = curve.double() @ direction
    return (seen if seen[-1] >= 0 else -seen).to(curve.dtype)


def secant(curve_at: Float[Tensor, "n d"], at: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """D(a) = f(a) / a of curves from the origin: what each writes per unit of activation.

    Args:
        curve_at: The curves at `at`.
        at: Positive activations; the median of those of a latent, say.
    """
    return curve_at / at.unsqueeze(1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where there is no whole."""
    return torch.where(whole > 0, part / whole.clamp_min(1e-300), 0.0)
