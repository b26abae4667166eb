"""What KANLinear costs, against the textbook recursion and against its matrix products alone.

    .venv/bin/python benchmarks/kan_linear.py --repeats 7

Forward and backward with the gradient to x, fp32, grid of 5 cells, cubic. The three are timed in
turn within every repeat, and a ratio is that of two times of one repeat: on a machine with other
work on it only the ratios mean anything. One JSON object per shape, on a line of its own.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kanllama_lightning.functional.splines import kan_linear, spline_knots

LO, HI, GRID, ORDER = -1.0, 1.0, 5, 3
PLANES = 1 + GRID + ORDER


def recursion(x: Tensor, base: Tensor, spline: Tensor, scaler: Tensor) -> Tensor:
    """The layer as efficient-kan computes it: Cox-de Boor on autograd, [tok in bases]."""
    t = spline_knots(LO, HI, GRID, ORDER).float().expand(x.shape[1], -1)
    points = x.unsqueeze(-1)
    bases = ((points >= t[:, :-1]) & (points < t[:, 1:])).to(x.dtype)
    for r in range(1, ORDER + 1):
        rising = (points - t[:, : -r - 1]) / (t[:, r:-1] - t[:, : -r - 1])
        falling = (t[:, r + 1 :] - points) / (t[:, r + 1 :] - t[:, 1:-r])
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    scaled = spline * scaler.unsqueeze(-1)
    return F.linear(F.silu(x), base) + F.linear(bases.flatten(1), scaled.flatten(1))


def contestants(tok: int, n_in: int, n_out: int) -> dict[str, Callable[[], None]]:
    """One step of each, on the same inputs and weights."""
    x = torch.randn(tok, n_in, requires_grad=True)
    weight = (0.02 * torch.randn(n_out, PLANES, n_in)).requires_grad_()
    parts = [weight[:, 0], weight[:, 1:].transpose(1, 2), torch.ones(n_out, n_in)]
    parts = [p.detach().contiguous().requires_grad_() for p in parts]
    grad = torch.randn(tok, n_out)
    planes = torch.randn(tok, PLANES * n_in)

    def textbook() -> None:
        torch.autograd.grad(recursion(x, *parts), [x, *parts], grad)

    def ours() -> None:
        torch.autograd.grad(kan_linear(x, weight, LO, HI, GRID, ORDER), [x, weight], grad)

    def ours_with_tails() -> None:
        y = kan_linear(x, weight, LO, HI, GRID, ORDER, linear_tails=True)
        torch.autograd.grad(y, [x, weight], grad)

    @torch.no_grad()
    def floor() -> None:
        wide = weight.flatten(1)
        _ = planes @ wide.t(), grad.t() @ planes, grad @ wide

    return {"recursion": textbook, "ours": ours, "ours_tails": ours_with_tails, "floor": floor}


def spread(values: list[float]) -> dict[str, float]:
    """Median and range, to three digits."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.3g}") for name, value in numbers.items()}


def measure(shape: tuple[int, int, int], repeats: int) -> dict[str, object]:
    """Times and ratios of one shape, after one round that is not counted."""
    steps = contestants(*shape)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - start)

    def ratio(over: str, under: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])

    return {
        "tok_in_out": shape,
        "recursion_over_ours": ratio("recursion", "ours"),
        "ours_over_floor": ratio("ours", "floor"),
        "ours_tails_over_floor": ratio("ours_tails", "floor"),
        "recursion_over_floor": ratio("recursion", "floor"),
        "ms": {name: spread([1000 * s for s in times]) for name, times in seconds.items()},
    }


def main() -> None:
    """Measure the shapes asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="counted rounds of each shape")
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        action="append",
        metavar=("TOK", "IN", "OUT"),
        help="tokens, inputs, outputs; may be given again (default: the three of the goals)",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = args.shape or [(512, 2048, 2048), (256, 512, 4096), (1024, 128, 1024)]
    for shape in shapes:
        sys.stdout.write(json.dumps(measure(tuple(shape), args.repeats)) + "\n")


if __name__ == "__main__":
    main()
