"""Is a better encoder worth it? With a dictionary that rests, and on directions that are known.

    .venv/bin/python benchmarks/encoders.py ladder --runs RUN RUN RUN --out runs/encoders
    .venv/bin/python benchmarks/encoders.py truth --out runs/encoders
    .venv/bin/python benchmarks/encoders.py graded --out runs/encoders

`ladder`: the dictionary, b_dec and scale of finished runs of `batch_topk` (one per seed) are held
fixed, and encoders of about the parameters of KANEncoder learn to use them: linear, MLP, KAN, two
unrolled steps (`Unrolled`), and one, which has about the products of the MLP; each with BatchTopK
behind it and from the same start. Orthogonal matching pursuit, which needs no training and sees the
dictionary, is the oracle: once with exactly k latents per token, once with k on average, the
largest gains of all tokens first. Given is the share of the gap between the linear encoder and the
second oracle that each closes.

`truth`: rows are sums of known directions, 512 in 64 dimensions, that fire by a Zipf law, 8 per row
on average, in groups that share some of their chances (`--correlation`); strengths are 1 +- 0.5.
Whole heads are trained on them. Given are MCC, the mean |cosine| of each true direction with the
latent that the best one-to-one matching gives it, and F1 of the matched latents' firing.

`graded`: beside 256 known directions, eight variables whose value runs along a circle or half a
circle. Given is how many latents tell a value, chosen one after the other (`GradedWorld`, `told`).

Each encoder takes the learning rate of a grid, extended at its ends, with the lowest FVU on rows
that nothing else is of, at a seed of its own. Reported rows take no part in anything before. Cells
that are there are not made again. Two cells run at a time, each with one thread.
"""

import argparse
import json
import math
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.table import grid  # noqa: E402
from kanllama_lightning import heads  # noqa: E402
from kanllama_lightning.functional.sparse import Branch  # noqa: E402
from kanllama_lightning.heads.decoders import FrozenDirections  # noqa: E402
from kanllama_lightning.heads.encoders import LinearEncoder  # noqa: E402
from kanllama_lightning.heads.sae import SAE  # noqa: E402
from kanllama_lightning.runs.revision import commit  # noqa: E402
from kanllama_lightning.training.head_trainer import HeadTrainer  # noqa: E402
from kanllama_lightning.training.optim import Adam  # noqa: E402
from kanllama_lightning.training.schedule import Schedule  # noqa: E402
from kanllama_lightning.types import InputError  # noqa: E402

BATCH = 2048
RATES = (6e-3, 1.2e-2, 2.4e-2)
EXTENSIONS = 3
CHOOSING_SEED = 100
"""Seed of the runs that learning rates are chosen by."""
DRAWS = 10_000
SPARE = 3
"""Times k: atoms that the second oracle may spend on one token."""
UNROLLED = {"unrolled": 2, "unrolled once": 1}
"""Steps of the unrolled encoders, by name."""
SWEEPS = 40
"""Passes of coordinate descent after each new atom."""


class Unrolled(LinearEncoder):
    """Steps of iterative hard thresholding, unrolled, each with weights of its own.

    p_0 = (x - b_dec) W_enc + b_enc, p_i = p_(i-1) + (x - b_dec - z_(i-1) D) W_i with z the 2 k
    largest of ReLU(p) of each token and D the dictionary. W_i = 0 at the start.

    Args:
        W: Directions that the encoder starts from, one per latent.
        dictionary: D.
        k: Latents per token that are aimed at.
        steps: How many.
    """

    D: Tensor

    def __init__(
        self,
        W: Float[Tensor, "d_sae d_model"],
        dictionary: Float[Tensor, "d_sae d_model"],
        k: int,
        steps: int = 2,
    ) -> None:
        super().__init__(W)
        self.kept = 2 * k
        self.register_buffer("D", dictionary.clone())
        self.steps = nn.ParameterList([torch.zeros_like(W).T for _ in range(steps)])

    def branches(
        self, x: Float[Tensor, "tok d_model"], b_dec: Float[Tensor, " d_model"]
    ) -> list[Branch]:
        """The linear branch, and what is left after each step."""
        centred = x - b_dec.detach()
        found: list[Branch] = [(centred, self.W_enc)]
        p = centred @ self.W_enc + self.b_enc
        for weight in self.steps:
            best = p.relu().topk(self.kept, dim=1)
            z = torch.zeros_like(p).scatter(1, best.indices, best.values)
            left = centred - z @ self.D
            found.append((left, weight))
            p = p + left @ weight
        return found


class Data(NamedTuple):
    """Rows, and what belongs to each."""

    train: Float[Tensor, "train d_model"]
    choose: Float[Tensor, "choose d_model"]
    report: Float[Tensor, "report d_model"]
    group: Int[Tensor, " report"]
    """Document of each reported row; rows of one are drawn together."""


def train(head: SAE, x: Tensor, tokens: int, lr: float, seed: int) -> None:
    """By the steps of `train.py`, on rows drawn without putting back, pass by pass."""
    schedule = Schedule.of(tokens, BATCH)
    trainer = HeadTrainer("", head, schedule, clip_ratio=5.0)
    wanted = [p for p in head.parameters() if p.requires_grad]
    optimizer = Adam(wanted, lr=lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    order, at = torch.randperm(len(x), generator=generator), 0
    for step in range(schedule.steps):
        if at + BATCH > len(x):
            order, at = torch.randperm(len(x), generator=generator), 0
        rows = x[order[at : at + BATCH]]
        at += BATCH
        optimizer.zero_grad()
        losses, _ = trainer.step(rows, step, step / schedule.steps)
        torch.stack(list(losses.values())).sum().backward()
        head.project_grad_()
        trainer.clip_(None, "norm")
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule.lr_factor(step)
        optimizer.step()
        head.project_()
    head.eval().calibrate_(x[order[: 1 << 16]])


def fvu(head: SAE, x: Tensor) -> float:
    """Of rows, as at inference."""
    e2, _, _ = squares(head, x, torch.zeros(len(x), dtype=torch.int64))
    return float(e2.sum() / (x - x.mean(0)).double().square().sum())


@torch.no_grad()
def squares(
    head: SAE, x: Tensor, group: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " groups"], float, float]:
    """Squared error of each group; L0; share of latents that never fire."""
    n, fired, kept = int(group.max()) + 1, torch.zeros(head.d_sae, dtype=torch.int64), 0.0
    e2 = torch.zeros(n, dtype=torch.float64)
    for rows, own in zip(x.split(8192), group.split(8192), strict=True):
        out = head(rows)
        e2.index_add_(0, own, (rows - out.x_hat).double().square().sum(1))
        fired += out.codes.fired()
        kept += float(out.codes.l0().sum())
    return e2, kept / len(x), float((fired == 0).double().mean())


# ------------------------------------------------------------------------- the oracle


@torch.no_grad()
def pursuit(
    x: Float[Tensor, "n d"], D: Float[Tensor, "d_sae d"], steps: int
) -> Float[Tensor, "n steps"]:
    """Squared error left after each atom of orthogonal matching pursuit with z >= 0.

    The atom with the largest positive product with what is left comes next; then all values so far
    are made best, by coordinate descent on z >= 0.

    Args:
        x: Rows, b_dec taken off.
        D: Atoms of norm 1.
        steps: Atoms per row.
    """
    n = len(x)
    left, chosen = x.clone(), torch.zeros(n, 0, dtype=torch.int64)
    values, errors = x.new_zeros(n, 0), []
    gram = D @ D.T
    for _ in range(steps):
        gain = left @ D.T
        if chosen.shape[1]:
            gain.scatter_(1, chosen, -torch.inf)
        chosen = torch.cat([chosen, gain.argmax(1, keepdim=True)], 1)
        values = torch.cat([values, x.new_zeros(n, 1)], 1)
        target = (x @ D.T).gather(1, chosen)
        inner = gram[chosen[:, :, None], chosen[:, None, :]]
        for _ in range(SWEEPS):
            for i in range(chosen.shape[1]):
                rest = target[:, i] - (inner[:, i] * values).sum(1) + values[:, i]
                values[:, i] = rest.clamp_min(0)
        left = x - torch.einsum("ns,nsd->nd", values, D[chosen])
        errors.append(left.square().sum(1))
    return torch.stack(errors, 1)


def spend(x2: Float[Tensor, " n"], errors: Float[Tensor, "n steps"], k: int) -> Tensor:
    """Squared error of each row with k atoms per row on average, the largest gains first.

    A row takes its atoms in order, each while its gain (made to fall from atom to atom) is above
    one cut-off for all rows.

    Args:
        x2: Squared error of no atom.
        errors: After each atom.
        k: Atoms per row.
    """
    every = torch.cat([x2[:, None], errors], 1)
    gains = (every[:, :-1] - every[:, 1:]).cummin(1).values
    count = min(k * len(x2), gains.numel())
    cut = gains.reshape(-1).kthvalue(gains.numel() - count + 1).values
    taken = (gains >= cut).sum(1)
    return every.gather(1, taken[:, None]).squeeze(1)


# ------------------------------------------------------------------------- heads


def encoder_head(kind: str, d_model: int, d_sae: int, k: int, seed: int) -> SAE:
    """A head by the name of its encoder."""
    shared: dict[str, Any] = {"d_model": d_model, "d_sae": d_sae, "target_l0": k, "seed": seed}
    kinds: dict[str, type[SAE]] = {
        "linear": heads.BatchTopK,
        **dict.fromkeys(UNROLLED, heads.BatchTopK),  # until `fixed_head` gives it its encoder
        "wide": heads.WideBatchTopK,
        "mlp": heads.MLPEncoder,
        "kan": heads.KANEncoder,
        "larger": heads.BatchTopK,
        "bent": heads.BentDictionary,
        "powers": heads.BentDictionary,
        "curved": heads.CurvedDictionary,
        "untrained": heads.BatchTopK,
    }
    shared |= {"larger": {"d_sae": 798}, "powers": {"shape": "powers"}}.get(kind, {})
    return kinds[kind](**shared)


def fixed_head(kind: str, teacher: SAE, seed: int, start: Tensor) -> SAE:
    """An untrained encoder before the dictionary of a trained head, which rests."""
    head = encoder_head(kind, teacher.d_model, teacher.d_sae, teacher.target_l0, seed)
    D = teacher.decoder.first()
    if kind in UNROLLED:
        head.encoder = Unrolled(head.drawn(), D, teacher.target_l0, UNROLLED[kind])
    head.decoder = FrozenDirections(D)
    head.start_(start)
    with torch.no_grad():
        for name in ("scale", "x_variance", "b_dec"):
            getattr(head, name).copy_(getattr(teacher, name))
    head.b_dec.requires_grad_(False)
    return head


# ------------------------------------------------------------------------- cells


class Cell(NamedTuple):
    """One training."""

    kind: str
    seed: int
    lr: float


Make = Callable[[Cell], dict[str, Any]]
"""Trains a cell; its figures, among them `choose`, the FVU on the choosing rows."""
_MAKE: dict[str, Make] = {}


def _begin(what: str, given: Mapping[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _MAKE["cell"] = STUDIES[what][0](given)


def _made(cell: Cell) -> dict[str, Any]:
    began = time.monotonic()
    return _MAKE["cell"](cell) | {"seconds": round(time.monotonic() - began, 1)}


class Cells:
    """Cells in a folder: those that are there are read, others are made.

    Args:
        what: One of `STUDIES`.
        given: What they are made from.
        out: The folder.
        workers: Cells at a time.
    """

    def __init__(self, what: str, given: Mapping[str, Any], out: Path, workers: int) -> None:
        self.out, self.code = out, commit()
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, context, _begin, (what, dict(given)))

    def all(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Their figures, in order."""
        jobs = {}
        for cell in cells:
            if not self._path(cell).is_file():
                jobs[cell] = self.pool.submit(_made, cell)
        for cell, job in jobs.items():
            found = job.result() | {"commit": self.code}
            part = self._path(cell).with_suffix(".tmp")
            part.write_text(json.dumps(found))
            part.replace(self._path(cell))
            said = {k: v for k, v in found.items() if isinstance(v, float)}
            print(*cell, said, file=sys.stderr, flush=True)  # noqa: T201
        return [json.loads(self._path(cell).read_text()) for cell in cells]

    def _path(self, cell: Cell) -> Path:
        return self.out / f"{cell.kind}-seed_{cell.seed}-lr_{cell.lr:g}.json"

    def rates(self, kinds: Sequence[str]) -> dict[str, tuple[float, bool]]:
        """The learning rate of each kind, and whether others were tried on both sides of it."""
        grids = {kind: list(RATES) for kind in kinds}
        best: dict[str, float] = {}
        for turn in range(EXTENSIONS + 1):
            wanted = [Cell(kind, CHOOSING_SEED, lr) for kind in kinds for lr in grids[kind]]
            found = dict(zip(wanted, self.all(wanted), strict=True))
            grown = False
            for kind in kinds:
                values = {c.lr: r["choose"] for c, r in found.items() if c.kind == kind}
                known = {lr: v for lr, v in values.items() if math.isfinite(v)}
                best[kind] = min(known, key=lambda lr: known[lr])
                ends = {min(grids[kind]): 0.5, max(grids[kind]): 2.0}
                if best[kind] in ends and turn < EXTENSIONS:
                    grids[kind].append(best[kind] * ends[best[kind]])
                    grown = True
            if not grown:
                break
        return {k: (lr, min(grids[k]) < lr < max(grids[k])) for k, lr in best.items()}


# ------------------------------------------------------------------------- ladder


def rows_of(run: Path, n_train: int, n_report: int) -> Data:
    """Activations of the text of a cell of compare_heads.py, which has three parts."""
    from kanllama_lightning.corpus import resolve
    from kanllama_lightning.functional.sinks import regular
    from kanllama_lightning.lm.frozen import FrozenLM
    from kanllama_lightning.reports.saved_head import read_subject

    subject, text = read_subject(run), run.parent / "text"
    lm = FrozenLM(**subject.lm_args()).load_()
    data = subject.data(lm.tokenizer)
    if data is None or not text.is_dir():
        raise InputError(f"--runs {run}: is no cell of benchmarks/compare_heads.py")
    found, docs = {}, torch.zeros(0, dtype=torch.int64)
    for name, wanted in (("train", n_train), ("choose", 1 << 16), ("report", n_report)):
        corpus = resolve(str(text / f"{name}.jsonl"))
        corpus.open()
        rows = data.encoder.first_rows(corpus.once(), -(-wanted // data.ctx_len))
        kept, own = [], []
        parts = (t.split(64) for t in (rows.ids, rows.keep, rows.doc))
        for ids, keep, doc in zip(*parts, strict=True):
            acts = lm.acts(ids)
            mask = keep & regular(acts, subject.head.norm_limit)
            kept.append(acts[mask].float())
            own.append(doc[mask])
        found[name], docs = torch.cat(kept), torch.cat(own)
    return Data(**found, group=docs.unique(return_inverse=True)[1])


def ladder_cells(given: Mapping[str, Any]) -> Make:
    """Cells of the ladder: a trained dictionary per seed."""
    from kanllama_lightning.heads import SAEHead

    runs = [Path(run) for run in given["runs"]]
    data = rows_of(runs[0], given["rows"], given["report_rows"])

    def make(cell: Cell) -> dict[str, Any]:
        own = runs[0] if cell.seed == CHOOSING_SEED else runs[cell.seed]
        teacher = SAEHead.load(own / "head").eval()
        assert isinstance(teacher, SAE)
        if cell.kind == "oracle":
            return oracle(teacher, data)
        head = fixed_head(cell.kind, teacher, cell.seed, data.train[: 1 << 16])
        train(head, data.train, given["tokens"], cell.lr, cell.seed)
        e2, l0, dead = squares(head, data.report, data.group)
        size = sum(p.numel() for p in head.encoder.parameters())
        return {"choose": fvu(head, data.choose), "e2": e2.tolist(), "l0": l0, "dead": dead,
                "parameters": size}  # fmt: skip

    return make


def oracle(teacher: SAE, data: Data) -> dict[str, Any]:
    """Both ways of matching pursuit, and the sums that FVU is over, by document."""
    D, k = teacher.decoder.first(), teacher.target_l0
    x = (data.report.float() * teacher.scale - teacher.b_dec).detach()
    steps = [pursuit(rows, D, SPARE * k) for rows in x.split(4096)]
    errors, x2 = torch.cat(steps), x.square().sum(1)
    unit = teacher.scale.square()
    centred = (data.report - data.report.mean(0)).double().square().sum(1)

    def by_document(values: Tensor) -> list[float]:
        n = int(data.group.max()) + 1
        total = torch.zeros(n, dtype=torch.float64)
        return total.index_add_(0, data.group, values.double()).tolist()

    return {"each": by_document(errors[:, k - 1] / unit), "choose": 0.0,
            "mean": by_document(spend(x2, errors, k) / unit),
            "x2": by_document(centred)}  # fmt: skip


def ladder(cells: Cells, seeds: int) -> str:
    """The table of the ladder."""
    kinds = ("linear", "mlp", "kan", *UNROLLED)
    rates = cells.rates(kinds)
    wanted = {k: [Cell(k, s, rates[k][0]) for s in range(seeds)] for k in kinds}
    flat = [cell for own in wanted.values() for cell in own]
    found = dict(zip(flat, cells.all(flat), strict=True))
    oracles = cells.all([Cell("oracle", s, 0.0) for s in range(seeds)])
    e2 = {k: _table([found[c]["e2"] for c in wanted[k]]) for k in kinds}
    e2 |= {f"oracle, {name}": _table([o[name] for o in oracles]) for name in ("each", "mean")}
    x2 = _table([o["x2"] for o in oracles])
    draws = _draws(*x2.shape)
    rows = []
    for name, own in e2.items():
        value, low, high = _interval(own, x2, draws)
        line = [name, f"{value:.4f} ({low:.4f} to {high:.4f})"]
        gap = _closed(own, e2, draws)
        line.append(f"{gap[0]:.1%} ({gap[1]:.1%} to {gap[2]:.1%})")
        if name in wanted:
            cell = [found[c] for c in wanted[name]]
            line += [f"{statistics.fmean(c['l0'] for c in cell):.2f}",
                     f"{cell[0]['parameters']:,}",
                     f"{rates[name][0]:g}{'' if rates[name][1] else ' (edge)'}"]  # fmt: skip
        rows.append(line + [""] * (6 - len(line)))
    for a, b in (("kan", "mlp"), *((x, y) for y in UNROLLED for x in ("kan", "mlp"))):
        value, low, high = _interval(e2[a] - e2[b], x2, draws)
        rows.append([f"{a} minus {b}", f"{value:+.4f} ({low:+.4f} to {high:+.4f})", "", "", "", ""])
    return grid(["encoder", "FVU", "gap closed", "L0", "parameters", "lr"], rows)


def _table(rows: Sequence[Sequence[float]]) -> Float[Tensor, "seed doc"]:
    return torch.tensor(rows, dtype=torch.float64)


def _draws(seeds: int, documents: int) -> list[tuple[Tensor, Tensor]]:
    """Seeds, and how often each document is drawn, of every resample."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(DRAWS):
        drawn = torch.randint(documents, (documents,), generator=generator)
        weight = torch.bincount(drawn, minlength=documents).double()
        found.append((torch.randint(seeds, (seeds,), generator=generator), weight))
    return found


def _interval(
    top: Float[Tensor, "seed doc"], bottom: Float[Tensor, "seed doc"], draws: Sequence[Any]
) -> tuple[float, float, float]:
    """A ratio of sums, and its interval over documents and seeds."""
    return _over(draws, lambda seeds, weight: _ratio(top, bottom, seeds, weight))


def _closed(
    own: Tensor, e2: Mapping[str, Tensor], draws: Sequence[Any]
) -> tuple[float, float, float]:
    """Share of the gap between the linear encoder and the oracle."""
    linear, best = e2["linear"], e2["oracle, mean"]
    return _over(draws, lambda seeds, weight: _ratio(linear - own, linear - best, seeds, weight))


def _ratio(top: Tensor, bottom: Tensor, seeds: Tensor, weight: Tensor) -> float:
    return float((top[seeds] @ weight).sum() / (bottom[seeds] @ weight).sum())


def _over(
    draws: Sequence[tuple[Tensor, Tensor]], value: Callable[[Tensor, Tensor], float]
) -> tuple[float, float, float]:
    seeds, documents = len(draws[0][0]), len(draws[0][1])
    whole = value(torch.arange(seeds), torch.ones(documents, dtype=torch.float64))
    found = torch.tensor([value(*draw) for draw in draws], dtype=torch.float64)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return whole, low, high


# ------------------------------------------------------------------------- truth


class World(NamedTuple):
    """Known directions, and how often each fires."""

    directions: Float[Tensor, "features d_model"]
    p: Float[Tensor, " features"]
    correlation: float

    def rows(
        self, n: int, seed: int
    ) -> tuple[Float[Tensor, "n d_model"], Bool[Tensor, "n features"]]:
        """Rows, and which features fire in each."""
        generator = torch.Generator().manual_seed(seed)
        features = len(self.p)
        alone = torch.rand(n, features, generator=generator)
        shared = torch.rand(n, features // GROUP, generator=generator)
        together = torch.rand(n, features // GROUP, generator=generator) < self.correlation
        u = torch.where(together.repeat_interleave(GROUP, 1), shared.repeat_interleave(GROUP, 1),
                        alone)  # fmt: skip
        fires = u < self.p
        strength = (1 + 0.5 * torch.randn(n, features, generator=generator)).clamp_min(0.1)
        return (fires * strength) @ self.directions, fires


GROUP = 8
"""Features that share their chances, in the order of their frequency."""
D_MODEL, FEATURES, L0 = 64, 512, 8


def world(seed: int, correlation: float) -> World:
    """Unit directions, drawn by a seed; frequencies by a Zipf law, L0 in all."""
    generator = torch.Generator().manual_seed(1000 + seed)
    directions = torch.randn(FEATURES, D_MODEL, generator=generator)
    p = 1 / torch.arange(10, FEATURES + 10).float()
    return World(directions / directions.norm(dim=1, keepdim=True), L0 * p / p.sum(), correlation)


def truth_cells(given: Mapping[str, Any]) -> Make:
    """Cells on known directions: a world per seed."""
    from scipy.optimize import linear_sum_assignment

    def make(cell: Cell) -> dict[str, Any]:
        own = world(cell.seed, given["correlation"])
        x, _ = own.rows(given["rows"], 1)
        choose, _ = own.rows(1 << 15, 2)
        report, fires = own.rows(1 << 16, 3)
        head = encoder_head(cell.kind, D_MODEL, FEATURES, L0, cell.seed)
        head.start_(x[: 1 << 16])
        train(head, x, given["tokens"], cell.lr, cell.seed)
        learned = head.directions(torch.ones(head.d_sae), x[:1])
        cosine = own.directions @ (learned / learned.norm(dim=1, keepdim=True)).T
        which, latents = linear_sum_assignment(-cosine.abs().detach().numpy())
        found = cosine[which, latents].abs().detach()
        with torch.no_grad():
            on = torch.cat(
                [head(part).codes.dense()[:, latents] > 0 for part in report.split(8192)]
            )
        hits = (on & fires).sum(0).double()
        f1 = 2 * hits / (on.sum(0) + fires.sum(0)).clamp_min(1)
        _, l0, dead = squares(head, report, torch.zeros(len(report), dtype=torch.int64))
        size = sum(p.numel() for p in head.parameters())
        return {"choose": fvu(head, choose), "fvu": fvu(head, report), "l0": l0, "dead": dead,
                "mcc": float(found.mean()), "f1": float(f1.mean()),
                "f1_frequent": float(f1[:100].mean()), "parameters": size}  # fmt: skip

    return make


def truth(cells: Cells, seeds: int) -> str:
    """The table of known directions."""
    kinds = ("linear", "wide", "mlp", "kan")
    rates = cells.rates(kinds)
    found = {k: cells.all([Cell(k, s, rates[k][0]) for s in range(seeds)]) for k in kinds}
    rows = []
    for kind, own in found.items():
        line = [kind, f"{own[0]['parameters']:,}"]
        for key in ("l0", "fvu", "mcc", "f1", "f1_frequent", "dead"):
            values = [one[key] for one in own]
            line.append(f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        rows.append([*line, f"{rates[kind][0]:g}{'' if rates[kind][1] else ' (edge)'}"])
    for a, b in (("kan", "linear"), ("mlp", "linear"), ("kan", "mlp"), ("kan", "wide")):
        line = [f"{a} minus {b}", ""]
        for key in ("l0", "fvu", "mcc", "f1", "f1_frequent", "dead"):
            each = [x[key] - y[key] for x, y in zip(found[a], found[b], strict=True)]
            line.append(f"{statistics.fmean(each):+.3f} ({min(each):+.3f} to {max(each):+.3f})")
        rows.append([*line, ""])
    header = ["encoder", "parameters", "L0", "FVU", "MCC", "F1", "F1, 100 most frequent", "dead"]
    return grid([*header, "lr"], rows)


# ------------------------------------------------------------------------- graded


class GradedRows(NamedTuple):
    """Rows, and the graded variables in them."""

    x: Float[Tensor, "n d_model"]
    there: Bool[Tensor, "n variables"]
    angle: Float[Tensor, "n variables"]
    """Of the value, in radians."""


class GradedWorld(NamedTuple):
    """Known directions, and planes in which a value is an angle."""

    plain: World
    planes: Float[Tensor, "variables 2 d_model"]
    span: Float[Tensor, " variables"]
    """Radians that the values of each variable cover: a circle or half of one."""

    def rows(self, n: int, seed: int) -> GradedRows:
        """Rows, with which variables are there and where each is."""
        x, _ = self.plain.rows(n, seed)
        generator = torch.Generator().manual_seed(500 + seed)
        shape = (n, len(self.span))
        there = torch.rand(shape, generator=generator) < THERE
        angle = torch.rand(shape, generator=generator) * self.span
        strength = there * (1 + 0.1 * torch.randn(shape, generator=generator))
        for i, (u, v) in enumerate(self.planes):
            at = angle[:, i, None]
            x += strength[:, i, None] * (at.cos() * u + at.sin() * v)
        return GradedRows(x, there, angle)


VARIABLES, THERE = 8, 0.25
"""Graded variables, the first half on circles, and the share of rows that have each."""
MOST = 16
"""Latents that are chosen at most to tell a value."""
TOLD = 0.9
"""R2 from which on a value counts as told."""
SHOWN = (1, 2, 4, MOST)
"""Numbers of latents whose R2 is shown."""
KNOTS = 4
"""Of the piecewise linear function of a latent, at quantiles of where it fires."""


def graded_world(seed: int) -> GradedWorld:
    """256 directions of which 6 fire, 8 planes of which 2 are there; drawn by a seed."""
    generator = torch.Generator().manual_seed(2000 + seed)
    features = FEATURES // 2
    directions = torch.randn(features, D_MODEL, generator=generator)
    p = 1 / torch.arange(10, features + 10).float()
    plain = World(
        directions / directions.norm(dim=1, keepdim=True),
        (L0 - VARIABLES * THERE) * p / p.sum(),
        0.0,
    )
    planes = torch.linalg.qr(torch.randn(VARIABLES, D_MODEL, 2, generator=generator)).Q.mT
    span = torch.full((VARIABLES,), 2 * math.pi)
    span[VARIABLES // 2 :] = math.pi
    return GradedWorld(plain, planes.contiguous(), span)


@torch.no_grad()
def told(z: Float[Tensor, "n d_sae"], y: Float[Tensor, "n value"]) -> list[float]:
    """R2 of a value by 1, 2, ... latents, on the second half of the rows.

    The first half chooses and fits: the latent whose piecewise linear function explains most of
    what is left comes next, then all of those so far are fitted together (with a little ridge).

    Args:
        z: Latents.
        y: The value; its cosine and sine where it is an angle on a circle.
    """
    half = len(z) // 2
    z = z[:, (z[:half] > 0).double().mean(0) >= 0.01]
    mean = y[:half].mean(0)
    y = (y - mean).double()
    features = []
    for own in z.T.double():
        ends = own[:half][own[:half] > 0].quantile(torch.linspace(0, 1, KNOTS + 2).double()[:-1])
        features.append(torch.stack([(own > 0).double(), *(own - e.abs() for e in ends)], 1))
        features[-1][:, 2:] = features[-1][:, 2:].clamp_min(0)
    if not features:
        return [0.0]
    every = torch.stack(features)
    centre, spread = every[:, :half].mean(1, True), every[:, :half].std(1, keepdim=True)
    every = (every - centre) / spread.clamp_min(1e-9)
    fit, test = every[:, :half], every[:, half:]
    gram = fit.mT @ fit + 1e-3 * half * torch.eye(fit.shape[2], dtype=fit.dtype)
    left, chosen, found = y[:half], [], []
    for _ in range(min(MOST, len(every))):
        inner = fit.mT @ left
        gain = (inner * torch.linalg.solve(gram, inner)).sum((1, 2))
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        both = torch.cat([*fit[chosen]], 1)
        ridge = 1e-3 * half * torch.eye(both.shape[1], dtype=both.dtype)
        weight = torch.linalg.solve(both.T @ both + ridge, both.T @ y[:half])
        left = y[:half] - both @ weight
        error = (y[half:] - torch.cat([*test[chosen]], 1) @ weight).square().sum()
        found.append(1 - float(error / y[half:].square().sum()))
    return found


def read(x: Float[Tensor, "n d_model"], y: Float[Tensor, "n value"]) -> list[float]:
    """R2 of a value by a linear function of all coordinates, fitted on the first half."""
    half, y = len(x) // 2, y - y[: len(x) // 2].mean(0)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    left = y[half:] - x[half:] @ torch.linalg.lstsq(x[:half], y[:half]).solution
    return [1 - float(left.square().sum() / y[half:].square().sum())]


def graded_cells(given: Mapping[str, Any]) -> Make:
    """Cells on known directions and graded variables: a world per seed."""

    def make(cell: Cell) -> dict[str, Any]:
        own = graded_world(cell.seed)
        report = own.rows(1 << 15, 3)

        def values(measure: Callable[[Tensor, Tensor], list[float]], seen: Tensor) -> list[Any]:
            found = []
            for i in range(VARIABLES):
                rows, angle = report.there[:, i], report.angle[:, i, None]
                circle = i < VARIABLES // 2
                value = torch.cat([angle.cos(), angle.sin()], 1) if circle else angle
                found.append(measure(seen[rows], value[rows]))
            return found

        if cell.kind == "read":
            return {"r2": values(read, report.x)}
        x = own.rows(given["rows"], 1).x
        choose = own.rows(1 << 15, 2).x
        head = encoder_head(cell.kind, D_MODEL, FEATURES, L0, cell.seed)
        head.start_(x[: 1 << 16])
        if cell.kind == "untrained":
            head.eval().calibrate_(x[: 1 << 16])
        else:
            train(head, x, given["tokens"], cell.lr, cell.seed)
        with torch.no_grad():
            z = torch.cat([head(part).codes.dense() for part in report.x.split(8192)])
        _, l0, dead = squares(head, report.x, torch.zeros(len(report.x), dtype=torch.int64))
        size = sum(p.numel() for p in head.parameters())
        return {"choose": fvu(head, choose), "fvu": fvu(head, report.x), "l0": l0, "dead": dead,
                "r2": values(told, z), "parameters": size}  # fmt: skip

    return make


def latents_needed(r2: Sequence[float]) -> int:
    """The least number of latents that tell a value; one more than `MOST` where none does."""
    return next((n for n, value in enumerate(r2, 1) if value >= TOLD), MOST + 1)


def graded(cells: Cells, seeds: int) -> str:
    """The table of graded variables."""
    kinds = ("linear", "larger", "kan", "bent", "powers", "curved")
    rates: dict[str, tuple[float, bool]] = {**cells.rates(kinds), "untrained": (0.0, True)}
    found = {
        kind: cells.all([Cell(kind, s, rate) for s in range(seeds)])
        for kind, (rate, _) in rates.items()
    }
    parts = {"circle": slice(0, VARIABLES // 2), "half circle": slice(VARIABLES // 2, None)}
    rows = []
    for kind, own in found.items():
        line = [kind, f"{own[0]['parameters']:,}"]
        for key in ("l0", "fvu", "dead"):
            line.append(f"{statistics.fmean(one[key] for one in own):.3f}")
        for part in parts.values():
            needed = [[latents_needed(r2) for r2 in one["r2"][part]] for one in own]
            worlds = ", ".join(f"{statistics.median(n):g}" for n in needed)
            line.append(f"{statistics.median(sum(needed, [])):g} ({worlds})")
            every = [r2 for one in own for r2 in one["r2"][part]]
            line += [f"{statistics.fmean(r2[min(n, len(r2)) - 1] for r2 in every):.2f}"
                     for n in SHOWN]  # fmt: skip
        rows.append([*line, f"{rates[kind][0]:g}{'' if rates[kind][1] else ' (edge)'}"])
    header = ["head", "parameters", "L0", "FVU", "dead"]
    for which in parts:
        header += [f"latents needed, {which}", *(f"R2 of {n}" for n in SHOWN)]
    linear = [r2[0] for one in cells.all([Cell("read", s, 0.0) for s in range(seeds)])
              for r2 in one["r2"]]  # fmt: skip
    said = (
        f"Latents needed for R2 {TOLD:g}: median (of each world); {MOST + 1}: more than {MOST}. "
        f"A linear function of all coordinates: R2 {statistics.fmean(linear):.2f} "
        f"({min(linear):.2f} to {max(linear):.2f}).\n\n"
    )
    return said + grid([*header, "lr"], rows)


STUDIES: dict[str, tuple[Callable[[Mapping[str, Any]], Make], Callable[[Cells, int], str]]] = {
    "ladder": (ladder_cells, ladder),
    "truth": (truth_cells, truth),
    "graded": (graded_cells, graded),
}
"""What makes the cells of each, and its table."""


def main(args: Sequence[str] | None = None) -> int:
    """Train what is missing, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=list(STUDIES))
    add("--runs", nargs="+", default=[], help="finished cells of batch_topk, one per seed")
    add("--out", type=Path, default=Path("runs/encoders"), help="folder of the cells")
    add("--tokens", type=int, default=1_000_000, help="rows that each cell is trained on")
    add("--rows", type=int, default=1_000_000, help="different rows among them")
    add("--report_rows", type=int, default=50_000, help="rows that the ladder reports")
    add("--seeds", type=int, default=3, help="of `truth` and `graded`; the ladder has one per run")
    add("--correlation", type=float, default=0.3, help="how much groups of features share")
    add("--workers", type=int, default=2, help="cells at a time")
    given = parser.parse_args(args)
    seeds = given.seeds
    if given.what == "ladder":
        seeds = len(given.runs)
        if not given.runs or not all((Path(run) / "head").is_dir() for run in given.runs):
            raise InputError(f"--runs {given.runs}: give finished cells of compare_heads.py")
    if not 0 <= given.correlation <= 1:
        raise InputError(f"--correlation={given.correlation}: must be from 0 to 1")
    about = {k: v for k, v in vars(given).items() if k not in ("out", "workers", "what")}
    out = given.out / given.what
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "about.json"
    if kept.is_file() and json.loads(kept.read_text()) != json.loads(json.dumps(about)):
        raise InputError(f"--out {out}: was begun with {kept.read_text()}; give another folder")
    if not kept.is_file():
        kept.write_text(json.dumps(about))
    cells = Cells(given.what, about, out, given.workers)
    try:
        print(STUDIES[given.what][1](cells, seeds))  # noqa: T201
    finally:
        cells.pool.shutdown(cancel_futures=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
