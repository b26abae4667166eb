"""What one training step of a head costs in SAELens, dictionary_learning and sparsify, over ours.

    .venv/bin/python benchmarks/head_step_peers.py > runs/benchmarks/head_step_peers.jsonl
    .venv/bin/python benchmarks/head_step_peers.py --settled --head Standard --repeats 15

A step is each project's own (`peer_steps.py`): forward, losses, statistics, backward, clipping,
Adam, and what keeps the dictionary's rows at norm 1, in fp32 on the same random rows. All run in
one process, in the environment that `peers.py` makes, in turn within every repeat; a ratio is that
of two times of one repeat, and `of_minima` that of the two best times.

TopK and BatchTopK keep k latents per token. Standard, gated and JumpReLU keep what their penalty
leaves: by default each is timed at its own fresh initialisation, where about half of the latents
fire; with `--settled` the encoder's biases are shifted, in ours as in theirs, so that L0 is k, as
at the end of training. `l0` is what was timed.

`above_state_mib` is the highest running sum, within one step, of what torch's CPU allocator gives
and takes back in the profiler's trace, beyond parameters, moments and x (there before the step) and
gradients (counted whole): what is measured is the same for all. One JSON object per kind of head.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.about import about  # noqa: E402
from benchmarks.head_step import MIB, spread, step_peak  # noqa: E402
from benchmarks.peer_steps import KINDS, Contestant, is_penalised, settle  # noqa: E402


def contestants(
    kind: str, shape: tuple[int, ...], settled: bool, there: peers.Peers
) -> dict[str, Contestant]:
    """Everybody who has this kind of head, and can be imported; ours first."""
    tok, d_model, d_sae, k = shape
    x = torch.randn(tok, d_model)
    found = {}
    for name, (made, called) in KINDS[kind].items():
        if name == "ours" or name in there.versions:
            torch.manual_seed(0)
            found[name] = made(called, x, d_sae, k)
            if settled and is_penalised(kind):
                settle(found[name], k)
    return found


def above_state_mib(contestant: Contestant) -> float:
    """MiB at a step's worst moment beyond parameters, moments, x and gradients."""
    contestant.optimizer.zero_grad()
    peak = step_peak(contestant.step)
    gradients = sum(p.nbytes for p in contestant.parameters if p.requires_grad)
    return round(max(0, peak - gradients) / MIB, 1)


def measure(
    kind: str,
    shape: tuple[int, ...],
    repeats: int,
    settled: bool,
    there: peers.Peers,
    now: Callable[[], float],
) -> dict[str, object]:
    """Times and memory of one kind of head; the first round of times is not counted."""
    steps = contestants(kind, shape, settled, there)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, contestant in steps.items():
            start = now()
            contestant.step()
            if repeat:
                seconds[name].append(now() - start)

    def over_ours(name: str) -> dict[str, float]:
        ratios = [a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)]
        of_minima = min(seconds[name]) / min(seconds["ours"])
        return {**spread(ratios), "of_minima": float(f"{of_minima:.3g}")}

    return {
        "head": kind,
        "tok_model_sae_k": shape,
        "n": repeats,
        "settled": settled and is_penalised(kind),
        "l0": {name: round(contestant.l0(), 1) for name, contestant in steps.items()},
        "over_ours": {name: over_ours(name) for name in steps if name != "ours"},
        "ms": {name: spread([1000 * s for s in times]) for name, times in seconds.items()},
        "above_state_mib": {name: above_state_mib(c) for name, c in steps.items()},
    }


def main() -> None:
    """Measure the kinds of heads asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", action="append", choices=list(KINDS), help="default: all")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        default=(4096, 256, 4096, 32),
        metavar=("TOK", "D_MODEL", "D_SAE", "K"),
    )
    parser.add_argument("--repeats", type=int, default=7, help="counted rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use")
    parser.add_argument("--settled", action="store_true", help="penalised heads at L0 = k")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, not that of the wall")
    args = parser.parse_args()
    there = peers.ensure()
    peers.enter(there)
    torch.set_num_threads(args.threads)
    now = time.process_time if args.cpu_time else time.perf_counter
    measures = f"{'CPU' if args.cpu_time else 'wall'} time of a training step over ours"
    head = about("head_step_peers", measures, args.threads, there)
    for kind in args.head or KINDS:
        load = round(os.getloadavg()[0], 1)
        with contextlib.redirect_stdout(sys.stderr):  # a peer prints when it is imported
            found = measure(kind, tuple(args.shape), args.repeats, args.settled, there, now)
        sys.stdout.write(json.dumps(head | {"load_before": load} | found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
