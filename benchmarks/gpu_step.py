"""What a training step costs on this very GPU, part by part, beside what the card could do.

    .venv/bin/python benchmarks/gpu_step.py > runs/benchmarks/gpu_step.json   # under five minutes
    .venv/bin/python benchmarks/gpu_step.py --tiny    # the same code on a CPU; figures say nothing

Run `pytest -m gpu tests/gpu` first: a wrong result may be fast. Needs torch and this package's
heads; the last part, `train.py fit`, needs all of it and is left out with the reason where that is
missing. Prints one JSON object:

- `ceilings`: bytes per second of a copy, operations per second of a bf16 product, the best of ten.
- `steps`: for each head, width and number of dead latents: `ms` of a step (mean of the counted
  ones) and `parts_ms`, which add up to it; `floor_ms`, `share_of_floor`; `step_peak_mib`, what a
  step holds at its worst moment beyond weights, moments and buffer, gradients included. A step is
  that of training, without Lightning and the LM: rows from the buffer, forward, losses, backward,
  clipping, Adam, norms; bf16-mixed, batches of 4,096, width 2,048, k 64. Parts are between events
  in the stream, which nothing waits for before the end.
- `kernels`: the fifteen that take longest in a step of two heads.
- `peer`: sparsify's step for TopK in the same loop, where sparsify is installed.
- `fit`: tokens per second of one `train.py fit` with a random Llama 3.2 1B, by its own clock.
- `left_out`: what was not measured, and why; `--minutes` ends the sweep in time for `fit`.

The floor is the least work for the same parameters, at the ceilings: the encoder's products, twice
for a hidden layer (forward, its weight's gradient); four passes over kept entries in bf16 (decode,
gradients of kept values, of the dictionary and of the encoder), or four more dense products for a
head that selects nothing; 28 bytes for each weight (Adam in fp32). Curves of a decoder are no part.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

from benchmarks import job as jobs  # noqa: E402
from benchmarks import peers  # noqa: E402
from benchmarks.about import about  # noqa: E402
from benchmarks.head_step import MIB, step_peak  # noqa: E402
from benchmarks.runners import our_arguments  # noqa: E402
from kanllama_lightning import heads  # noqa: E402
from kanllama_lightning.data.buffer import ShuffleBuffer  # noqa: E402
from kanllama_lightning.functional import kernels  # noqa: E402
from kanllama_lightning.heads.selections import Selecting  # noqa: E402
from kanllama_lightning.training.head_trainer import HeadTrainer  # noqa: E402
from kanllama_lightning.training.optim import Adam  # noqa: E402
from kanllama_lightning.training.schedule import Schedule  # noqa: E402

HEADS = ("TopK", "BatchTopK", "KANEncoder", "KANDirect", "CurvedDictionary", "Gated")
PROFILED = ("BatchTopK", "KANEncoder")
ADAM_BYTES = 28
FIT_SECONDS = 120
"""What is kept of the time for `train.py fit`."""

Mark = Callable[[str], None]
"""Called with the name of a part when that part is over."""


class Size(NamedTuple):
    """What is measured at which sizes."""

    rows: int = 4096
    d_model: int = 2048
    widths: tuple[int, ...] = (16_384, 65_536)
    k: int = 64
    dead: tuple[int, ...] = (0, 2048)
    buffer: int = 262_144
    warm_up: int = 20
    counted: int = 60
    copied: int = 1 << 30
    """Bytes of the copy."""
    product: int = 8192
    """Rows and columns of the product."""


TINY = Size(64, 16, (32, 64), 4, (0, 8), 256, 1, 3, 1 << 20, 64)


class Stopwatch:
    """Points in time: events of the stream on a GPU, which nothing waits for until they are read.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.points: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Ends the part of this name, which began at the mark before."""
        if self.cuda:
            point: Any = torch.cuda.Event(enable_timing=True)
            point.record()
        else:
            point = time.perf_counter()
        self.points.append((name, point))

    def parts(self) -> tuple[float, dict[str, float]]:
        """Milliseconds from the first mark to the last, and those of every part, added up."""
        if self.cuda:
            torch.cuda.synchronize()

        def between(a: Any, b: Any) -> float:
            return float(a.elapsed_time(b)) if self.cuda else 1000 * (b - a)

        found: dict[str, float] = {}
        for (_, start), (name, end) in zip(self.points, self.points[1:], strict=False):
            found[name] = found.get(name, 0.0) + between(start, end)
        return between(self.points[0][1], self.points[-1][1]), found


class TrainingStep:
    """A head as the module trains it, without the LM.

    Args:
        kind: Name of the head.
        size: Rows, width, k, buffer.
        d_sae: Latents.
        device: Where.
    """

    def __init__(self, kind: str, size: Size, d_sae: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.size, self.device = size, device
        self.head: Any = getattr(heads, kind)(d_model=size.d_model, d_sae=d_sae, target_l0=size.k)
        self.head.to(device)
        self.fresh = torch.randn(size.rows, size.d_model, device=device).bfloat16()
        self.buffer = ShuffleBuffer(size.buffer, "bfloat16")
        self.buffer.allocate_(size.d_model, 2 * size.rows, device, seed=0)
        while self.buffer.filled < self.buffer.capacity:
            self.buffer.push_(torch.randn_like(self.fresh))
        self.head.start_(self.buffer.sample(4 * size.rows))
        schedule = Schedule.of(300_000_000, size.rows)
        self.trainer = HeadTrainer("", self.head, schedule, 5.0).to(device).train()
        self.optimizer = Adam([{"params": list(self.head.parameters())}], lr=2e-4, fused=True)
        self.trainer.hand_rows_to(self.optimizer)
        self.mark: Mark = lambda _: None
        selection = self.head.selection
        if isinstance(selection, Selecting):
            select = selection.select

            def marked(pre_acts: Tensor) -> Tensor:
                self.mark("encode")
                flat = select(pre_acts)
                self.mark("select")
                return flat

            selection.select = marked  # type: ignore[method-assign]

    def kill(self, n: int) -> None:
        """Let the first n latents count as dead from now on: no later step makes the list anew."""
        for _ in range(2):  # the list of one look may be that of the look before
            self.trainer.silent_tokens.zero_()
            self.trainer.silent_tokens[:n] = 1 << 40
            self(step=0)

    def __call__(self, mark: Mark | None = None, step: int = 1) -> None:
        """One step."""
        self.mark = mark or (lambda _: None)
        self.optimizer.zero_grad()
        self.buffer.push_(self.fresh)
        x = self.buffer.swap_(self.size.rows)
        self.mark("buffer")
        with torch.autocast(self.device.type, torch.bfloat16):
            losses, out = self.trainer.step(x, step, 0.5)
            loss = torch.stack(list(losses.values())).sum()
        del out, losses
        self.mark("decode and losses" if isinstance(self.head.selection, Selecting) else "forward")
        loss.backward()
        self.mark("backward")
        self.head.project_grad_()
        self.trainer.clip_(None, "norm")
        self.mark("clip")
        self.optimizer.step()
        self.mark("adam")
        self.head.project_()
        self.mark("norm")

    def peak_mib(self) -> float:
        """MiB at a step's worst moment beyond what is there between steps."""
        self.optimizer.zero_grad()
        if self.device.type == "cpu":
            return round(step_peak(self) / MIB, 2)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)

    @torch.no_grad()
    def floor_ms(self, ceilings: dict[str, float]) -> float:
        """Milliseconds that the least work takes at the ceilings."""
        rows, d_model, d_sae = self.size.rows, self.size.d_model, self.head.d_sae
        counted = Products(d_sae)
        with counted, torch.autocast(self.device.type, torch.bfloat16):
            self.head.pre_acts(self.fresh.float())
        operations, moved = counted.to_latents + 2 * counted.hidden, 0.0
        if isinstance(self.head.selection, Selecting):
            inputs = counted.to_latents / (2 * rows * d_sae)
            moved = 2 * rows * self.size.k * (3 * d_model + inputs)
        else:
            operations += 4 * counted.to_latents
        moved += ADAM_BYTES * sum(p.numel() for p in self.head.parameters())
        seconds = operations / ceilings["bf16_product_per_second"]
        return 1000 * (seconds + moved / ceilings["copied_bytes_per_second"])


class Products(TorchDispatchMode):
    """Operations of matrix products: those that make something for every latent, and the others."""

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.d_sae, self.to_latents, self.hidden = d_sae, 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts it."""
        out = func(*args, **(kwargs or {}))
        name = getattr(torch.ops.aten, func._overloadpacket.__name__.rstrip("_"), None)
        if name in flop_registry and len(out) > 1:  # not what learns b_dec, of value zero
            operations = flop_registry[name](*args, **(kwargs or {}), out_val=out)
            if out.shape[-1] == self.d_sae:
                self.to_latents += operations
            else:
                self.hidden += operations
        return out


def best(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    work()
    watch = Stopwatch(device)
    watch.mark("")
    for i in range(repeats):
        work()
        watch.mark(str(i))
    return min(watch.parts()[1].values()) / 1000


def measured_ceilings(size: Size, device: torch.device) -> dict[str, float]:
    """What this card does at the most, of what a step is made of."""
    source = torch.empty(size.copied, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copied = best(lambda: target.copy_(source), device)
    del source, target
    a = torch.randn(size.product, size.product, device=device).bfloat16()
    product = best(lambda: a @ a, device)
    return {
        "copied_bytes_per_second": 2 * size.copied / copied,
        "bf16_product_per_second": 2 * size.product**3 / product,
    }


def timed(step: Callable[[Mark], None], size: Size, device: torch.device) -> dict[str, Any]:
    """Mean milliseconds of a step and of its parts, after the warm-up."""
    for _ in range(size.warm_up):
        step(lambda _: None)
    watches = []
    for _ in range(size.counted):
        watch = Stopwatch(device)
        watch.mark("")
        step(watch.mark)
        watches.append(watch)
    found = [watch.parts() for watch in watches]
    names = dict.fromkeys(name for _, parts in found for name in parts)
    n = len(found)
    return {
        "ms": sum(whole for whole, _ in found) / n,
        "parts_ms": {name: sum(parts.get(name, 0.0) for _, parts in found) / n for name in names},
    }


def longest_kernels(step: TrainingStep, most: int = 15) -> list[dict[str, Any]]:
    """What takes longest in three steps, per step."""
    cuda = step.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * cuda) as profile:
        for _ in range(3):
            step()
        if cuda:
            torch.cuda.synchronize()
    averages = profile.key_averages()
    on_device = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    kept = sorted(on_device if cuda else averages, key=microseconds, reverse=True)[:most]
    return [{"name": e.key[:120], "calls": e.count / 3, "ms": microseconds(e) / 3000} for e in kept]


def peer_step(size: Size, d_sae: int, device: torch.device) -> dict[str, Any]:
    """sparsify's step, as it trains TopK.

    Raises:
        ImportError: sparsify is not installed.
    """
    from benchmarks.peer_steps import Sparsify

    x = torch.randn(size.rows, size.d_model, device=device)
    theirs = Sparsify("topk", x, d_sae, size.k)

    def step(mark: Mark) -> None:
        theirs.step()
        mark("step")

    return {"peer": "sparsify", "head": "TopK", "d_sae": d_sae} | timed(step, size, device)


def whole_fit(device: torch.device, seconds: float) -> dict[str, Any]:
    """One `train.py fit` of KANEncoder on a random Llama, in a process of its own."""
    cuda = device.type == "cuda"
    job = jobs.Job(400 * 4096, 2048, 16, 32_768, 512, 16, 8, 16_384, 64, 4096, 65_536, 0, 32, 8)
    if not cuda:
        job = jobs.Job(8 * 64, 16, 3, 64, 16, 4, 1, 32, 4, 64, 128)
    with tempfile.TemporaryDirectory() as scratch:
        folder, run = jobs.build(job, Path(scratch)), Path(scratch) / "run"
        given = our_arguments(job, folder, run)
        given += ["--lm.dtype=bfloat16", "--model.buffer.dtype=bfloat16", "--model.head=KANEncoder"]
        given += [f"--trainer.accelerator={'gpu' if cuda else 'cpu'}", "--trainer.logger=false"]
        given += [f"--model.head.d_sae={job.d_sae}", f"--model.head.target_l0={job.k}"]
        command = [sys.executable, str(ROOT / "train.py"), *given, "--trainer.precision=bf16-mixed"]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"train.py fit ended with {done.returncode}: {done.stderr[-300:]}")
        summary = json.loads((run / "summary.json").read_text())
    kept = {n: v for n, v in summary.items() if n.startswith("time/") or n == "tokens_per_second"}
    return {"head": "KANEncoder", "tokens": job.tokens, "d_sae": job.d_sae} | kept


def sweep(
    kinds: tuple[str, ...], size: Size, device: torch.device, until: float, found: dict[str, Any]
) -> None:
    """Fill in steps, kernels and peers, as long as there is time."""
    for d_sae in size.widths:
        for kind in kinds:
            named = f"{kind} at {d_sae}"
            if time.perf_counter() > until:
                found["left_out"][named] = "the time was over"
                continue
            try:
                step = TrainingStep(kind, size, d_sae, device)
                floor = step.floor_ms(found["ceilings"])
                for dead in size.dead:
                    step.kill(min(dead, d_sae))
                    row = timed(step, size, device)
                    row |= {"floor_ms": floor, "share_of_floor": floor / row["ms"]}
                    row["step_peak_mib"] = step.peak_mib()
                    found["steps"].append({"head": kind, "d_sae": d_sae, "n_dead": dead} | row)
                if kind in PROFILED and d_sae == size.widths[0]:
                    found["kernels"][kind] = longest_kernels(step)
            except torch.OutOfMemoryError as e:
                found["left_out"][named] = str(e).splitlines()[0]
            step = None  # type: ignore[assignment]  # gone before the next one is made
            if device.type == "cuda":
                torch.cuda.empty_cache()
        try:
            found["peer"].append(peer_step(size, d_sae, device))
        except ImportError as e:
            found["left_out"][f"sparsify at {d_sae}"] = str(e)


def main() -> None:
    """Measure everything and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", action="append", choices=HEADS, help="may be given again")
    parser.add_argument("--minutes", type=float, default=5.0, help="the whole may take")
    parser.add_argument("--no-fit", action="store_true", help="leave train.py fit out")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, tiny: tries the code alone")
    args = parser.parse_args()
    began = time.perf_counter()
    if not torch.cuda.is_available() and not args.tiny:
        sys.stderr.write("gpu_step: there is no CUDA device here; nothing was measured\n")
        return
    device = torch.device("cpu" if args.tiny else "cuda")
    size = TINY if args.tiny else Size()
    measures = "milliseconds of a training step, by parts, and the share of what the card allows"
    nobody = peers.Peers(None, {}, [])
    found: dict[str, Any] = about("gpu_step", measures, torch.get_num_threads(), nobody)
    card = "cpu (tiny: figures say nothing)" if args.tiny else torch.cuda.get_device_name()
    found |= {"device": card, "torch": torch.__version__, "size": size._asdict()}
    found["ceilings"] = measured_ceilings(size, device)
    kernels.switch_on(device)
    found["kernels_on"] = [name for name in sorted(kernels.CHECKS) if kernels.on(name, device)]
    found |= {"steps": [], "kernels": {}, "peer": [], "left_out": {}}
    end = began + 60 * args.minutes
    sweep(tuple(args.head or HEADS), size, device, end - FIT_SECONDS * (not args.no_fit), found)
    if args.no_fit:
        found["left_out"]["fit"] = "--no-fit"
    else:
        try:
            found["fit"] = whole_fit(device, max(30.0, end - time.perf_counter()))
        except (ImportError, RuntimeError, subprocess.TimeoutExpired) as e:
            found["left_out"]["fit"] = str(e)
    found["seconds"] = time.perf_counter() - began
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
