"""Trains every head at equal sparsity and tabulates what each is worth.

    .venv/bin/python benchmarks/compare_heads.py train stories --out runs/compare
    .venv/bin/python benchmarks/compare_heads.py table stories --out runs/compare

A cell is one run of `train.py fit`, the command people type, with one thread; two run beside each
other. What the LM computed for a batch of tokens is kept on disk and read by the next cell, bit for
bit the same. A cell whose summary.json is there is not run again, so a stopped comparison goes on
where it was. Each head is trained with several learning rates at the first seed and the first
sparsity; the one with the lowest FVU serves for the other seeds and sparsities.

Studies: `stories` (a folder named by --model with stories260K in Hugging Face format, and text
named by --text; neither is part of the project) and `embedded` (both shipped).
"""

import argparse
import contextlib
import csv
import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HEADS = (
    "batch_topk",
    "kan",
    "mlp",
    "wide_batch_topk",
    "spline_hidden",
    "kan_direct",
    "spline_input",
    "spline_latent",
    "topk",
    "matryoshka",
    "only_kan",
    "curved_dictionary",
    "kan_relu_dense",
    "jump_relu",
    "gated",
    "standard",
    "random_dictionary",
    "dense_only_kan",
    "dense_kan_relu",
    "kan_relu_dense_latent",
)
SEEDS = (0, 1, 2)
RECORD = ("dense_only_kan", "dense_kan_relu", "kan_relu_dense_latent")
"""Slow, and there for the record: one learning rate, seed and sparsity."""
COLUMNS = ("fvu", "delta_ce", "ce_score", "l0", "dead_frac")


class Study(NamedTuple):
    """What all cells of a comparison share."""

    tokens: int
    d_sae: int
    sparsities: tuple[int, ...]
    """Target L0; the learning rate is chosen at the first."""
    finalists: tuple[str, ...]
    """Heads that are trained with all seeds at the other sparsities too."""
    common: int | None
    """Sparsity at which all heads are trained, with the first seed at least."""
    heads: tuple[str, ...]
    rates: tuple[float, ...]


FINALISTS = ("batch_topk", "kan", "mlp", "wide_batch_topk", "spline_hidden", "only_kan")
CURVED = (*FINALISTS, "curved_dictionary")
RIVALS = ("batch_topk@2544",)
"""As large as curved_dictionary and kan_direct with 512 latents at width 64."""
RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
STUDIES = {
    "stories": Study(2_000_000, 512, (8, 4, 16), CURVED, 16, (*RIVALS, *HEADS), RATES),
    "embedded": Study(600_000, 1024, (8,), (), None, CURVED, RATES[1:3]),
}


class Cell(NamedTuple):
    """One run."""

    head: str
    """Name of its config; `name@width` for another number of latents than the study's."""
    k: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.head}-l0_{self.k}-lr_{self.lr:g}-seed_{self.seed}"


def arguments(study: str, cell: Cell, folder: Path, given: argparse.Namespace) -> list[str]:
    """The command line of a cell."""
    s = STUDIES[study]
    head, _, width = cell.head.partition("@")
    args = ["fit", "--config", str(ROOT / f"configs/{head}.yaml")]
    args += ["--config", str(ROOT / "configs/embedded.yaml")]
    args += ["--config", str(ROOT / "benchmarks/compare_heads.yaml")]
    values = {
        "model.head.d_sae": width or s.d_sae,
        "model.head.target_l0": cell.k,
        "model.tokens": s.tokens,
        "model.optimizer.lr": cell.lr,
        "seed_everything": cell.seed,
        "run": folder,
    }
    if study == "stories":
        values |= {
            "lm.name": given.model,
            "lm.hook_point": "model.layers.2",
            "data.train": given.text,
            "data.append_eos": "false",
        }
    return args + [f"--{name}={value}" for name, value in values.items()]


def remember_activations(folder: Path | None) -> None:
    """Let this process compute the activations of a batch of tokens only if no other one did."""
    if folder is None:
        return
    import numpy as np
    import torch

    from kanllama_lightning.lm import FrozenLM

    folder.mkdir(parents=True, exist_ok=True)
    compute = FrozenLM.acts

    def acts(self: FrozenLM, ids: torch.Tensor) -> torch.Tensor:
        path = folder / f"{hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:32]}.npy"
        if not path.is_file():
            part = path.with_suffix(f".{os.getpid()}.npy")
            np.save(part, compute(self, ids).numpy())
            part.replace(path)
        return torch.from_numpy(np.load(path))

    FrozenLM.acts = acts  # type: ignore[method-assign]


def train(job: tuple[str, Cell, Path, argparse.Namespace]) -> str:
    """Run one cell in this process; what it printed lies beside its figures."""
    import torch

    from train import main

    study, cell, folder, given = job
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for handler in logging.getLogger().handlers[:]:
        logging.getLogger().removeHandler(handler)
    with (
        (folder.parent / f"{cell.name}.log").open("w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = main(arguments(study, cell, folder, given))
    return f"{cell.name}: exit {code}, {time.monotonic() - began:.0f} s"


def result(out: Path, cell: Cell) -> dict[str, Any] | None:
    """The summary of a cell, if it was run."""
    path = out / cell.name / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else None


def best_rate(study: Study, out: Path, head: str) -> float | None:
    """The learning rate with the lowest FVU at the first seed and sparsity, once all are there."""
    k = study.sparsities[0]
    results = {lr: result(out, Cell(head, k, lr, SEEDS[0])) for lr in rates(study, head)}
    if any(r is None for r in results.values()):
        return None

    def fvu(lr: float) -> float:
        value = results[lr]["val/fvu"]  # type: ignore[index]
        return math.inf if math.isnan(value) else float(value)

    return min(results, key=fvu)


def rates(study: Study, head: str) -> tuple[float, ...]:
    """Learning rates that a head is trained with."""
    return study.rates[1:2] if head in RECORD else study.rates


def seeds(study: Study, head: str, k: int) -> tuple[int, ...]:
    """Seeds that a head is trained with at a sparsity."""
    if head in RECORD:
        return SEEDS[:1] if k == study.sparsities[0] else ()
    if k == study.sparsities[0] or head in study.finalists:
        return SEEDS
    return SEEDS[:1] if k == study.common else ()


def wanted(study: str, out: Path) -> list[Cell]:
    """Cells that can be run now, in order of worth."""
    s = STUDIES[study]
    first = s.sparsities[0]
    cells = [Cell(head, first, lr, SEEDS[0]) for head in s.heads for lr in rates(s, head)]
    for k in s.sparsities:
        for head in s.heads:
            lr = best_rate(s, out, head)
            if lr is not None:
                cells += [Cell(head, k, lr, seed) for seed in seeds(s, head, k)]
    return [c for c in dict.fromkeys(cells) if result(out, c) is None]


def run_all(study: str, out: Path, given: argparse.Namespace) -> None:
    """Run what is missing, two at a time."""
    context = multiprocessing.get_context("spawn")
    failed: set[Cell] = set()
    while cells := [c for c in wanted(study, out) if c not in failed]:
        kept = None if given.no_cache else out / ".activations"
        with context.Pool(given.workers, remember_activations, (kept,), 12) as pool:
            jobs = [(study, cell, out / cell.name, given) for cell in cells]
            for line in pool.imap_unordered(train, jobs):
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
        failed |= {c for c in cells if result(out, c) is None}
    if failed:
        sys.stdout.write(f"without a result: {', '.join(c.name for c in failed)}\n")


def flops(folder: Path) -> tuple[int, float]:
    """Trained parameters, and floating-point operations of a forward pass per token.

    The products are counted where they are made; decoding a sparse code is 2 * L0 * d_model.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from kanllama_lightning.heads import SAEHead

    head = SAEHead.load(folder / "head")
    n = 256
    x = torch.randn(n, head.d_model) / head.scale + head.x_mean
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = head(x)
    sparse = hasattr(out.codes, "rows")
    decode = 2 * head.target_l0 * head.d_model if sparse else 0  # type: ignore[operator]
    return head.n_parameters(), counter.get_total_flops() / n + decode


def table(study: str, out: Path) -> list[dict[str, Any]]:
    """One row per head and sparsity: means over seeds, and the range of each figure."""
    s = STUDIES[study]
    rows = []
    for k in s.sparsities:
        for head in s.heads:
            lr = best_rate(s, out, head)
            cells = [] if lr is None else [Cell(head, k, lr, seed) for seed in SEEDS]
            found = [(c, r) for c in cells if (r := result(out, c)) is not None]
            if not found:
                continue
            parameters, per_token = flops(out / found[0][0].name)
            row: dict[str, Any] = {"target_l0": k, "head": head, "lr": lr, "seeds": len(found)}
            for column in COLUMNS:
                values = [r[f"val/{column}"] for _, r in found]
                row[column] = statistics.fmean(values)
                row[f"{column}_min"], row[f"{column}_max"] = min(values), max(values)
            row["parameters"], row["flops_per_token"] = parameters, per_token
            row["tokens_per_second"] = statistics.median(r["tokens_per_second"] for _, r in found)
            rows.append(row)
    return rows


def write_table(study: str, out: Path) -> None:
    """As CSV beside the runs, and as Markdown on the terminal."""
    rows = table(study, out)
    if not rows:
        raise SystemExit(f"{out}: holds no finished head of {study}")
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    say = sys.stdout.write
    say("| L0 target | head | lr | L0 | FVU (range) | delta CE (range) | CE score | dead |")
    say(" parameters | kFLOP/token | tokens/s | seeds |\n" + "|---" * 12 + "|\n")
    for r in rows:
        spread = [f"{r[c]:.4f} ({r[f'{c}_min']:.4f}-{r[f'{c}_max']:.4f})" for c in COLUMNS[:2]]
        say(
            f"| {r['target_l0']} | {r['head']} | {r['lr']:g} | {r['l0']:.2f} | {spread[0]} "
            f"| {spread[1]} | {r['ce_score']:.4f} | {r['dead_frac']:.1%} | {r['parameters']:,} "
            f"| {r['flops_per_token'] / 1000:.0f} | {r['tokens_per_second']:,.0f} "
            f"| {r['seeds']} |\n"
        )


def main() -> None:
    """Train what is missing, or tabulate what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "table"])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--workers", type=int, default=2, help="cells that run beside each other")
    parser.add_argument("--no_cache", action="store_true", help="run the LM for every cell")
    parser.add_argument("--model", default="../shared/data/stories260K-hf")
    parser.add_argument("--text", default="../shared/data/tinystories_sample.jsonl")
    given = parser.parse_args()
    out = given.out.resolve() / given.study
    if given.what == "train":
        run_all(given.study, out, given)
    else:
        write_table(given.study, out)


if __name__ == "__main__":
    main()
