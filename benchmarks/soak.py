"""Does memory grow with steps? A long run on a small model, its resident memory read all along.

    .venv/bin/python benchmarks/soak.py --steps 20000

Trains a BatchTopK and a KAN head side by side on the embedded model, with every callback of the
default configuration and validations in between, and reads the process's resident memory once in a
hundredth of the run. `growth` is the median of the last fifth over that of the second fifth: by
then every callback has looked once, and what a validation has taken for a moment counts little.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WANDB_MODE", "offline")

import lightning as L  # noqa: E402
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.about import about  # noqa: E402
from train import main as train  # noqa: E402

BATCH = 128
SEEN: list[tuple[int, float]] = []


class Resident(L.Callback):
    """Notes the resident memory of the process, MiB, now and then."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read it."""
        if trainer.global_step % max(1, trainer.max_steps // 100) == 0:
            status = Path("/proc/self/status").read_text()
            SEEN.append((trainer.global_step, int(status.split("VmRSS:")[1].split()[0]) / 1024))


def main() -> None:
    """Run, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validations", type=int, default=40, help="along the way")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head = about("soak", "resident memory over steps", args.threads, peers.Peers(None, {}, []))
    size = {"d_sae": 256, "target_l0": 8}
    kinds = {"linear": "BatchTopK", "kan": "KANEncoder"}
    heads = {name: {"class_path": kind, "init_args": size} for name, kind in kinds.items()}
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "soak.json"
        model = {"head": {"class_path": "SideBySide", "init_args": {"heads": heads}}}
        config.write_text(json.dumps({"model": model}))
        given = {
            "model.tokens": args.steps * BATCH,
            "model.sae_batch_tokens": BATCH,
            "model.start_tokens": 8192,
            "model.buffer.capacity_tokens": 8192,
            "data.val_tokens": 8192,
            "data.lm_batch_seqs": 4,
            "trainer.val_check_interval": max(1, args.steps // max(1, args.validations)),
            "run": Path(scratch) / "run",
        }
        files = [config, ROOT / "configs" / "embedded.yaml"]
        arguments = ["fit", *(f"--config={file}" for file in files)]
        arguments += [f"--{name}={value}" for name, value in given.items()]
        with contextlib.redirect_stdout(sys.stderr):
            code = train([*arguments, "--trainer.callbacks+=benchmarks.soak.Resident"])
        if code:
            raise SystemExit("the run failed")
    seen = sys.modules["benchmarks.soak"].SEEN  # the callback's module, not this script's
    steps = max(step for step, _ in seen)
    early = statistics.median(mib for step, mib in seen if 0.2 * steps <= step <= 0.4 * steps)
    late = statistics.median(mib for step, mib in seen if step >= 0.8 * steps)
    found = {
        "steps": steps,
        "growth": round(late / early, 4),
        "mib": {str(step): round(mib, 1) for step, mib in seen[:: max(1, len(seen) // 20)]},
    }
    sys.stdout.write(json.dumps(head | found) + "\n")


if __name__ == "__main__":
    main()
