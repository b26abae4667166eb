"""What does a short fine-tune towards the LM's own predictions give a finished head?

    .venv/bin/python benchmarks/finetune.py --runs runs/compare/stories --out runs/finetune

RUNS is a finished study of compare_heads.py. Its heads at one L0, with every seed, are trained on
for a tenth of their tokens, on training text, in two ways that differ in one thing: where `mse` has
the reconstruction loss, `kl` has the mean of it and of beta KL(p || q). p and q are the LM's
predictions untouched and with the reconstruction spliced in, and beta makes both as large at each
step (arXiv 2503.17272 adds them; the mean leaves penalties their weight). Both begin from the
finished head, past every ramp of its training and without reviving dead latents, with a new Adam,
whose rate falls linearly to 0 from a share of the head's own: of `SHARES` the one with the lowest
delta CE on the choosing text, at the first seed, for each head and way. At the end the threshold is
calibrated again, and figures are of the reporting text: before, after `mse`, after `kl`, with
paired intervals over documents and seeds. A head that is there is not trained again. Cells run two
at a time, with one thread each.
"""

import argparse
import csv
import json
import math
import multiprocessing
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.compare_heads import (  # noqa: E402
    CELL,
    STUDY,
    TEXT,
    Cell,
    Comparison,
    as_begun,
    check_code,
    exit_code,
    say,
    write,
)
from benchmarks.table import grid  # noqa: E402
from kanllama_lightning.types import InputError, TokenBatch  # noqa: E402

WAYS = ("mse", "kl")
SHARES = (0.1, 0.3)
"""Of a head's own learning rate: where that of the fine-tune begins."""
TENTH = 0.1
SETTINGS = "finetune.json"
CALIBRATION_ROWS = 32_768
CHOOSE_ROWS = 128
"""Rows of text that the share is chosen on."""


class Tuned(NamedTuple):
    """A head that was trained on."""

    cell: Cell
    way: str
    share: float

    def folder(self, out: Path) -> Path:
        """Where it is."""
        return out / f"{self.way}-{self.share:g}" / self.cell.name


class Job(NamedTuple):
    """What a worker is given."""

    tuned: Tuned
    runs: Path
    out: Path
    tokens: int
    batch: int
    whole: int
    """Tokens that the head was trained on before."""
    code: str


class Bench:
    """A finished head beside its LM, with the text of the study.

    Args:
        run: The cell.
        text: Folder of the text.
    """

    def __init__(self, run: Path, text: Path) -> None:
        from kanllama_lightning.lm.frozen import FrozenLM
        from kanllama_lightning.reports.saved_head import read_subject

        self.subject = read_subject(run)
        self.head = self.subject.head
        self.lm = FrozenLM(**self.subject.lm_args()).load_()
        data = self.subject.data(self.lm.tokenizer)
        assert data is not None, "a cell has a config.yaml"
        self.encoder, self.text = data.encoder, text

    def rows(self, part: str, n: int, seed: int | None = None) -> TokenBatch:
        """Rows of a part of the text: the first ones, or drawn from all by a seed."""
        from kanllama_lightning.corpus import resolve

        corpus = resolve(str(self.text / f"{part}.jsonl"))
        corpus.open()
        most = n if seed is None else 1 << 40
        found = self.encoder.first_rows(corpus.once(), most)
        if seed is not None:
            order = torch.randperm(len(found.ids), generator=torch.Generator().manual_seed(seed))
            found = found.pick(order[:n])
        return TokenBatch(found.ids, found.keep, found.doc, torch.zeros(3, dtype=torch.int64))

    def spliced(self, batch: TokenBatch) -> "Spliced":
        """The head's place in the LM on a few rows."""
        from kanllama_lightning.functional.sinks import regular

        prefix = self.lm.prefix(batch.ids)
        mask = batch.keep & regular(prefix.acts, self.head.norm_limit)
        return Spliced(prefix, mask, prefix.rows[mask].float())

    def log_p(self, spliced: "Spliced", acts: Tensor, places: Tensor) -> Float[Tensor, "n vocab"]:
        """The LM's predictions at some places, with other activations at the hook point."""
        hidden = self.lm.differentiable_resume(spliced.prefix, acts)
        logits: Tensor = self.lm.model.lm_head(hidden[places])
        return logits.log_softmax(-1)

    @torch.no_grad()
    def delta_ce(self, batch: TokenBatch) -> float:
        """Nats per token that the head as it is costs."""
        from kanllama_lightning.lm.splice import spliced_losses

        total, n = 0.0, 0
        for part in parts(batch, 8):
            spliced = self.spliced(part)
            acts = spliced.filled(self.head(spliced.x).x_hat)
            ce = spliced_losses(self.lm, spliced.prefix, part, {"head": acts}).ce
            total += float((ce["head"] - ce["clean"]).double().sum())
            n += len(ce["clean"])
        return total / n


class Spliced(NamedTuple):
    """A run of the LM up to the hook point, and what the head is given of it."""

    prefix: Any
    mask: Tensor
    x: Tensor

    def filled(self, x_hat: Float[Tensor, "tok d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The activations with reconstructions in the place of those under the mask."""
        from kanllama_lightning.lm.splice import put

        return put(self.prefix.acts, self.mask, x_hat)


def parts(batch: TokenBatch, rows: int) -> list[TokenBatch]:
    """A batch, so many rows at a time."""
    pieces = zip(*(tensor.split(rows) for tensor in batch[:3]), strict=True)
    return [TokenBatch(*piece, batch.position) for piece in pieces]


def tune(bench: Bench, way: str, lr: float, tokens: int, batch: int, seed: int, whole: int) -> None:
    """Train a head on, for so many tokens.

    Args:
        bench: The head.
        way: One of `WAYS`.
        lr: Learning rate at the beginning.
        tokens: Positions of rows, so a few more than activations.
        batch: Those of a step.
        seed: Which rows.
        whole: Tokens of its training before, whose running averages go on.

    Raises:
        InputError: The text has fewer rows.
    """
    from kanllama_lightning.functional.losses import kl_divergence
    from kanllama_lightning.training.head_trainer import NEVER, HeadTrainer
    from kanllama_lightning.training.optim import Adam
    from kanllama_lightning.training.schedule import Schedule

    head, length = bench.head.train(), bench.encoder.ctx_len
    if tokens < length:
        raise InputError(f"--tokens {tokens}: less than one row of {length}; take more")
    rows = bench.rows("train", tokens // length, seed)
    if len(rows.ids) < tokens // length:
        raise InputError(
            f"--tokens {tokens}: the training text has {len(rows.ids) * length}; take no more"
        )
    at_once = max(1, batch // length)
    trainer = HeadTrainer("", head, Schedule.of(whole, batch), 5.0)
    trainer.dead_after_tokens = NEVER  # what the run left dead is revived in neither way
    optimizer = Adam(head.parameters(), lr=lr)
    steps = parts(rows, at_once)
    kept = []
    for step, part in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / len(steps))
        spliced = bench.spliced(part)
        kept.append(spliced.x)
        # ramps are over by the middle of a run, and controllers settle at its end
        losses, out = trainer.step(spliced.x, step, 0.5 + 0.5 * step / len(steps))
        if way == "kl":
            places = part.keep
            with torch.no_grad():
                log_p = bench.log_p(spliced, spliced.prefix.acts, places)
            log_q = bench.log_p(spliced, spliced.filled(out.x_hat), places)
            kl = kl_divergence(log_p, log_q).mean()
            beta = (losses["reconstruction"] / kl.clamp_min(1e-9)).detach()
            losses["reconstruction"] = (losses["reconstruction"] + beta * kl) / 2
        torch.stack(list(losses.values())).sum().backward()
        head.project_grad_()
        trainer.clip_(None, "norm")
        optimizer.step()
        optimizer.zero_grad()
        head.project_()
    head.eval().calibrate_(torch.cat(kept[: -(-CALIBRATION_ROWS // len(kept[0]))]))


def work(job: Job) -> None:
    """Train one head on and save it as a run that can be reported on."""
    torch.set_num_threads(1)
    began = time.monotonic()
    tuned, cell = job.tuned, job.tuned.cell
    run, folder = job.runs / cell.name, tuned.folder(job.out)
    bench = Bench(run, job.runs / TEXT)
    lr = cell.lr * tuned.share
    tune(bench, tuned.way, lr, job.tokens, job.batch, cell.seed, job.whole)
    chosen = bench.delta_ce(bench.rows("choose", CHOOSE_ROWS))
    if not math.isfinite(chosen):
        raise InputError(
            f"{folder.relative_to(job.out)}: delta CE is {chosen} on the choosing text"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(run / "config.yaml", folder / "config.yaml")
    summary = {k: v for k, v in bench.subject.summary.items() if not k.startswith("val/")}
    write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    done = {"finetune": tuned.way, "finetune_tokens": job.tokens, "finetune_commit": job.code}
    bench.head.save(folder / "head", bench.subject.card["provenance"] | done)
    about = {"lr": lr, "tokens": job.tokens, "commit": job.code, "choose": chosen}
    about["seconds"] = round(time.monotonic() - began, 1)
    write(folder / CELL, json.dumps(about, indent=2) + "\n")
    sys.stderr.write(f"{folder.relative_to(job.out)}: delta CE {chosen:.4f} on the choosing text\n")


def make(jobs: Sequence[Job], workers: int) -> None:
    """Do those that are not done."""
    todo = [job for job in jobs if not (job.tuned.folder(job.out) / CELL).is_file()]
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in [pool.submit(work, job) for job in todo]:
            future.result()
    except (KeyboardInterrupt, BrokenProcessPool) as e:
        for process in multiprocessing.active_children():
            process.terminate()
        if isinstance(e, KeyboardInterrupt):
            raise
        raise InputError("a worker was killed; the same command goes on") from e
    finally:
        pool.shutdown(cancel_futures=True)


def chosen(job: Job) -> float:
    """Delta CE on the choosing text of one that is done."""
    about = json.loads((job.tuned.folder(job.out) / CELL).read_text())
    return float(about["choose"])


def table(runs: Path, k: int, picked: dict[tuple[str, str], list[Path]], out: Path) -> None:
    """Measure all on the reporting text; to the terminal, and `differences.csv`."""
    from kanllama_lightning import comparison as compare
    from kanllama_lightning.console.quiet import quiet
    from kanllama_lightning.functional.bootstrap import holm
    from kanllama_lightning.reports.evaluation import EvalSettings, report
    from kanllama_lightning.reports.losses_report import LossesReport

    quiet()
    how = EvalSettings(text=[str(runs / TEXT / "report.jsonl")], wandb=False)
    folders = [folder for own in picked.values() for folder in own]
    records = [run.out for run in report(folders, [LossesReport()], how)]
    labels = [f"{f.parent.name}/{f.name}" for f in folders]
    read = dict(zip(folders, compare.load(folders, labels, records), strict=True))
    groups = {
        key: compare.Seeds(" after ".join(key), [read[f] for f in own])
        for key, own in picked.items()
    }
    means = {row["group"]: row for row in compare.seed_table([*read.values()], [*groups.values()])}
    lines = []
    for (head, way), group in groups.items():
        row = means[group.label]
        lines.append([head, way, f"{row['l0']:.2f}"])
        for key in ("fvu", "delta_ce", "kl"):
            ends = [row[f"{key}_low"], row[f"{key}_high"]]
            shown = "" if None in ends else " ({:.4f} to {:.4f})".format(*ends)
            lines[-1].append(f"{row[key]:.4f}{shown}")
    say(grid([f"head, L0 {k}", "after", "L0", "FVU", "delta CE, nats", "KL, nats"], lines) + "\n")
    heads = list(dict.fromkeys(head for head, _ in picked))
    sets = [[groups[head, way] for way in (*WAYS[::-1], "before")] for head in heads]
    sets += [[groups[head, way] for head in heads] for way in ("before", *WAYS)]
    found, apart = [], []
    for some in sets:
        families: dict[str, list[dict[str, Any]]] = {}
        pairs = list(combinations(some, 2))
        for pair in pairs:  # two at a time: no third one lends its slope
            own = compare.differences([r for g in pair for r in g.runs], groups=pair)
            for row in own:
                families.setdefault(row["quantity"], []).append(row)
            if not own:
                apart.append(" and ".join(f"{g.label} ({g.l0():.2f})" for g in pair))
        for rows in families.values():
            ps = [math.nan if r["p"] is None else r["p"] for r in rows]
            full = [*ps, *[math.nan] * (len(pairs) - len(rows))]
            for row, p in zip(rows, holm(full), strict=False):
                row["p_holm"] = p
            found += rows
    if apart:
        say(f"Not compared, as their L0 is further apart than 2 %: {'; '.join(apart)}\n")
    if not found:
        return
    with (out / "differences.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    lines = []
    for row in found:
        if row["quantity"] == "delta_ce" and row["low"] is not None:
            share = row["difference"] / row["value_b"]
            lines.append([row["a"], row["b"], f"{row['difference']:+.4f}", f"{share:+.1%}"])
            lines[-1] += [f"{row['low']:+.4f} to {row['high']:+.4f}", f"{row['p_holm']:.4f}"]
    header = ["delta CE of", "minus", "nats", "share", "95 % interval", "p, Holm within its set"]
    say(grid(header, lines))


def same(out: Path, settings: dict[str, Any]) -> None:
    """Keep what the heads of a folder share.

    Raises:
        InputError: It holds heads of other settings.
    """
    path = out / SETTINGS
    out.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write(path, json.dumps(settings, indent=2) + "\n")
        return
    for key, kept in json.loads(path.read_text()).items():
        if kept != settings[key]:
            raise InputError(
                f"--out {out}: holds heads of {key} {kept}, and {settings[key]} was asked for; "
                "give another --out"
            )


def main(args: Sequence[str] | None = None) -> int:
    """Train on what is missing, and tabulate; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of a finished study of compare_heads.py")
    add("--out", type=Path, default=Path("runs/finetune"), help="folder, made if it is missing")
    add("--l0", type=int, help="which of the study's (default: the first)")
    add("--heads", nargs="+", help="some of the study's (default: all)")
    add("--tokens", type=int, help="tokens to train on for (default: a tenth of the study's)")
    add("--batch", type=int, default=2048, help="tokens of a step")
    add("--workers", type=int, default=2, help="heads that are trained at a time")
    add("--dirty", action="store_true", help="train though files differ from the commit")
    given = parser.parse_args(args)
    given.mixed = True  # of the cells that it begins from
    runs, out = given.runs.resolve(), given.out.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def begin() -> int:
        for name in ("tokens", "batch", "workers", "l0"):
            if (value := getattr(given, name)) is not None and value < 1:
                raise InputError(f"--{name} {value}: must be at least 1")
        if not (runs / STUDY).is_file():
            raise InputError(f"--runs {given.runs}: holds no study of compare_heads.py")
        study = as_begun(runs, {})
        comparison = Comparison(study, runs)
        code = check_code(comparison, given)
        k, heads = given.l0 or study.l0[0], given.heads or study.heads
        finals: dict[str, list[Cell]] = {head: comparison.finals(head, k) for head in heads}
        for head, cells in finals.items():
            if not cells or any(comparison.about(cell) is None for cell in cells):
                raise InputError(
                    f"--heads {head}: is not finished at L0 {k} in {given.runs}; train it first"
                )
        tokens = given.tokens or round(study.tokens * TENTH)
        same(out, {"runs": str(runs), "tokens": tokens, "batch": given.batch, "commit": code})

        def job(cell: Cell, way: str, share: float) -> Job:
            tuned = Tuned(cell, way, share)
            return Job(tuned, runs, out, tokens, given.batch, study.tokens, code)

        pairs = [(head, way) for head in heads for way in WAYS]
        first = {(h, w): [job(finals[h][0], w, s) for s in SHARES] for h, w in pairs}
        make([one for own in first.values() for one in own], given.workers)
        best = {pair: min(own, key=chosen).tuned.share for pair, own in first.items()}
        final = {(h, w): [job(cell, w, best[h, w]) for cell in finals[h]] for h, w in pairs}
        make([one for own in final.values() for one in own], given.workers)
        picked: dict[tuple[str, str], list[Path]] = {}
        for head in heads:
            picked[head, "before"] = [runs / cell.name for cell in finals[head]]
            for way in WAYS:
                picked[head, way] = [one.tuned.folder(out) for one in final[head, way]]
        shares = ", ".join(f"{head} {way} {share:g}" for (head, way), share in best.items())
        say(f"At commit {code}; {tokens:,} tokens; shares of the learning rate: {shares}\n")
        table(runs, k, picked, out)
        return 0

    return exit_code(begin)


if __name__ == "__main__":
    sys.exit(main())
