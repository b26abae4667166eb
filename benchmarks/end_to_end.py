"""From tokens to a trained TopK head: the whole of ours against the whole of SAELens and sparsify.

    .venv/bin/python benchmarks/end_to_end.py > runs/benchmarks/end_to_end.jsonl
    .venv/bin/python benchmarks/end_to_end.py --only ours --tokens 40960 --repeats 1   # no peers

The job (`job.py`): a random Llama (hidden 256, 4 blocks, vocabulary 4,096) reads rows of 128 random
tokens, 32 at once; a TopK head (4,096 latents, k 32) is trained in fp32 on the output of block 1,
4,096 activations a step, with Adam. Runners (`runners.py`), each a process of its own, in turn:

- ours: `train.py fit --config configs/topk.yaml` with what the job says: Lightning, W&B (offline),
  all callbacks, clipping, AuxK; no validation before the end;
- saelens: LanguageModelSAETrainingRunner, TopKTrainingSAE, the Llama as a transformers model,
  a buffer as large as ours, its defaults otherwise, no W&B;
- sparsify: Trainer with optimizer="adam", as its command line builds it, no W&B; it shuffles
  nothing and runs the LM to its last block.

Counted, for all: from the end of the first optimizer step to the end of the last one, so neither
loading, nor the first filling of a buffer, nor what comes after training. In the default 97 steps
SAELens refills its buffer exactly 12 times; `lm_tokens_per_token` shows that all put as many tokens
through the LM as they train on. Ours drops BOS, the others train on it: one in 128. Peak RSS is
that of the process up to the last step. `tokens_per_second_with_start` (ours only) is what
summary.json says: it also counts the start statistics and the filling of the buffer.

`ours_over` is the ratio of two rates of one round, median and range over rounds. Runs of a round
follow each other: where the load of the machine changes, `ours_over_per_cpu_second`, the same with
CPU time of the process in the place of that of the wall, says more (with --threads 1, as threads
that wait for each other take CPU time as well). `our_shares` says where our counted time goes: LM,
head (forward to projection), and `outside` both.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import job as jobs  # noqa: E402
from benchmarks import peers  # noqa: E402
from benchmarks.about import about  # noqa: E402
from benchmarks.head_step import spread  # noqa: E402

NAMES = {"ours": None, "saelens": "sae_lens", "sparsify": "sparsify"}
"""Runners, and the module that each needs."""
TOKENS = 97 * 4096

Run = dict[str, Any]


def shares(run: Run) -> dict[str, float]:
    """Where the counted time of one of our runs went, as shares of it.

    The `time/<part>` shares of summary.json, and `outside`: what is neither LM nor a head's step
    (forward, backward, projection, clipping, Adam).
    """
    found = {k.removeprefix("time/"): v for k, v in run["summary"].items() if k[:5] == "time/"}
    return found | {"outside": 1 - found["lm"] - found["head"] - found["optimizer"]}


def result(rounds: Sequence[dict[str, Run]]) -> dict[str, Any]:
    """Figures over rounds of one run per runner."""
    names = list(rounds[0])

    def over(name: str, key: str) -> list[float]:
        return [r[name][key] for r in rounds]

    def compared(key: str) -> dict[str, dict[str, float]]:
        if "ours" not in names:
            return {}
        return {
            name: spread([a / b for a, b in zip(over("ours", key), over(name, key), strict=True)])
            for name in names
            if name != "ours"
        }

    found: dict[str, Any] = {
        "n": len(rounds),
        "steps": rounds[0][names[0]]["steps"],
        "tokens_per_second": {name: spread(over(name, "tokens_per_second")) for name in names},
        "ours_over": compared("tokens_per_second"),
        "ours_over_per_cpu_second": compared("tokens_per_cpu_second"),
        "peak_rss_mib": {name: round(max(over(name, "peak_rss_mib"))) for name in names},
        "lm_tokens_per_token": {
            name: round(statistics.median(over(name, "lm_tokens_per_token")), 3) for name in names
        },
        "load_before": {name: over(name, "load_before") for name in names},
    }
    if "ours" in names:
        split = [shares(r["ours"]) for r in rounds]
        found["our_shares"] = {part: spread([s[part] for s in split]) for part in split[0]}
        found["tokens_per_second_with_start"] = spread(
            [r["ours"]["summary"]["tokens_per_second"] for r in rounds]
        )
    return found


def run(name: str, python: str, job: jobs.Job, folder: Path, threads: int) -> Run:
    """One run of one runner; its output is shown only if it fails."""
    load = os.getloadavg()[0]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "result.json"
        arguments = [json.dumps(job._asdict()), str(folder), scratch, str(found)]
        script = str(ROOT / "benchmarks" / "runners.py")
        command = [python, script, name, *arguments, f"--threads={threads}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed: {shlex.join(command)}\n{done.stderr[-4000:]}")
        made: Run = json.loads(found.read_text())
    return made | {"load_before": round(load, 1)}


def main() -> None:
    """Build the job, run the rounds, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="rounded down to whole steps")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of one run each")
    parser.add_argument("--threads", type=int, default=2, help="threads torch may use")
    parser.add_argument("--buffer", type=int, default=65_536, help="activations that are shuffled")
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "end_to_end", help="folder the job is kept in"
    )
    args = parser.parse_args()
    job = jobs.Job(args.tokens, buffer_tokens=args.buffer)
    job = job._replace(tokens=job.steps * job.batch_tokens)
    if job.steps < 2:
        raise SystemExit(f"--tokens {args.tokens}: two steps of {job.batch_tokens} are the least")
    there = peers.ensure() if set(args.only) - {"ours"} else peers.Peers(None, {}, [])
    names = [n for n in args.only if NAMES[n] is None or NAMES[n] in there.versions]
    if not names:
        raise SystemExit(f"none of the runners asked for is there: {there.notes}")
    measures = "tokens/s from the end of the first optimizer step to the end of the last one"
    head = about("end_to_end", measures, args.threads, there)
    folder = jobs.build(job, args.out.resolve())
    rounds: list[dict[str, Run]] = []
    for i in range(args.repeats):
        # the order turns, so that no runner always follows the same one
        turned = names[i % len(names) :] + names[: i % len(names)]
        found: dict[str, Run] = {}
        for name in turned:
            python = there.python if NAMES[name] else sys.executable
            found[name] = run(name, str(python), job, folder, args.threads)
            rate = found[name]["tokens_per_second"]
            sys.stderr.write(f"round {i + 1}, {name}: {rate:.0f} tokens/s\n")
        rounds.append({name: found[name] for name in names})
    sys.stdout.write(json.dumps(head | {"job": job._asdict()} | result(rounds)) + "\n")


if __name__ == "__main__":
    main()
