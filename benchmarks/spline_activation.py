"""What a spline per latent costs, against the textbook recursion and against the encoder's GEMM.

    .venv/bin/python benchmarks/spline_activation.py --repeats 7

Forward and backward with gradients to x and coef, fp32, grid of 5 cells on [-1, 1], cubic, x from
N(0, 1): a third of it beyond the grid. The GEMM is that of the encoder these splines would follow,
x[tok, d_in] @ W[d_in, n]: its forward alone, and with that of the weight's gradient (x itself, an
activation of a frozen LM, gets none). All are timed in turn within every repeat, and a ratio is
that of two times of one repeat: on a machine with other work on it only the ratios mean anything.
One JSON object on one line.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kanllama_lightning.functional import spline_activation as module
from kanllama_lightning.functional.spline_activation import spline_activation
from kanllama_lightning.functional.splines import spline_knots

LO, HI, GRID, ORDER = -1.0, 1.0, 5, 3


def recursion(x: Tensor, coef: Tensor) -> Tensor:
    """The textbook: Cox-de Boor on autograd over [tok n bases]."""
    t = spline_knots(LO, HI, GRID, ORDER).float()
    points = x.unsqueeze(-1)
    bases = ((points >= t[:-1]) & (points < t[1:])).to(x.dtype)
    for r in range(1, ORDER + 1):
        rising = (points - t[: -r - 1]) / (t[r:-1] - t[: -r - 1])
        falling = (t[r + 1 :] - points) / (t[r + 1 :] - t[1:-r])
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    return (bases * coef.t()).sum(-1)


def contestants(tok: int, n: int, d_in: int) -> dict[str, Callable[[], object]]:
    """One step of each, on the same inputs."""
    x = torch.randn(tok, n, requires_grad=True)
    coef = torch.randn(GRID + ORDER, n, requires_grad=True)
    grad = torch.randn(tok, n)
    inputs, weight = torch.randn(tok, d_in), torch.randn(d_in, n)

    def step(splines: Callable[..., Tensor], **how: bool) -> Callable[[], object]:
        return lambda: torch.autograd.grad(splines(x, coef, **how), (x, coef), grad)

    def ours(x: Tensor, coef: Tensor, **how: bool) -> Tensor:
        return spline_activation(x, coef, LO, HI, GRID, ORDER, **how)

    def forward(**how: bool) -> Callable[[], object]:
        return lambda: ours(x.detach(), coef.detach(), **how)

    return {
        "recursion": step(recursion),
        "eager": step(ours, compiled=False),
        "eager_tails": step(ours, compiled=False, linear_tails=True),
        "compiled": step(ours, compiled=True),
        "compiled_tails": step(ours, compiled=True, linear_tails=True),
        "eager_forward": forward(compiled=False),
        "compiled_forward": forward(compiled=True),
        "gemm_forward": lambda: inputs @ weight,
        "gemm_forward_and_weight_gradient": lambda: (inputs @ weight, inputs.t() @ grad),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range, to three digits."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.3g}") for name, value in numbers.items()}


def measure(shape: tuple[int, int, int], repeats: int) -> dict[str, object]:
    """Times and ratios of one shape, after one round that is not counted (it compiles)."""
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

    ours = ["eager", "eager_tails", "compiled", "compiled_tails"]
    both, once = "gemm_forward_and_weight_gradient", "gemm_forward"
    return {
        "tok_n_d_in": shape,
        "compiler_works": module._compiler_works,
        "recursion_over": {name: ratio("recursion", name) for name in ours},
        "share_of_gemm_forward_and_weight_gradient": {name: ratio(name, both) for name in ours},
        "forward_share_of_gemm_forward": {
            name: ratio(f"{name}_forward", once) for name in ("eager", "compiled")
        },
        "ms": {name: spread([1000 * s for s in times]) for name, times in seconds.items()},
    }


def main() -> None:
    """Measure the shape asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="counted rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        default=(64, 16384, 2048),
        metavar=("TOK", "N", "D_IN"),
        help="tokens, splines (latents), inputs of the encoder",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sys.stdout.write(json.dumps(measure(tuple(args.shape), args.repeats)) + "\n")


if __name__ == "__main__":
    main()
