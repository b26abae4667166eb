"""Trains heads at equal sparsity, each at its best learning rate, and tabulates what each is worth.

    .venv/bin/python benchmarks/compare_heads.py train stories --out runs/compare
    .venv/bin/python benchmarks/compare_heads.py table stories --out runs/compare

The text is split once, by a hash of each document: what heads are trained on, what learning rates
are chosen on, and what is reported. A cell is one run of `train.py fit`, the command people type,
with one thread; two run beside each other. What the LM computed for a batch of tokens is kept on
disk and read by the next cell, bit for bit the same. A cell that is finished is not run again, so
the same command goes on where it was stopped.

Each head is trained with three learning rates at the first seed and sparsity, and, while the one
with the lowest FVU on the choosing text is at an edge, with twice or half that; it serves for the
other seeds and sparsities, unless one of them ends at more than twice the FVU; then the next best
rate is taken for all. A head whose L0 misses the target by more than a percent is trained once
more at a larger one, for the slope along which differences are corrected. The table is made on the
reporting text by the machinery of `evaluate.py compare`: paired intervals over documents and seeds.
Whether a difference is shown is decided by Holm's correction over the pairs of the study.

Studies: `stories` compares kinds of heads, `decoders` what latents write at equal parameters,
`replication` one spline per latent with its control (arXiv 2605.17493), `decay` three heads whose
learning rate falls from its peak on, and `planes` narrower KAN layers. All are of a folder named by
--model with stories260K in Hugging Face format, and of text named by --text; neither is part of the
project. Their settings can be changed when they are begun.
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
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.table import grid  # noqa: E402
from kanllama_lightning.runs.revision import commit  # noqa: E402
from kanllama_lightning.types import InputError  # noqa: E402

SHARES = {"train": 0.80, "choose": 0.05, "report": 0.15}
"""Of the documents: what is trained on, what rates are chosen on, what is reported."""
RATES = (6e-3, 1.2e-2, 2.4e-2)
EXTENSIONS = 4
"""So often a grid of learning rates grows by a factor 2, on the side where the best one is."""
OFF_TARGET = 0.01
"""Share by which L0 may miss its target before the slope is measured."""
COLLAPSED = 2.0
"""Times the FVU of the first seed: a learning rate at which another seed is worse is not taken."""
SHOWN = 0.05
"""p, corrected, below which a difference is called shown."""
STEEPER = 1.25
"""The L0 target of that run, as a multiple."""
FLOP_ROWS = 8
"""Rows of the reporting text that operations are counted on."""
CELL, STUDY, TEXT = "cell.json", "study.json", "text"


class Study(NamedTuple):
    """What all cells of a comparison share; kept as `study.json` where they are."""

    tokens: int
    d_sae: int
    l0: tuple[int, ...]
    """Targets; the learning rate is chosen at the first."""
    seeds: tuple[int, ...]
    """The learning rate is chosen at the first."""
    heads: tuple[str, ...]
    """Names of configs; `name@width` for another number of latents than the study's, and
    `name:setting=value` for other settings of the head, several with commas."""
    rivals: tuple[str, ...]
    """Heads that every head is compared with."""
    model: str
    hook_point: str
    text: str
    text_sha256: str
    also: tuple[str, ...]
    """Further settings of `train.py`, each NAME=VALUE."""


STUDIES = {
    "stories": Study(
        tokens=2_000_000,
        d_sae=512,
        l0=(8,),
        seeds=(0, 1, 2),
        heads=(
            "batch_topk",
            "wide_batch_topk",
            "batch_topk@2544",  # as large as curved_dictionary with 512 latents at width 64
            "kan",
            "mlp",
            "curved_dictionary",
            "only_kan",
            "jump_relu",
        ),
        rivals=("batch_topk", "wide_batch_topk", "mlp"),
        model="../shared/data/stories260K-hf",
        hook_point="model.layers.2",
        text="../shared/data/tinystories_sample.jsonl",
        text_sha256="",
        also=(),
    )
}
STUDIES["decoders"] = STUDIES["stories"]._replace(
    heads=(
        "bent_dictionary",
        "batch_topk@798",  # as large as bent_dictionary with 512 latents at width 64
        "bent_dictionary:shape=hinges",
        "bent_dictionary:shape=powers",
        "batch_topk",
        "curved_dictionary",
        "batch_topk@2544",
    ),
    rivals=("batch_topk", "batch_topk@798", "bent_dictionary"),
)
STUDIES["replication"] = STUDIES["stories"]._replace(
    heads=("spline_latent", "spline_latent:monotone=false", "gain_latent", "batch_topk"),
    rivals=("batch_topk", "gain_latent"),
)
STUDIES["decay"] = STUDIES["stories"]._replace(
    heads=("batch_topk", "wide_batch_topk", "kan"),
    rivals=("batch_topk", "wide_batch_topk"),
    also=("model.decay=1",),
)
STUDIES["planes"] = STUDIES["stories"]._replace(
    heads=("kan", "kan:kan_args.spline_order=1", "kan:kan_args.grid_size=3", "mlp"),
    rivals=("kan", "mlp"),
)


class Named(NamedTuple):
    """What the name of a head says."""

    config: str
    width: str
    """Empty for the study's."""
    settings: tuple[str, ...]
    """Each NAME=VALUE."""


def named(head: str) -> Named:
    """The parts of a name."""
    kind, _, settings = head.partition(":")
    config, _, width = kind.partition("@")
    return Named(config, width, tuple(settings.split(",")) if settings else ())


class Cell(NamedTuple):
    """One run."""

    head: str
    k: int
    """Its L0 target."""
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.head}-l0_{self.k}-lr_{self.lr:g}-seed_{self.seed}"


class Comparison:
    """The cells of a study in a folder: which there are, which are wanted.

    Args:
        study: What they share.
        out: The folder.
        grid: Learning rates that are tried first, each twice the one before.
    """

    def __init__(self, study: Study, out: Path, grid: Sequence[float] = RATES) -> None:
        self.study, self.out, self.grid = study, out, grid

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The figures of a cell; None if it is not there, infinite FVU if it came to nothing."""
        about = self.about(cell)
        if about is None:
            return None
        if about["exit"] != 0:
            return {"val/choose/fvu": math.inf}
        found: dict[str, Any] = json.loads((self.out / cell.name / "summary.json").read_text())
        return found

    def about(self, cell: Cell) -> dict[str, Any] | None:
        """How a cell was made; None if it is not there."""
        path = self.out / cell.name / CELL
        return json.loads(path.read_text()) if path.is_file() else None

    def made(self) -> list[dict[str, Any]]:
        """How the cells that are there were made."""
        return [json.loads(path.read_text()) for path in sorted(self.out.glob(f"*/{CELL}"))]

    def fvu(self, head: str, lr: float) -> float | None:
        """FVU on the choosing text, at the first seed and sparsity; None if it is not there yet.

        Infinite where a run came to nothing, or one of another seed did (`collapsed`).
        """
        value = self._chosen_by(head, lr, self.study.seeds[0])
        return math.inf if value is not None and self.collapsed(head, lr) else value

    def collapsed(self, head: str, lr: float) -> dict[int, float]:
        """FVU of the seeds that end far behind the first one, by seed."""
        first, *others = self.study.seeds
        usual = self._chosen_by(head, lr, first)
        found = {seed: self._chosen_by(head, lr, seed) for seed in others}
        bound = COLLAPSED * (math.inf if usual is None else usual)
        return {seed: v for seed, v in found.items() if v is not None and not v <= bound}

    def _chosen_by(self, head: str, lr: float, seed: int) -> float | None:
        result = self.result(Cell(head, self.study.l0[0], lr, seed))
        if result is None:
            return None
        value = result.get("val/choose/fvu")
        return float(value) if value is not None and math.isfinite(value) else math.inf

    def rate(self, head: str) -> tuple[float, bool] | None:
        """The best learning rate of a head, and whether others lie on both sides of it.

        None while learning rates are missing (`missing_rates`).
        """
        grid_, found = self._rates(head)
        if None in found.values():
            return None
        best = min(grid_, key=lambda lr: found[lr] or 0.0)
        return best, grid_[0] < best < grid_[-1]

    def rates(self, head: str) -> list[float]:
        """The learning rates that are looked at, ascending."""
        return self._rates(head)[0]

    def missing_rates(self, head: str) -> list[float]:
        """Learning rates that have to be tried before the best is known."""
        grid_, found = self._rates(head)
        return [lr for lr in grid_ if found[lr] is None]

    def _rates(self, head: str) -> tuple[list[float], dict[float, float | None]]:
        """The grid as far as is known, ascending, with the FVU of each."""
        powers = list(range(len(self.grid)))
        while True:
            lrs = [self.grid[0] * 2.0**power for power in powers]
            found = {lr: self.fvu(head, lr) for lr in lrs}
            full = len(powers) == len(self.grid) + EXTENSIONS
            if full or None in found.values() or not math.isfinite(min(_known(found))):
                return lrs, found
            best = min(lrs, key=lambda lr: found[lr] or 0.0)
            if best == lrs[0]:
                powers.insert(0, powers[0] - 1)
            elif best == lrs[-1]:
                powers.append(powers[-1] + 1)
            else:
                return lrs, found

    def finals(self, head: str, k: int) -> list[Cell]:
        """The cells that the table is made of; none while the learning rate is open."""
        rate = self.rate(head)
        return [] if rate is None else [Cell(head, k, rate[0], s) for s in self.study.seeds]

    def slope_cells(self, head: str, k: int) -> list[Cell]:
        """A cell at a larger L0, where that of the head misses its target."""
        cells = self.finals(head, k)
        l0s = [(self.result(cell) or {}).get("val/report/l0") for cell in cells]
        known = [l0 for l0 in l0s if l0 is not None]
        if not cells or len(known) < len(cells):
            return []
        off = abs(statistics.fmean(known) / k - 1)
        # where the study has other sparsities, they give the slope
        steeper = max(k + 1, round(STEEPER * k))
        if off <= OFF_TARGET or len(self.study.l0) > 1 or steeper > self.study.d_sae:
            return []
        return [cells[0]._replace(k=steeper)]

    def wanted(self) -> list[Cell]:
        """Cells that can be run now, in order of worth."""
        s = self.study
        cells = [
            Cell(head, s.l0[0], lr, s.seeds[0])
            for head in s.heads
            for lr in self.missing_rates(head)
        ]
        for k in s.l0:
            for head in s.heads:
                cells += self.finals(head, k)
        for k in s.l0:
            for head in s.heads:
                cells += self.slope_cells(head, k)
        return [c for c in dict.fromkeys(cells) if self.about(c) is None]

    def forget_failures(self) -> None:
        """Let cells that came to nothing be tried again."""
        for path in self.out.glob(f"*/{CELL}"):
            if json.loads(path.read_text())["exit"] != 0:
                path.unlink()


def _known(values: Mapping[float, float | None]) -> list[float]:
    return [value for value in values.values() if value is not None]


def arguments(study: Study, cell: Cell, out: Path) -> list[str]:
    """The command line of a cell."""
    config, width, settings = named(cell.head)
    configs = [f"configs/{config}.yaml", "configs/embedded.yaml", "benchmarks/compare_heads.yaml"]
    values = {
        "lm.name": study.model,
        "lm.hook_point": study.hook_point,
        "data.train": out / TEXT / "train.jsonl",
        "data.val": json.dumps([str(out / TEXT / f"{name}.jsonl") for name in list(SHARES)[1:]]),
        "model.head.d_sae": width or study.d_sae,
        "model.head.target_l0": cell.k,
        "model.tokens": study.tokens,
        "model.optimizer.lr": cell.lr,
        "seed_everything": cell.seed,
        "run": out / cell.name,
    }
    args = [part for config in configs for part in ("--config", str(ROOT / config))]
    own = [f"model.head.{setting}" for setting in settings]
    return ["fit", *args, *(f"--{name}={value}" for name, value in values.items())] + [
        f"--{setting}" for setting in (*own, *study.also)
    ]


def split_text(study: Study, out: Path) -> None:
    """Write the documents of each part, chosen by a hash of their contents."""
    from kanllama_lightning.corpus import resolve

    folder = out / TEXT
    if all((folder / f"{name}.jsonl").is_file() for name in SHARES):
        return
    corpus = resolve(study.text)
    corpus.open()
    parts: dict[str, list[str]] = {name: [] for name in SHARES}
    for document in corpus.once():
        if document.text is None:
            raise InputError(f"--text {study.text}: holds token ids; give a text")
        share = document.share()
        for name, size in SHARES.items():
            if share < size or name == list(SHARES)[-1]:
                parts[name].append(json.dumps({"text": document.text}))
                break
            share -= size
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        if not lines:
            raise InputError(
                f"--text {study.text}: its {sum(map(len, parts.values()))} documents leave none "
                f"to {name}; give a longer text"
            )
        write(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file whole."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def remember_activations(folder: Path | None) -> None:
    """Let this process compute the activations of a batch of tokens only if no other one did."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if folder is None:
        return
    import numpy as np
    import torch

    from kanllama_lightning.lm.frozen import FrozenLM

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


def train(study: Study, cell: Cell, out: Path, code: str) -> str:
    """Run one cell in this process; what it printed lies beside its figures."""
    import torch

    from train import main

    if commit() != code:
        raise InputError(
            f"the code changed from {code} to {commit()} while cells were trained; go back to "
            f"{code} and run the same command again"
        )
    torch.set_num_threads(1)
    folder, args = out / cell.name, arguments(study, cell, out)
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    for handler in logging.getLogger().handlers[:]:
        logging.getLogger().removeHandler(handler)
    printed = out / f"{cell.name}.log"
    with (
        printed.open("w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        exit_code = main(args)
    seconds = time.monotonic() - began
    if exit_code > 2:
        return f"{cell.name}: stopped"
    about = {
        **cell._asdict(),
        "commit": code,
        "exit": exit_code,
        "seconds": round(seconds, 1),
        "command": shlex.join(["python", "train.py", *args]),
    }
    folder.mkdir(exist_ok=True)
    write(folder / CELL, json.dumps(about, indent=2) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # nobody goes on from a cell
    said = printed.read_text().strip().splitlines()[-1:] if exit_code else []
    return "; ".join([f"{cell.name}: exit {exit_code}, {seconds:.0f} s", *said])


def run_all(comparison: Comparison, code: str, workers: int, keep: bool) -> int:
    """Run what is missing, several at a time; returns the exit code."""
    kept = comparison.out / ".activations" if keep else None
    comparison.forget_failures()
    running: dict[Future[str], Cell] = {}
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        remember_activations,
        (kept,),
        max_tasks_per_child=12,
    )
    stopped: set[Cell] = set()
    try:
        while True:
            for cell in comparison.wanted():
                if len(running) < workers and cell not in {*running.values(), *stopped}:
                    job = pool.submit(train, comparison.study, cell, comparison.out, code)
                    running[job] = cell
            if not running:
                break
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(job)
                say(job.result())
                if comparison.about(cell) is None:
                    stopped.add(cell)
    except (KeyboardInterrupt, BrokenProcessPool) as e:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)
        why = "stopped" if isinstance(e, KeyboardInterrupt) else "error: a worker was killed"
        sys.stderr.write(f"{why}; finished cells are kept, the same command goes on from them\n")
        return 130 if isinstance(e, KeyboardInterrupt) else 1
    finally:
        pool.shutdown(cancel_futures=True)
    for head in comparison.study.heads:
        note = edge(comparison, head)
        if note:
            say(f"{head}: {note}")
    failed = [made for made in comparison.made() if made["exit"] != 0]
    if failed or stopped:
        say(f"without a result: {', '.join([*map(_name, failed), *(c.name for c in stopped)])}")
    return 1 if stopped else 0


def _name(about: Mapping[str, Any]) -> str:
    return Cell(*(about[key] for key in Cell._fields)).name


def edge(comparison: Comparison, head: str) -> str:
    """What to say of a learning rate that is not bracketed; empty if it is."""
    rate = comparison.rate(head)
    if rate is None or rate[1]:
        return ""
    return f"the best learning rate, {rate[0]:g}, is at the edge of what was tried"


def say(text: str) -> None:
    """A line for the terminal, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def operations(folder: Path, x: Any) -> float:
    """Floating-point operations of a forward pass per token: products, on real activations.

    Dense products are counted where they are made; a sum of dictionary rows costs two operations
    per coordinate of each row that is summed, so that what a curve or a denser token costs counts.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from kanllama_lightning.heads import SAEHead

    def rows(table: Sequence[int], indices: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * int(indices[0]) * int(table[1])

    bags = (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only)
    mapping: dict[Any, Any] = dict.fromkeys(bags, rows)
    head = SAEHead.load(folder / "head")
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        head(x)
    return float(counter.get_total_flops()) / len(x)


def real_activations(folder: Path, text: Path) -> tuple[Any, int]:
    """Activations of the reporting text as a cell sees it, and the tokens of its training text."""
    from kanllama_lightning.corpus import resolve
    from kanllama_lightning.functional.sinks import regular
    from kanllama_lightning.lm.frozen import FrozenLM
    from kanllama_lightning.reports.saved_head import read_subject

    subject = read_subject(folder)
    lm = FrozenLM(**subject.lm_args()).load_()
    data = subject.data(lm.tokenizer)
    assert data is not None, "a cell has a config.yaml"
    encoder = data.encoder
    corpora = [resolve(str(text / f"{name}.jsonl")) for name in ("report", "train")]
    for corpus in corpora:
        corpus.open()
    rows = encoder.first_rows(corpora[0].once(), FLOP_ROWS)
    acts = lm.acts(rows.ids)
    x = acts[rows.keep & regular(acts, subject.head.norm_limit)].float()
    return x, sum(len(ids) for ids in encoder.encode(list(corpora[1].once())))


class Tables(NamedTuple):
    """What is known at the end."""

    heads: list[dict[str, Any]]
    """A row per head and sparsity."""
    pairs: list[dict[str, Any]]
    """A row per head, rival, sparsity and quantity: head minus rival."""
    about: dict[str, Any]


def tables(comparison: Comparison) -> Tables:
    """Evaluate the finished cells on the reporting text, and compare them.

    Raises:
        InputError: There are none.
    """
    from kanllama_lightning import comparison as compare
    from kanllama_lightning.console.quiet import quiet
    from kanllama_lightning.reports.bits_report import BitsReport
    from kanllama_lightning.reports.evaluation import EvalSettings, report
    from kanllama_lightning.reports.latents_report import LatentsReport
    from kanllama_lightning.reports.losses_report import LossesReport
    from kanllama_lightning.reports.sparsity_report import SparsityReport

    quiet()
    s, out = comparison.study, comparison.out
    groups: dict[tuple[str, int], list[Cell]] = {}
    for k in s.l0:
        for head in s.heads:
            cells = comparison.finals(head, k)
            done = [c for c in cells if _finished(comparison, c)]
            if done:
                groups[head, k] = done
            for cell in comparison.slope_cells(head, k):
                if _finished(comparison, cell):
                    groups[head, cell.k] = [cell]
    every = [cell for cells in groups.values() for cell in cells]
    if len(every) < 2:
        raise InputError(f"--out {out}: holds {len(every)} finished heads; train some first")
    folders = [out / cell.name for cell in every]
    how = EvalSettings(text=[str(out / TEXT / "report.jsonl")], wandb=False)
    reports = [LossesReport(), SparsityReport(), BitsReport(), LatentsReport()]
    records = [run.out for run in report(folders, reports, how)]
    read = compare.load(folders, [c.name for c in every], records)
    runs = dict(zip(every, read, strict=True))
    seeds = {
        key: compare.Seeds(f"{key[0]} at L0 {key[1]}", [runs[c] for c in cells])
        for key, cells in groups.items()
    }
    means = {
        row["group"]: row for row in compare.seed_table(list(runs.values()), [*seeds.values()])
    }
    single = {row["run"]: row for row in compare.table(list(runs.values()))}
    x, epoch = real_activations(folders[0], out / TEXT)
    rows, pairs = [], []
    for (head, k), cells in groups.items():
        if k not in s.l0:
            continue
        mean, own = means[seeds[head, k].label], single[cells[0].name]
        kept = [comparison.result(cell) or {} for cell in cells]
        rows.append(
            {
                "target_l0": k,
                "head": head,
                "latents": own["d_sae"],
                "parameters": own["parameters"],
                "seeds": len(cells),
                "l0": mean["l0"],
                "bits_per_token": statistics.fmean(
                    single[cell.name]["bits_per_token"] for cell in cells
                ),
                **{f"fvu{end}": mean[f"fvu{end}"] for end in ("", "_low", "_high")},
                **{f"delta_ce{end}": mean[f"delta_ce{end}"] for end in ("", "_low", "_high")},
                "delta_ce_share": mean["delta_ce_share"],
                "dead_frac": mean["dead_frac"],
                "dead_tokens": own["dead_tokens"],
                "max_cosine": statistics.fmean(
                    single[cell.name]["lens_max_cosine_mean"] for cell in cells
                ),
                "flops_per_token": statistics.fmean(
                    operations(out / cell.name, x) for cell in cells
                ),
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in kept),
                "lr": cells[0].lr,
                "lr_bracketed": not edge(comparison, head),
                "passes": s.tokens / epoch,
                "commit": " ".join(
                    dict.fromkeys((comparison.about(c) or {})["commit"] for c in cells)
                ),
            }
        )
    named = {group.label: key for key, group in seeds.items()}
    for row in compare.differences(list(runs.values()), groups=list(seeds.values())):
        (head, k), (other, other_k) = named[row["a"]], named[row["b"]]
        if k == other_k and k in s.l0:
            both = ((head, other), (other, head))
            pairs += [_against(row, x, y) for x, y in both if y in s.rivals]
    correct(pairs)
    return Tables(rows, pairs, {"epoch_tokens": epoch, **_about(runs[every[0]])})


def correct(pairs: Sequence[dict[str, Any]]) -> None:
    """Put Holm's correction of p beside p: over all pairs of the study, one family per quantity.

    A pair that is there both ways round counts once.
    """
    from kanllama_lightning.functional.bootstrap import holm

    families: dict[str, dict[Any, float]] = {}
    for row in pairs:
        p = math.nan if row["p"] is None else row["p"]
        families.setdefault(row["quantity"], {})[_pair(row)] = p
    found = {q: dict(zip(own, holm([*own.values()]), strict=True)) for q, own in families.items()}
    for row in pairs:
        p = found[row["quantity"]][_pair(row)]
        row["p_holm"] = None if math.isnan(p) else p


def _pair(row: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    """A pair at a sparsity, whichever way round."""
    return row["target_l0"], frozenset((row["head"], row["rival"]))


def _finished(comparison: Comparison, cell: Cell) -> bool:
    about = comparison.about(cell)
    return about is not None and about["exit"] == 0


def _about(run: Any) -> dict[str, Any]:
    """The text that figures are of."""
    own = run.of(run.sets[0])
    return {"documents": len(own), "n_targets": int(own["n_targets"].sum())}


def _against(row: Mapping[str, Any], head: str, rival: str) -> dict[str, Any]:
    """The difference as head minus rival, whichever way round it was made."""
    turned = not row["a"].startswith(f"{head} at ")
    sign = -1 if turned else 1
    ends = [None if row[e] is None else sign * row[e] for e in ("low", "high")]
    low, high = reversed(ends) if turned else ends
    own, others = ("b", "a") if turned else ("a", "b")
    value = row["difference"]
    return {
        "target_l0": int(row["a"].rsplit(" ", 1)[1]),
        "head": head,
        "rival": rival,
        "quantity": row["quantity"],
        "value": row[f"value_{own}"],
        "rival_value": row[f"value_{others}"],
        "difference": None if value is None else sign * value,
        "low": low,
        "high": high,
        "p": row["p"],
        "covers": row["covers"],
        "l0": row[f"l0_{own}"],
        "rival_l0": row[f"l0_{others}"],
        "matching": row["matching"],
    }


def write_tables(comparison: Comparison) -> None:
    """As CSV beside the runs, and as Markdown on the terminal."""
    found = tables(comparison)
    for name, rows in (("table.csv", found.heads), ("differences.csv", found.pairs)):
        with (comparison.out / f"{name}.tmp").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0] if rows else ["head"])
            writer.writeheader()
            writer.writerows(rows)
        (comparison.out / f"{name}.tmp").replace(comparison.out / name)
    s, about, epoch = comparison.study, found.about, found.about["epoch_tokens"]
    commits = ", ".join(sorted({row["commit"] for row in found.heads}))
    say(
        f"At commit {commits}: {s.hook_point} of {Path(s.model).name}, {s.tokens:,} training "
        f"tokens ({s.tokens / epoch:.2f} passes over {epoch:,}), seeds "
        f"{', '.join(map(str, s.seeds))}. Figures are of {about['n_targets']:,} predicted tokens "
        f"of {about['documents']:,} documents that took no part in training and in the choice of "
        "learning rates. Brackets: 95 % interval over documents and seeds. Share: delta CE in "
        "units of what mean ablation costs. Bits: of a token's code (docs/methods.md, C). Dead: "
        "fired on none of N tokens. Cosine: the largest of a latent's direction with another's, "
        "mean of those alive. kFLOP: products of a forward pass on real activations.\n"
    )
    header = ["L0 target", "head", "lr", "L0", "bits", "FVU", "delta CE, nats", "share"]
    header += ["dead (N)", "cosine", "latents", "parameters", "kFLOP/token", "tokens/s"]
    header += ["passes", "seeds", "commit"]
    say(grid(header, [_line(row) for row in found.heads]) + "\n")
    missing = [head for head in s.heads if head not in {row["head"] for row in found.heads}]
    notes = [f"{head}: {note}" for head in s.heads if (note := edge(comparison, head))]
    notes += [
        f"{head}: {lr:g} is not taken: seed {seed} ends with FVU {value:.2f}"
        for head in s.heads
        for lr in comparison.rates(head)
        for seed, value in comparison.collapsed(head, lr).items()
    ]
    notes += [f"without a result: {', '.join(missing)}"] if missing else []
    say("\n".join(f"- {note}" for note in notes) + "\n" if notes else "")
    compared = len({_pair(row) for row in found.pairs})
    say(
        f"Differences, with 95 % intervals of each by itself. Shown: p below 5 % by Holm's "
        f"correction over the {compared} pairs of each quantity.\n"
    )
    header = ["L0 target", "head", "minus", "FVU", "delta CE, nats", "KL, nats", "L0, L0", "L0 is"]
    say(grid(header, _pair_lines(found.pairs)))


def _line(row: Mapping[str, Any]) -> list[str]:
    """A row of the table of heads, for people."""

    def ranged(key: str) -> str:
        low, high = row[f"{key}_low"], row[f"{key}_high"]
        return f"{row[key]:.4f}" + ("" if low is None else f" ({low:.4f} to {high:.4f})")

    return [
        f"{row['target_l0']}",
        row["head"],
        f"{row['lr']:g}{'' if row['lr_bracketed'] else ' (edge)'}",
        f"{row['l0']:.2f}",
        f"{row['bits_per_token']:.1f}",
        ranged("fvu"),
        ranged("delta_ce"),
        "-" if row["delta_ce_share"] is None else f"{row['delta_ce_share']:.1%}",
        f"{row['dead_frac']:.1%} ({row['dead_tokens']:,.0f})",
        f"{row['max_cosine']:.3f}",
        f"{row['latents']:,}",
        f"{row['parameters']:,}",
        f"{row['flops_per_token'] / 1000:.1f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['passes']:.2f}",
        f"{row['seeds']}",
        row["commit"],
    ]


def _pair_lines(pairs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line per head and rival."""
    lines: dict[tuple[int, str, str], list[str]] = {}
    for row in pairs:
        key = (row["target_l0"], row["head"], row["rival"])
        line = lines.setdefault(key, [str(row["target_l0"]), row["head"], row["rival"]])
        if row["difference"] is None or row["low"] is None:
            line.append("no interval")
            continue
        share = f"{row['difference'] / row['rival_value']:+.1%}"
        ends = f"{row['low']:+.4f} to {row['high']:+.4f}"
        known = row["p_holm"] is not None and row["p_holm"] < SHOWN
        shown = "" if known else ", no difference shown"
        line.append(f"{row['difference']:+.4f} ({ends}; {share}{shown})")
    for row in pairs:
        line = lines[row["target_l0"], row["head"], row["rival"]]
        if len(line) < 8:
            line += [f"{row['l0']:.2f}, {row['rival_l0']:.2f}", row["matching"]]
    return [line[:8] for line in lines.values()]


def as_begun(out: Path, changed: Mapping[str, Any]) -> Study:
    """The study that is in a folder.

    Raises:
        InputError: It was begun with other settings than those asked for now.
    """
    kept = json.loads((out / STUDY).read_text())
    study = Study(**{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()})
    for key, value in changed.items():
        if value != getattr(study, key):
            raise InputError(
                f"--{key}: {value} was asked for, but the study in {out} was begun with "
                f"{getattr(study, key)}; leave it out, or give another --out"
            )
    return study


def check_names(heads: Sequence[str]) -> None:
    """Refuse names of heads that say nothing."""
    for head in heads:
        name, width, settings = named(head)
        if not (ROOT / f"configs/{name}.yaml").is_file() or ("@" in head) != width.isdigit():
            raise InputError(f"--heads {head}: there is no configs/{name}.yaml, or no such width")
        if (":" in head) != bool(settings) or not all("=" in one for one in settings):
            raise InputError(f"--heads {head}: behind the colon stands no NAME=VALUE of the head")


def begin(given: argparse.Namespace, out: Path) -> Study:
    """The study of a folder: as it was begun, or begun now.

    Raises:
        InputError: It was begun with other settings, or is not there, or cannot be.
    """
    asked = {key: getattr(given, key) for key in ("tokens", "d_sae", "l0", "seeds", "heads")}
    more = ("rivals", "model", "hook_point", "text", "also")
    asked |= {key: getattr(given, key) for key in more}
    changed = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in asked.items()
        if value is not None
    }
    path = out / STUDY
    if given.what == "table" or path.is_file():
        if not path.is_file():
            raise InputError(f"--out {given.out}: holds no study {given.study}; train it first")
        study = as_begun(out, changed)
        if given.what == "train" and digest(study.text) != study.text_sha256:
            raise InputError(f"--text {study.text}: changed since the study in {out} was begun")
        return study
    study = STUDIES[given.study]._replace(**changed)
    study = study._replace(text_sha256=digest(study.text))
    check_names(study.heads)
    if strangers := [rival for rival in study.rivals if rival not in study.heads]:
        if given.rivals is not None:
            raise InputError(f"--rivals {' '.join(strangers)}: not among the heads of the study")
        study = study._replace(rivals=tuple(r for r in study.rivals if r in study.heads))
    if not Path(study.model).is_dir():
        raise InputError(f"--model {study.model}: no such folder; give that of the LM")
    for key in ("tokens", "d_sae", "l0"):
        values = getattr(study, key)
        if min(values if isinstance(values, tuple) else (values,)) < 1:
            raise InputError(f"--{key}={values}: must be at least 1")
    if len(set(study.heads)) < 2:
        raise InputError(f"--heads {' '.join(study.heads)}: name at least two to compare")
    out.mkdir(parents=True, exist_ok=True)
    split_text(study, out)
    write(path, json.dumps(study._asdict(), indent=2) + "\n")
    return study


def digest(text: str) -> str:
    """Of a file of text."""
    if not Path(text).is_file():
        raise InputError(f"--text {text}: no such file; give one with text")
    with Path(text).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_code(comparison: Comparison, given: argparse.Namespace) -> str:
    """The commit that cells are made at.

    Raises:
        InputError: Files differ from it, or cells were made at another one.
    """
    code = commit() or "unknown"
    if (code.endswith("-dirty") or code == "unknown") and not given.dirty:
        raise InputError(
            f"the code is at {code}: figures must belong to a commit; commit first, or give "
            "--dirty to have them marked"
        )
    others = sorted({made["commit"] for made in comparison.made()} - {code})
    if others and not given.mixed:
        raise InputError(
            f"--out {given.out}: holds cells of {', '.join(others)}, but the code is at {code}; "
            "give another --out, or --mixed to go on and have each row say its commit"
        )
    return code


def exit_code(work: Callable[[], int]) -> int:
    """What `work` returns; a mistake in what was asked for is one line and 2, a stop is 130."""
    try:
        return work()
    except InputError as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on\n")
        return 130


def main(args: Sequence[str] | None = None) -> int:
    """Train what is missing, or tabulate what is there; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=["train", "table"])
    add("study", choices=list(STUDIES))
    add("--out", type=Path, default=Path("runs/compare"), help="folder, made if it is missing")
    add("--workers", type=int, default=2, help="cells that run beside each other")
    add("--no_cache", action="store_true", help="run the LM for every cell")
    add("--dirty", action="store_true", help="train though files differ from the commit")
    add("--mixed", action="store_true", help="go on with cells of another commit")
    add("--model", help="folder of the LM")
    add("--hook_point", help="where activations are read")
    add("--text", help="file of text, a JSON object per line")
    add("--tokens", type=int, help="training tokens of a cell")
    add("--d_sae", type=int, help="latents of the heads")
    add("--l0", type=int, nargs="+", help="targets; learning rates are chosen at the first")
    add("--seeds", type=int, nargs="+", help="learning rates are chosen at the first")
    add("--heads", nargs="+", help="names of configs, NAME@LATENTS, NAME:SETTING=VALUE,...")
    add("--rivals", nargs="+", help="those of the heads that all are compared with")
    add("--also", nargs="+", help="further settings of train.py for every cell, NAME=VALUE")
    given = parser.parse_args(args)
    out = given.out.resolve() / given.study
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def work() -> int:
        if given.workers < 1:
            raise InputError(f"--workers={given.workers}: must be at least 1")
        study = begin(given, out)
        comparison = Comparison(study, out)
        if given.what == "table":
            write_tables(comparison)
            return 0
        code = check_code(comparison, given)
        return run_all(comparison, code, given.workers, not given.no_cache)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
