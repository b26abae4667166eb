"""Training at the shapes of Llama 3.2 1B on a GPU: tokens/s, the share of the floor, peak memory.

    .venv/bin/python benchmarks/gpu.py > runs/benchmarks/gpu.jsonl
    .venv/bin/python benchmarks/gpu.py --tiny    # the same code on a CPU; figures say nothing

A random Llama (16 blocks, width 2,048, 32 heads, 8 of keys and values; vocabulary 32,768, as no
logits are made) reads rows of 512 tokens in bf16; heads of 16,384 latents, k 64, batches of 4,096,
bf16-mixed, through `train.py fit` (W&B offline, all callbacks, no validation before the end), with
the activations of block 0's MLP and of block 8. Counted from the end of the 20th optimizer step to
the end of the last one; the device is waited for at both.

The floor per token: operations of head and LM (`plan.costs`) over --tflops, and 28 bytes per weight
and step (fp32 Adam) over --bandwidth; the defaults are those of an H200.
Without a GPU it says so and ends with exit code 0. One JSON object per head and hook point.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WANDB_MODE", "offline")

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from benchmarks import job as jobs  # noqa: E402
from benchmarks import peers  # noqa: E402
from benchmarks.about import about  # noqa: E402
from benchmarks.runners import our_arguments  # noqa: E402
from kanllama_lightning import heads  # noqa: E402
from kanllama_lightning.lm.frozen import FrozenLM  # noqa: E402
from kanllama_lightning.plan.costs import head_cost, lm_flops  # noqa: E402
from train import main as train  # noqa: E402

KINDS = ("TopK", "BatchTopK", "KANEncoder", "KANDirect")
HOOKS = ("model.layers.0.mlp", "model.layers.8")
FIRST = 20
"""Steps that are not counted: kernels are compiled and memory is taken."""
ADAM_BYTES = 28


def floor(job: jobs.Job, kind: str, lm: FrozenLM, tflops: float, bandwidth: float) -> float:
    """Seconds per token that products and Adam's bytes take at the least."""
    head = getattr(heads, kind)(job.d_model, job.d_sae, job.k)
    cost = head_cost(head, autocast=True)
    operations = cost.flops_per_token + lm_flops(lm, job.ctx_len)
    moved = ADAM_BYTES * cost.parameters / job.batch_tokens
    return operations / (1e12 * tflops) + moved / (1e12 * bandwidth)


def run(job: jobs.Job, folder: Path, kind: str, hook: str, cuda: bool) -> dict[str, float]:
    """Rate and peak memory of one run."""
    ends: list[float] = []

    def ended(*_: object) -> None:
        if cuda and len(ends) in (FIRST - 1, job.steps - 1):
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    handle = register_optimizer_step_post_hook(ended)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        given = our_arguments(job, folder, Path(scratch) / "run")
        given += [f"--lm.hook_point={hook}", "--lm.dtype=bfloat16", "--model.buffer.dtype=bfloat16"]
        given += [f"--trainer.accelerator={'gpu' if cuda else 'cpu'}", f"--model.head={kind}"]
        given += [f"--model.head.d_sae={job.d_sae}", f"--model.head.target_l0={job.k}"]
        code = train([*given, "--trainer.precision=bf16-mixed"])
    handle.remove()
    if code:
        raise SystemExit("the run failed")
    first = min(FIRST, job.steps // 2) - 1
    seconds = (ends[-1] - ends[first]) / (len(ends) - 1 - first)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    return {"tokens_per_second": job.batch_tokens / seconds, "peak_mib": round(peak)}


def main() -> None:
    """Run every head at every hook point, print one JSON object each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--head", action="append", choices=KINDS, help="may be given again")
    parser.add_argument("--tflops", type=float, default=790.0, help="bf16 products of the GPU")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s of its memory")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, tiny: tries the code alone")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.tiny
    if not cuda and not args.tiny:
        sys.stderr.write("gpu: there is no CUDA device here; nothing was measured\n")
        return
    job = jobs.Job(
        args.steps * 4096, 2048, 16, 32_768, 512, 16, 0, 16_384, 64, 4096, 65_536, 0, 32, 8
    )
    if args.tiny:
        job = jobs.Job(8 * 256, 32, 9, 64, 32, 8, 0, 64, 4, 256, 1024)
    folder = jobs.build(job, args.out.resolve())
    measures = "tokens/s of train.py fit, and the share of what the floor would allow"
    said: dict[str, Any] = about(
        "gpu", measures, torch.get_num_threads(), peers.Peers(None, {}, [])
    )
    said["device"] = torch.cuda.get_device_name() if cuda else "cpu (tiny: figures say nothing)"
    for hook in HOOKS:
        lm = FrozenLM(str(jobs.lm_folder(folder)), hook, untrained=True)
        for kind in args.head or KINDS:
            least = floor(job, kind, lm, args.tflops, args.bandwidth)
            found = run(job, folder, kind, hook, cuda)
            share = {"share_of_floor": round(found["tokens_per_second"] * least, 4)}
            found["tokens_per_second"] = round(found["tokens_per_second"])
            sys.stdout.write(json.dumps(said | {"head": kind, "hook": hook} | found | share) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
