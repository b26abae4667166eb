"""What one training step of a head costs, against the floor that no exact step can go below.

    .venv/bin/python benchmarks/head_step.py --head TopK --head BatchTopK --parts
    .venv/bin/python benchmarks/head_step.py --head TopK --shape 1024 2048 16384 64 --repeats 15

A step is forward, losses, backward, `project_grad_`, fused Adam and `project_`, in fp32 and with no
dead latents (so without AuxK). Its floor does the least work that gives the same parameters:

- a head that selects: 1 product for the pre-activations; the selection (`torch.topk` for TopK, an
  exact one over the batch for the others); 4 passes over the kept entries (decode, gradient of the
  kept values, of the dictionary, of the encoder), their indices sorted beforehand; fused Adam. The
  KAN layer of KANEncoder has no counterpart in it.
- a head that does not: 5 dense products and fused Adam.

Head and floor are timed in turn within every repeat, and a ratio is that of two times of one
repeat: on a machine with other work on it only the ratios mean anything; `of_minima` is that of the
two best times. `--parts` adds where the time goes, in ms (median), for head and floor. With
`--cpu-time --threads 1` it is the CPU time of the process that counts: steadier yet under load.

A penalised head begins with half of its latents firing, and is near `target_l0` for most of its
training: `--settled` measures it there (`settle_`), and without it the start. `l0` is what it is.

Memory, in MiB: `above_state` is the highest running sum of what torch's CPU allocator gives and
takes back within one step, in the profiler's trace, beyond parameters, Adam's moments and x (there
before the step) and the gradients (counted whole, whenever they are made). `wide_after_selection`
is what is held in tensors of [tokens, latents] from the first bag of rows (the decoding) to the end
of the step: a dispatch mode notes the storage of every tensor of that many elements, weakly, and
looks after each later operation which are still alive; whatever autograd had saved would show. It
is null for a head that selects nothing. One JSON object per head and shape, on a line of its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kanllama_lightning import heads
from kanllama_lightning.functional.sparse import Pattern, largest_positive
from kanllama_lightning.heads.penalties import Penalised
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.heads.selections import Selecting, TokenTopK
from kanllama_lightning.training.optim import Adam
from kanllama_lightning.types import StepContext

MIB = 1 << 20
LR = 1e-4
TRAINED = [name for name in heads.__all__ if name not in ("PCA", "SAEHead")]

Mark = Callable[[str], None]
"""Called with the name of a part when that part is over."""


def unmarked(part: str) -> None:
    """Where nobody looks at the parts."""


class HeadStep:
    """A head, started on the rows that it is then trained on."""

    def __init__(
        self, kind: type[SAE], x: Tensor, d_sae: int, k: int, settled: bool = False
    ) -> None:
        self.head, self.x = kind(d_model=x.shape[1], d_sae=d_sae, target_l0=k), x
        self.head.start_(x)
        if settled and isinstance(self.head.selection, Penalised):
            settle_(self.head, x)
        self.optimizer = Adam(self.head.parameters(), lr=LR, fused=True)
        self.context = StepContext(torch.zeros(0, dtype=torch.int64), 0.0, 0.1)
        self.mark: Mark = unmarked
        if isinstance(self.head.selection, Selecting):
            select = self.head.selection.select

            def marked(pre_acts: Tensor) -> Tensor:
                self.mark("encode")
                flat = select(pre_acts)
                self.mark("select")
                return flat

            self.head.selection.select = marked  # type: ignore[method-assign]

    def __call__(self, mark: Mark = unmarked) -> None:
        """One step, in the order of the module."""
        self.mark = mark
        self.optimizer.zero_grad()
        out = self.head(self.x)
        mark("decode" if isinstance(self.head.selection, Selecting) else "forward")
        loss = torch.stack(list(self.head.losses(self.x, out, self.context).values())).sum()
        mark("losses")
        loss.backward()
        mark("backward")
        self.head.project_grad_()
        mark("project")
        self.optimizer.step()
        mark("adam")
        self.head.project_()
        mark("project")


@torch.no_grad()
def settle_(head: SAE, x: Tensor) -> None:
    """Lower all of b_enc alike until target_l0 latents fire per token on average."""
    above = head.pre_acts(x)
    if isinstance(head, heads.JumpReLU):
        above -= head.selection.theta
    head.encoder.b_enc -= (
        above.reshape(-1).topk(head.target_l0 * len(x) + 1, sorted=False).values.min()
    )
    l0 = float(head(x).codes.l0().double().mean())
    assert abs(l0 / head.target_l0 - 1) < 1e-3, "L0 is not the target"  # but for rounding


class Floor:
    """Parameters of a linear head of one shape, and Adam; a subclass knows the products."""

    def __init__(self, x: Tensor, d_sae: int, k: int) -> None:
        self.x, self.k = x, k
        self.grad = torch.randn_like(x) / x.numel()
        rows = torch.randn(d_sae, x.shape[1])
        rows /= rows.norm(dim=1, keepdim=True)
        self.encoder, self.decoder = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.biases = [nn.Parameter(torch.zeros(n)) for n in rows.shape]
        for bias in self.biases:
            bias.grad = torch.zeros_like(bias)
        parameters = [self.encoder, self.decoder, *self.biases]
        self.optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)

    def gradients(self, mark: Mark) -> None:
        """Forward and backward: sets the gradients of encoder and decoder."""
        raise NotImplementedError

    def __call__(self, mark: Mark = unmarked) -> None:
        """One step of the floor."""
        self.encoder.grad = self.decoder.grad = None  # freed, as by zero_grad
        with torch.no_grad():
            self.gradients(mark)
        self.optimizer.step()
        mark("adam")


class SparseFloor(Floor):
    """One product, a selection, four passes over what a fixed pattern keeps."""

    whole_batch = True

    def __init__(self, x: Tensor, d_sae: int, k: int) -> None:
        super().__init__(x, d_sae, k)
        pre = x @ self.encoder.detach().T
        flat = self.select(pre)
        pattern = Pattern(flat.sort().values, len(x), d_sae)
        self.order, self.rows_by_latent = pattern.by_latent
        self.latents, self.rows = pattern.latents, pattern.rows
        self.row_starts, self.latent_starts = pattern.row_starts, pattern.latent_starts
        self.values = pre.reshape(-1)[pattern.flat]

    def select(self, pre: Tensor) -> Tensor:
        """Flat positions of what is kept."""
        if self.whole_batch:
            return largest_positive(pre, self.k * len(pre))[0]
        first = torch.arange(len(pre))[:, None] * pre.shape[1]
        return (pre.topk(self.k, dim=1, sorted=False).indices + first).reshape(-1)

    def gradients(self, mark: Mark) -> None:
        """The kept values are those of the fixed pattern, not of the selection just made."""
        pre = self.x @ self.encoder.T
        mark("encode")
        self.select(pre)
        del pre
        mark("select")
        self.bag(self.latents, self.decoder, self.row_starts, self.values)
        mark("decode")
        grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            self.grad, self.decoder, self.latents, self.row_starts, self.rows, 0
        )
        mark("grad_values")
        for weight, table, values in (
            (self.decoder, self.grad, self.values),
            (self.encoder, self.x, grad_values),
        ):
            ordered = values.index_select(0, self.order)
            weight.grad = self.bag(self.rows_by_latent, table, self.latent_starts, ordered)
        mark("grad_weights")

    @staticmethod
    def bag(index: Tensor, table: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of rows of a table."""
        return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights)


class TopKFloor(SparseFloor):
    """Selects within every row."""

    whole_batch = False


class DenseFloor(Floor):
    """Five products."""

    def gradients(self, mark: Mark) -> None:
        """Without any of the elementwise work between the products."""
        latents = self.x @ self.encoder.T
        latents @ self.decoder
        mark("forward")
        grad_latents = self.grad @ self.decoder.T
        self.decoder.grad = latents.T @ self.grad
        self.encoder.grad = grad_latents.T @ self.x
        mark("backward")


def floor_of(kind: type[SAE]) -> type[Floor]:
    """Which floor a head is held against."""
    small = kind(d_model=2, d_sae=4, target_l0=1)
    if isinstance(small.selection, TokenTopK):
        return TopKFloor
    return SparseFloor if isinstance(small.selection, Selecting) else DenseFloor


class WideTensors(TorchDispatchMode):
    """Bytes in tensors of so many elements, at their most, once the first bag has been summed."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.decoding, self.peak = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, notes what it made, looks at what is left."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() == self.elements:
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self.storages[ref.cdata] = ref, storage.nbytes()
        self.decoding |= "embedding_bag" in str(func)
        if self.decoding:
            alive = (size for ref, size in self.storages.values() if not ref.expired())
            self.peak = max(self.peak, sum(alive))
        return result


def step_peak(step: Callable[[], object]) -> int:
    """Bytes that `step` holds at its worst moment beyond what was there before it."""
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
    return peak


def above_state_mib(step: HeadStep | Floor) -> float:
    """MiB at a step's worst moment beyond parameters, moments, x and gradients."""
    step.optimizer.zero_grad()
    peak = step_peak(step)
    parameters = step.optimizer.param_groups[0]["params"]
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    return round(max(0, peak - gradients) / MIB, 1)


def wide_mib(step: HeadStep) -> float | None:
    """MiB held in [tokens, latents] after the selection; None for a head without one."""
    if not isinstance(step.head, Selecting):
        return None
    mode = WideTensors(len(step.x) * step.head.d_sae)
    with mode:
        step()
    assert mode.storages, "the pre-activations were not seen"
    return mode.peak / MIB


class Clock:
    """Seconds of one step, whole and by part."""

    def __init__(self, step: Callable[[Mark], None], now: Callable[[], float]) -> None:
        self.parts: dict[str, float] = {}
        self.now = now
        self.last = start = now()
        step(self.mark)
        self.seconds = now() - start

    def mark(self, part: str) -> None:
        """Adds the time since the last mark to a part."""
        now = self.now()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now


def spread(values: list[float]) -> dict[str, float]:
    """Median and range, to three digits."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.3g}") for name, value in numbers.items()}


def measure(
    name: str,
    shape: tuple[int, ...],
    repeats: int,
    parts: bool,
    settled: bool,
    now: Callable[[], float],
) -> dict[str, object]:
    """Times and memory of one head at one shape; the first round of times is not counted."""
    tok, d_model, d_sae, k = shape
    kind = getattr(heads, name)
    x = torch.randn(tok, d_model)
    head, floor = HeadStep(kind, x, d_sae, k, settled), floor_of(kind)(x, d_sae, k)
    l0 = float(head.head(x).codes.l0().double().mean())
    clocks = [(Clock(head, now), Clock(floor, now)) for _ in range(repeats + 1)][1:]
    ours, least = zip(*clocks, strict=True)
    minima = min(c.seconds for c in ours) / min(c.seconds for c in least)
    found: dict[str, object] = {
        "head": name,
        "tok_model_sae_k": shape,
        "settled": settled,
        "l0": round(l0, 1),
        "n": repeats,
        "over_floor": {
            **spread([a.seconds / b.seconds for a, b in clocks]),
            "of_minima": float(f"{minima:.3g}"),
        },
        "ms": {
            "head": spread([1000 * c.seconds for c in ours]),
            "floor": spread([1000 * c.seconds for c in least]),
        },
        "above_state_mib": {"head": above_state_mib(head), "floor": above_state_mib(floor)},
        "wide_after_selection_mib": wide_mib(head),
    }
    if parts:
        found["parts_ms"] = {
            who: {
                part: round(1000 * statistics.median(c.parts[part] for c in of), 1)
                for part in of[0].parts
            }
            for who, of in (("head", ours), ("floor", least))
        }
    return found


def main() -> None:
    """Measure the heads and shapes asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--head", action="append", choices=TRAINED, help="may be given again (default: TopK)"
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        action="append",
        metavar=("TOK", "D_MODEL", "D_SAE", "K"),
        help="may be given again (default: 1024 2048 16384 64 and 4096 256 4096 32)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="counted rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use")
    parser.add_argument("--parts", action="store_true", help="also say where the time goes")
    parser.add_argument(
        "--settled", action="store_true", help="penalised heads: fire on K latents per token"
    )
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, not that of the wall")
    args = parser.parse_args()
    now = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name in args.head or ["TopK"]:
        for shape in args.shape or [(1024, 2048, 16384, 64), (4096, 256, 4096, 32)]:
            found = measure(name, tuple(shape), args.repeats, args.parts, args.settled, now)
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
