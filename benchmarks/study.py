"""The whole study of docs/answer.md, cell by cell, with one command.

    .venv/bin/python benchmarks/study.py --model FOLDER --text FILE --out runs/study
    .venv/bin/python benchmarks/study.py --model FOLDER --text FILE --out runs/study --only decoders

FOLDER is stories260K in Hugging Face format, FILE text with a JSON object per line; neither is part
of the project. The parts smollm2 and smollm2_early are of the model that `make smollm2` fetches.
Each part is a study of compare_heads.py, encoders.py, finetune.py or compare_smollm2.py with the
settings of the plan in LOG.md; its table is written beside its cells, under the name of the part.
What is there is not made again: the same command goes on where it was stopped. At the end stands
what each part took.

`--small` does the same in minutes, with few tokens, two seeds and two heads: it shows that
everything runs and repeats, and says nothing of heads.
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.compare_heads import exit_code  # noqa: E402
from kanllama_lightning.types import InputError  # noqa: E402

L0 = ("--l0", "8", "16", "32")
PARTS: dict[str, tuple[str, ...]] = {
    "stories": L0,
    "decoders": L0,
    "replication": (),
    "decay": (),
    "planes": (),
    "ladder": (),
    "truth": (),
    "graded": (),
    "finetune": (),
    "smollm2": (),
    "smollm2_early": (),
}
"""Each with what it is given beside the settings of its own."""
OF_ENCODERS = ("ladder", "truth", "graded")
OF_SMOLLM2 = ("smollm2", "smollm2_early")
AT_ONCE = (*OF_ENCODERS, "finetune")
"""Those of one command, which trains and tabulates."""
CELLS = {**dict.fromkeys(OF_ENCODERS, "*.json"), "finetune": "*/*/cell.json"}
"""Where those keep their cells that do not as compare_heads.py does."""
SMALL_PARTS = ("stories", "ladder", "truth")
SMALL = {
    "stories": ("--tokens", "8192", "--d_sae", "48", "--l0", "4", "--seeds", "0", "1")
    + ("--heads", "batch_topk", "mlp", "--rivals", "batch_topk", "mlp"),
    "ladder": ("--tokens", "4096", "--rows", "4096", "--report_rows", "512"),
    "truth": ("--tokens", "4096", "--rows", "4096", "--seeds", "2"),
}
"""What a part is given in the place of that with --small."""


def command(given: argparse.Namespace, part: str, what: str) -> list[str]:
    """What makes a part: `train` or `table` of compare_heads.py, or encoders.py."""
    own = [*(SMALL[part] if given.small else PARTS[part])]
    shared = ["--out", str(given.out), "--workers", str(given.workers)]
    if part in OF_ENCODERS:
        runs = ["--runs", *map(str, teachers(given.out))] if part == "ladder" else []
        return [str(ROOT / "benchmarks/encoders.py"), part, *runs, *own, *shared]
    dirty = ["--dirty"] if given.dirty else []
    if part == "finetune":
        runs, out = str(given.out / "stories"), str(given.out / "finetune")
        program = str(ROOT / "benchmarks/finetune.py")
        return [program, "--runs", runs, *own, *shared[2:], "--out", out, *dirty]
    if part in OF_SMOLLM2:
        program = str(ROOT / "benchmarks/compare_smollm2.py")
        return [program, what, part, "--out", str(given.out), *dirty]
    named = ["--model", given.model, "--text", given.text]
    named += ["--hook_point", given.hook_point] if given.hook_point else []
    also = ["--also", *given.also] if given.also else []
    first = [str(ROOT / "benchmarks/compare_heads.py"), what, part]
    return [*first, *named, *own, *also, *shared, *dirty]


def teachers(out: Path) -> list[Path]:
    """The cells whose dictionaries the ladder holds fixed: `batch_topk`, at its learning rate.

    Raises:
        InputError: They are not there yet.
    """
    table = out / "stories/table.csv"
    if not table.is_file():
        raise InputError(f"--only ladder: {table} is not there; make the part stories first")
    with table.open(newline="") as file:
        row = next(r for r in csv.DictReader(file) if r["head"] == "batch_topk")
    seeds = json.loads((out / "stories/study.json").read_text())["seeds"]
    name = f"batch_topk-l0_{row['target_l0']}-lr_{float(row['lr']):g}"
    return [out / f"stories/{name}-seed_{seed}" for seed in seeds]


def make(given: argparse.Namespace, part: str) -> None:
    """Train what is missing of a part, and write its table.

    Raises:
        InputError: A command of it ended with an error, which it has said.
    """
    steps = ["table"] if part in AT_ONCE else ["train", "table"]
    for what in steps:
        args = command(given, part, what)
        shown = shlex.join(["python", *args])
        sys.stdout.write(f"{shown}\n")
        sys.stdout.flush()
        whole = what == "table"
        done = subprocess.run([sys.executable, *args], text=True, stdout=whole and -1 or None)
        if done.returncode:
            raise InputError(
                f"part {part} ended with exit code {done.returncode} (see above); what is "
                "finished is kept, and the same command goes on from it"
            )
        if whole:
            page = given.out / f"{part}.md"
            page.with_suffix(".tmp").write_text(done.stdout, encoding="utf-8")
            page.with_suffix(".tmp").replace(page)
            sys.stdout.write(f"{done.stdout}\n{page}\n")


def seconds(out: Path, part: str) -> float:
    """What the cells of a part took, added up, however often it was stopped."""
    found = (out / part).glob(CELLS.get(part, "*/cell.json"))
    cells = [json.loads(path.read_text()) for path in found]
    return sum(cell.get("seconds", 0.0) for cell in cells)


def main(args: Sequence[str] | None = None) -> int:
    """Make the parts in order; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="folder of the LM")
    add("--text", required=True, help="file of text, a JSON object per line")
    add("--hook_point", help="where activations are read, if not where the studies say")
    add("--out", type=Path, default=Path("runs/study"), help="folder, made if it is missing")
    add("--only", nargs="+", choices=list(PARTS), help="these parts alone")
    add("--small", action="store_true", help="few tokens: it shows that it runs")
    add("--workers", type=int, default=2, help="cells that run beside each other")
    add("--also", nargs="+", help="further settings of train.py for every cell, NAME=VALUE")
    add("--dirty", action="store_true", help="train though files differ from the commit")
    given = parser.parse_args(args)
    given.out = given.out.resolve()
    parts = given.only or (SMALL_PARTS if given.small else list(PARTS))

    def work() -> int:
        if given.small and (other := [part for part in parts if part not in SMALL_PARTS]):
            raise InputError(
                f"--only {' '.join(other)}: with --small there are {', '.join(SMALL_PARTS)}"
            )
        for part in parts:
            make(given, part)
        for part in parts:
            sys.stdout.write(f"{part}: {seconds(given.out, part) / 60:.0f} min of one core\n")
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
