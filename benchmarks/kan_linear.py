"""What KANLinear costs, against the textbook recursion and against its matrix products alone.

    .venv/bin/python benchmarks/kan_linear.py --repeats 7
    EFFICIENT_KAN=~/efficient-kan/src .venv/bin/python benchmarks/kan_linear.py --compile

Forward and backward with the gradient to x, fp32, grid of 5 cells, cubic. The contestants are
timed in turn within every repeat, and a ratio is that of two times of one repeat: on a machine with
other work on it only the ratios mean anything; `of_minima` is that of the two best times. The
folder named by EFFICIENT_KAN holds the package `efficient_kan`, which then takes part too.

Memory is counted once per contestant, in MiB. `saved`: storages that autograd keeps from forward
for backward, other than those of x and the weights. `step_peak`: the highest running sum of what
torch's CPU allocator gives and takes back within one step, in the profiler's trace; x, the weights
and the gradient of y are there before and do not count, the results (y, every gradient) and all
that is temporary do. What oneDNN or MKL allocate for themselves is not seen, for anyone.

`error` is the largest relative error (Frobenius norm) of the output and of every gradient between
ours and the recursion. One JSON object per shape, on a line of its own.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kanllama_lightning.functional.splines import kan_linear, spline_knots

LO, HI, GRID, ORDER = -1.0, 1.0, 5, 3
PLANES = 1 + GRID + ORDER
MIB = 1 << 20

Layer = Callable[[Tensor], Tensor]


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


class Contest:
    """One shape: the layers, by name, with the same inputs, weights and gradient."""

    def __init__(self, tok: int, n_in: int, n_out: int, compiled: bool) -> None:
        self.x = torch.randn(tok, n_in, requires_grad=True)
        self.grad = torch.randn(tok, n_out)
        weight = (0.02 * torch.randn(n_out, PLANES, n_in)).requires_grad_()
        parts = [weight[:, 0], weight[:, 1:].transpose(1, 2), torch.ones(n_out, n_in)]
        parts = [p.detach().contiguous().requires_grad_() for p in parts]
        grid = LO, HI, GRID, ORDER
        self.layers: dict[str, tuple[Layer, list[Tensor]]] = {
            "recursion": (lambda x: recursion(x, *parts), parts),
            "ours": (lambda x: kan_linear(x, weight, *grid), [weight]),
            "ours_tails": (lambda x: kan_linear(x, weight, *grid, linear_tails=True), [weight]),
        }
        if compiled:
            fused = torch.compile(recursion)
            self.layers["compiled_recursion"] = lambda x: fused(x, *parts), parts
            self.layers["ours_compiled"] = (
                lambda x: kan_linear(x, weight, *grid, compiled=True),
                [weight],
            )
        if folder := os.environ.get("EFFICIENT_KAN"):
            sys.path.insert(0, str(Path(folder).expanduser()))
            theirs = importlib.import_module("efficient_kan").KANLinear(n_in, n_out)
            names = "base_weight", "spline_weight", "spline_scaler"
            theirs.load_state_dict(dict(zip(names, parts, strict=True)), strict=False)
            self.layers["efficient_kan"] = theirs, [getattr(theirs, name) for name in names]

    def step(self, name: str) -> list[Tensor]:
        """Forward and backward of one layer: output, gradient of x, gradients of its weights."""
        layer, weights = self.layers[name]
        y = layer(self.x)
        return [y.detach(), *torch.autograd.grad(y, [self.x, *weights], self.grad)]

    def floor(self) -> Callable[[], object]:
        """The three matrix products that no exact layer can do without."""
        planes = torch.randn(len(self.x), PLANES * self.x.shape[1])
        wide = self.layers["ours"][1][0].detach().flatten(1)
        return lambda: (planes @ wide.t(), self.grad.t() @ planes, self.grad @ wide)

    def saved_mib(self, name: str) -> float:
        """MiB that autograd keeps for backward beyond x and the weights."""
        layer, weights = self.layers[name]
        storages = {}

        def keep(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(self.x)
        for known in (self.x, *weights):
            storages.pop(known.untyped_storage().data_ptr(), None)
        return sum(storages.values()) / MIB

    def error(self) -> float:
        """Largest relative error of ours against the recursion."""
        y, grad_x, grad_weight = self.step("ours")
        *others, grad_base, grad_spline, _ = self.step("recursion")
        mine = [y, grad_x, grad_weight[:, 0], grad_weight[:, 1:].transpose(1, 2)]
        pairs = zip(mine, [*others, grad_base, grad_spline], strict=True)
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def step_peak_mib(step: Callable[[], object]) -> float:
    """MiB that `step` holds at its worst moment beyond what was there before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak / MIB


def spread(values: list[float]) -> dict[str, float]:
    """Median and range, to three digits."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.3g}") for name, value in numbers.items()}


def measure(shape: tuple[int, int, int], repeats: int, compiled: bool) -> dict[str, object]:
    """Times, memory and error at one shape; the first round of times is not counted."""
    contest = Contest(*shape, compiled)
    steps: dict[str, Callable[[], object]] = {n: partial(contest.step, n) for n in contest.layers}
    steps["floor"] = contest.floor()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - start)

    def ratio(over: str, under: str) -> dict[str, float]:
        pairs = zip(seconds[over], seconds[under], strict=True)
        of_minima = float(f"{min(seconds[over]) / min(seconds[under]):.3g}")
        return {**spread([a / b for a, b in pairs]), "of_minima": of_minima}

    step_peaks = {name: step_peak_mib(step) for name, step in steps.items()}
    theirs = [n for n in contest.layers if not n.startswith("ours")]
    return {
        "tok_in_out": shape,
        **{f"{name}_over_ours": ratio(name, "ours") for name in theirs},
        **{f"{name}_over_floor": ratio(name, "floor") for name in contest.layers},
        "step_peak_ours_over_recursion": round(step_peaks["ours"] / step_peaks["recursion"], 3),
        "step_peak_mib": {name: round(mib, 1) for name, mib in step_peaks.items()},
        "saved_mib": {name: round(contest.saved_mib(name), 1) for name in contest.layers},
        "error": float(f"{contest.error():.2g}"),
        "ms": {name: spread([1000 * s for s in times]) for name, times in seconds.items()},
    }


def main() -> None:
    """Measure the shapes asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="counted rounds of each shape")
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use")
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile, theirs and ours"
    )
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
        line = json.dumps(measure(tuple(shape), args.repeats, args.compile))
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
