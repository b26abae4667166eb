"""What heads trained side by side cost, against their own steps and one LM pass.

    .venv/bin/python benchmarks/side_by_side.py > runs/benchmarks/side_by_side.jsonl

The job of end_to_end.py (`job.py`) with four heads on the same activations: seconds per step of
`train.py fit` (Lightning, offline W&B, clipping, AuxK, all callbacks), from the end of the first
optimizer step to the end of the last one. Against it, measured in turn with it in the same process:
the sum of each head's own step alone (`head_step.HeadStep`: forward, losses, backward, projection,
fused Adam; no clipping, no counting of what fires) and the LM's pass over as many tokens as a step
reads. `over_parts` is the ratio of a round; median and range over rounds.
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
from benchmarks.head_step import HeadStep, spread  # noqa: E402
from benchmarks.runners import our_arguments  # noqa: E402
from kanllama_lightning import heads  # noqa: E402
from kanllama_lightning.lm.frozen import FrozenLM  # noqa: E402
from train import main as train  # noqa: E402

HEADS = {"topk": "TopK", "batch_topk": "BatchTopK", "kan": "KANEncoder", "matryoshka": "Matryoshka"}
STEPS_ALONE = 5


def together(job: jobs.Job, folder: Path) -> float:
    """Seconds per step of a run of all heads."""
    ends: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    members = {name: {"class_path": kind} for name, kind in HEADS.items()}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            config = Path(scratch) / "heads.json"
            args = {"d_sae": job.d_sae, "target_l0": job.k, "heads": members}
            head = {"class_path": "SideBySide", "init_args": args}
            config.write_text(json.dumps({"model": {"head": head}}))
            given = our_arguments(job, folder, Path(scratch) / "run")
            given[2] = str(config)
            with contextlib.redirect_stdout(sys.stderr):
                code = train([a for a in given if not a.startswith("--model.head.")])
            if code:
                raise SystemExit("the run failed")
    finally:
        handle.remove()
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def alone(job: jobs.Job, lm: FrozenLM) -> dict[str, float]:
    """Seconds of a step of each head, and of the LM for the tokens that a step reads."""
    x = torch.randn(job.batch_tokens, job.d_model)
    found = {}
    for name, kind in HEADS.items():
        step = HeadStep(getattr(heads, kind), x, job.d_sae, job.k)
        step()
        began = time.perf_counter()
        for _ in range(STEPS_ALONE):
            step()
        found[name] = (time.perf_counter() - began) / STEPS_ALONE
    ids = torch.randint(3, job.vocab, (job.lm_batch_seqs, job.ctx_len))
    lm.acts(ids)
    began = time.perf_counter()
    for _ in range(STEPS_ALONE):
        lm.acts(ids)
    seconds = (time.perf_counter() - began) / STEPS_ALONE
    found["lm"] = seconds * job.batch_tokens / (job.lm_batch_seqs * (job.ctx_len - 1))
    return found


def main() -> None:
    """Run the rounds, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=30 * 4096, help="per run")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "end_to_end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    job = jobs.Job(args.tokens, buffer_tokens=16_384)
    folder = jobs.build(job, args.out.resolve())
    where = f"model.layers.{job.layer}"
    lm = FrozenLM(str(jobs.lm_folder(folder)), where, untrained=True).load_()
    measures = "seconds per step of four heads side by side over the sum of their parts"
    head = about("side_by_side", measures, args.threads, peers.Peers(None, {}, []))
    rounds: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        before = alone(job, lm)
        whole = together(job, folder)
        after = alone(job, lm)
        parts = {name: (before[name] + after[name]) / 2 for name in before}
        rounds.append({"whole": whole, "over": whole / sum(parts.values()), **parts})
        sys.stderr.write(f"{whole:.3f} s per step, {rounds[-1]['over']:.3f} of its parts\n")
    found = {
        "n": len(rounds),
        "heads": HEADS,
        "over_parts": spread([r["over"] for r in rounds]),
        "ms": {k: spread([1000 * r[k] for r in rounds]) for k in ("whole", *HEADS, "lm")},
    }
    sys.stdout.write(json.dumps(head | {"job": job._asdict()} | found) + "\n")


if __name__ == "__main__":
    main()
