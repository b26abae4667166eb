"""Kills one small run at named and at random points, goes on, and compares with a calm run.

    python -m tests.kill_harness FOLDER LM TEXT [PART OF A NAME] [--in_place]

Everything is imported once; each run is a fork that SIGKILL takes, in the middle of what is
named: an audit hook sees files being opened, renamed and removed, a profile function sees calls.
After each kill the same command is given again, as docs/runs.md says: with `--ckpt_path last`,
or, where that says that there is nothing to go on from, without. The exit code is 0 if all end as
the calm run did, and none began anew that had a whole checkpoint. With `--in_place`, a control,
checkpoints are written as they must not be: into their places, after the ones before them are taken
away.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import tests.shapes  # noqa: F401  # comes before what it is to check
from kanllama_lightning.callbacks.checkpoint import RunCheckpoint
from kanllama_lightning.cli import evaluate_command as evaluate
from kanllama_lightning.cli import train_command
from kanllama_lightning.runs import saving as writing
from kanllama_lightning.runs.checkpoints import remove
from kanllama_lightning.runs.seals import checkpoints
from kanllama_lightning.storage.files import SummedFile
from kanllama_lightning.training.head_trainer import HeadTrainer
from tests.conftest import ALONE, SMALL, side_by_side_config
from tests.hold import import_everything

STEPS, BATCH, SAVED, VALIDATED = 24, 64, 5, 8
HEADS = {"linear": {"class_path": "BatchTopK"}, "kan": {"class_path": "KANEncoder"}}
AT_ONCE = 2
N_RANDOM = 10
LIMIT_S = 300
TIMES = ("seconds", "tokens_per_second", "time/")
LAST = f"step={STEPS:09d}"


class Point(NamedTuple):
    """Where a run is killed: just before what is described happens for the n-th time."""

    name: str
    event: str
    """`open`, `os.rename`, `os.remove` (of a path that ends so), `call` (`file.py:function`),
    `write` (the n-th piece of a file), `steps` (n steps of heads later, the file half written)."""
    what: str
    n: int = 1
    kind: str = "fit"
    """Which command: `fit`, `logged` (with W&B), `cached` (with `--data.cache`), `report`."""


def saving(which: str, step: int) -> list[Point]:
    stem = f"step={step:09d}"
    return [
        Point(f"{which}: buffer written", "open", f"{stem}.rank0.safetensors.tmp"),
        Point(f"{which}: buffer half written", "write", f"{stem}.rank0.safetensors", 3),
        Point(f"{which}: state half written", "write", f"{stem}.ckpt", 20),
        Point(f"{which}: half, steps later", "steps", f"{stem}.ckpt", 5),
        Point(f"{which}: buffer renamed", "os.rename", f"{stem}.rank0.safetensors"),
        Point(f"{which}: state renamed", "os.rename", f"{stem}.ckpt"),
        Point(f"{which}: seal renamed", "os.rename", f"{stem}.json"),
    ]


POINTS = [
    Point("run folder taken", "open", "run.lock"),
    Point("configuration of the run", "os.rename", "run/config.yaml"),
    Point("configuration of a head", "os.rename", "kan/config.yaml"),
    Point("sessions", "os.rename", "sessions.json"),
    Point("pre-flight", "call", "preflight.py:preflight"),
    Point("start statistics", "call", "module.py:start_"),
    Point("buffer half full", "call", "buffer.py:push_", 3),
    Point("untrained head", "os.rename", "kan/baselines/untrained/head.safetensors"),
    *saving("first checkpoint", SAVED),
    *saving("second checkpoint", 2 * SAVED),
    Point("old checkpoint: seal removed", "os.remove", f"step={SAVED:09d}.json"),
    Point("old checkpoint: state removed", "os.remove", f"step={SAVED:09d}.ckpt"),
    Point("first rows of l0.csv", "os.rename", "linear/l0.csv"),
    Point("later rows of losses.csv", "os.rename", "kan/losses.csv", 2),
    Point("rows of curves.csv", "os.rename", "kan/curves.csv", 2),
    Point("last step", "call", "module.py:on_train_batch_end", STEPS),
    Point("last checkpoint: state renamed", "os.rename", f"{LAST}.ckpt"),
    Point("last checkpoint: seal renamed", "os.rename", f"{LAST}.json"),
    Point("final validation", "call", "cli/fit.py:after_fit"),
    Point("final calibration", "call", "selections.py:calibrate_", 2 * (STEPS // VALIDATED) + 2),
    Point("controls", "call", "baselines.py:_add", 2),
    Point("final rows of l0.csv", "os.rename", "kan/l0.csv", STEPS // VALIDATED + 1),
    Point("page of curves", "os.rename", "kan/curves.html"),
    Point("head: weights", "os.rename", "kan/head/head.safetensors"),
    Point("head: card", "os.rename", "kan/head/head.json"),
    Point("summary of a head", "os.rename", "kan/summary.json"),
    Point("summary of the run", "os.rename", "run/summary.json"),
    Point("run folder given back", "os.remove", "run.lock"),
    Point("W&B id", "os.rename", "wandb_id", kind="logged"),
    Point("cache: shard", "os.rename", ".bf16", 2, kind="cached"),
    Point("cache: list of shards", "os.rename", "manifest.json", 2, kind="cached"),
    Point("report: table", "os.rename", "eval/l0.csv", kind="report"),
    Point("report: summary", "os.rename", "eval/summary.json", kind="report"),
]


class Case(NamedTuple):
    """One kill, and what came of it."""

    name: str
    kind: str
    killed: bool
    after: str
    """What the run went on from, as it said."""
    wrong: str
    """What differs from the calm run; empty if nothing does."""


def kill_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm_writing(point: Point) -> None:
    """Let this process be killed while a file is half written."""
    put, step, left, half = SummedFile._put, HeadTrainer.step, [point.n], [False]

    def putting(self: SummedFile, part: memoryview) -> None:
        if point.what in self._path.name:
            left[0] -= point.event == "write"
            if left[0] == 0:
                self._file.flush()
                kill_now()
            if point.event == "steps" and self.size:
                half[0] = True
                threading.Event().wait()  # until the kill
        put(self, part)

    def stepping(*args: Any) -> Any:
        left[0] -= half[0] and point.event == "steps"
        if left[0] < 0:
            kill_now()
        return step(*args)

    SummedFile._put, HeadTrainer.step = putting, stepping  # type: ignore[method-assign]


def write_in_place() -> None:
    """Let checkpoints be written as they must not be."""
    job = RunCheckpoint._job

    def at_once(self: RunCheckpoint, trainer: Any, module: Any, path: Path, files: Any) -> Any:
        for other in checkpoints(path.parent.parent):
            remove(other)
        return job(self, trainer, module, path, files)

    RunCheckpoint._job = at_once  # type: ignore[method-assign]
    writing.replacing = contextlib.nullcontext  # type: ignore[assignment]


def arm(point: Point) -> None:
    """Let this process be killed at a point."""
    if point.event in ("write", "steps"):
        arm_writing(point)
        return
    left = [point.n]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            kill_now()

    if point.event == "call":
        file, _, function = point.what.partition(":")

        def profile(frame: FrameType, event: str, _: Any) -> None:
            code = frame.f_code
            if event == "call" and code.co_name == function and code.co_filename.endswith(file):
                count()

        sys.setprofile(profile)
        return

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == point.event:
            path = args[1] if event == "os.rename" else args[0]
            if isinstance(path, str | os.PathLike) and os.fspath(path).endswith(point.what):
                count()

    sys.addaudithook(hook)


class Harness:
    """Commands in a folder, and how a calm run of each ends."""

    def __init__(self, folder: Path, lm: Path, text: Path) -> None:
        self.folder, self.lm, self.text = folder, lm, text
        folder.mkdir(parents=True, exist_ok=True)
        often = {"class_path": "kanllama_lightning.callbacks.checkpoint.RunCheckpoint"}
        often["init_args"] = {"every_n_steps": SAVED, "keep": 1}
        curves = {
            "class_path": "kanllama_lightning.callbacks.kan_curves.KANCurves",
            "init_args": {"top": 2},
        }
        self.config = side_by_side_config(folder, HEADS, trainer={"callbacks": [often, curves]})

    def command(self, kind: str, where: Path) -> tuple[Callable[[list[str]], int], list[str]]:
        """What is called, and with which arguments."""
        if kind == "report":
            given = ["report", str(where / "run"), "--reports", "sparsity", "losses"]
            return evaluate.main, [*given, "--documents", "8", "--wandb", "false"]
        args = SMALL | ALONE | {
            "lm.name": self.lm, "data.train": self.text, "run": where / "run",
            "model.tokens": STEPS * BATCH, "trainer.val_check_interval": VALIDATED,
            "data.val_tokens": 256, "trainer.logger": None if kind == "logged" else "false",
            "data.cache": where / "cache" if kind == "cached" else None,
        }  # fmt: skip
        return train_command.main, [
            "fit",
            self.config,
            *(f"--{k}={v}" for k, v in args.items() if v),
        ]

    def fork(self, kind: str, where: Path, *extra: str, point: Point | None = None) -> int:
        """Begin a command in a process of its own; its output goes to `log`."""
        where.mkdir(exist_ok=True)
        main, args = self.command(kind, where)
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            out = os.open(where / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(out, f"$ {kind} {' '.join(extra)}\n".encode())
            os.dup2(out, 1)
            os.dup2(out, 2)
            signal.alarm(LIMIT_S)
            if point is not None:
                arm(point)
            code = main([*args, *extra])
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def calm(self, kind: str) -> Path:
        """Where a command has run without a kill."""
        return self.folder / ("calm-fit" if kind == "report" else f"calm-{kind}")

    def case(self, name: str, kind: str, point: Point | None, after_s: float) -> Case:
        """Kill, go on, compare."""
        where = self.folder / "".join(c if c.isalnum() else "-" for c in name)
        if kind == "report":
            shutil.copytree(self.calm(kind), where)
            for record in [*where.glob("run/eval"), *where.glob("run/*/eval")]:
                shutil.rmtree(record)
            (where / "log").unlink()
        pid = self.fork(kind, where, point=point)
        if point is None:
            time.sleep(after_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        again = () if kind == "report" else ("--ckpt_path=last",)
        code = os.waitstatus_to_exitcode(os.waitpid(self.fork(kind, where, *again), 0)[1])
        said = (where / "log").read_text(errors="replace").rpartition("$ ")[2]
        after = next(
            (
                line
                for line in said.splitlines()
                if "continuing from" in line or "left to do" in line
            ),
            "the same command",
        )
        after = after.rpartition("/")[2] if "continuing" in after else after
        if code == 2 and "leave --ckpt_path out" in said:
            code = os.waitstatus_to_exitcode(os.waitpid(self.fork(kind, where), 0)[1])
            said = (where / "log").read_text(errors="replace").rpartition("$ ")[2]
            cleared = "cleared away" in said
            after = "afresh, leftovers named and cleared" if cleared else "afresh, nothing was left"
        wrong = f"exit code {code}" if code else self.differences(kind, where)
        if "Traceback" in (where / "log").read_text(errors="replace"):
            wrong = f"traceback; {wrong}"
        if not wrong:
            shutil.rmtree(where)
        return Case(name, kind, killed, after.removeprefix("run folder ")[-60:], wrong)

    def differences(self, kind: str, where: Path) -> str:
        """What does not end as in the calm run."""
        calm = self.calm(kind)
        want, got = contents(calm, kind), contents(where, kind)
        names = [n for n in sorted(want.keys() | got.keys()) if want.get(n) != got.get(n)]
        return ", ".join(names)


def contents(where: Path, kind: str) -> dict[str, Any]:
    """What a run leaves that is the same each time, by file."""
    found: dict[str, Any] = {}
    for path in sorted(where.rglob("*")):
        name = str(path.relative_to(where))
        if (
            "wandb" in name
            or name == "log"
            or path.is_dir()
            or (kind != "report" and "eval/" in name)
        ):
            continue
        if path.name == "summary.json":
            values = json.loads(path.read_text())
            found[name] = {k: v for k, v in values.items() if not any(t in k for t in TIMES)}
        elif path.suffix in (".csv", ".safetensors", ".bf16", ".yaml") or path.name == "head.json":
            text = path.read_bytes()
            found[name] = text.replace(str(where).encode(), b"WHERE")
        elif "eval/" not in name:
            found[name] = None  # that it is there
    return found


def main(folder: Path, lm: Path, text: Path, part: str, in_place: bool = False) -> int:
    """Kill at every point whose name holds `part`; print a table; the exit code."""
    torch.set_num_threads(1)
    import_everything()
    if in_place:
        write_in_place()
    harness = Harness(folder, lm, text)
    began = time.perf_counter()
    kinds = dict.fromkeys(p.kind for p in POINTS if part in p.name and p.kind != "report")
    seconds = {}
    for kind in dict.fromkeys(["fit", *kinds]):
        at = time.perf_counter()
        _, status = os.waitpid(harness.fork(kind, harness.calm(kind)), 0)
        seconds[kind] = time.perf_counter() - at
        assert status == 0, (harness.calm(kind) / "log").read_text()
    _, status = os.waitpid(harness.fork("report", harness.calm("fit")), 0)
    assert status == 0, (harness.calm("fit") / "log").read_text()
    draw = random.Random()
    jobs = [(p.name, p.kind, p, 0.0) for p in POINTS if part in p.name]
    for i in range(N_RANDOM if not part or part == "random" else 0):
        after_s = draw.uniform(0, seconds["fit"])
        jobs.append((f"random {i + 1}: after {after_s:.2f} s", "fit", None, after_s))
    running: dict[int, Path] = {}
    cases: list[Case] = []
    waiting = list(jobs)
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            job, result = waiting.pop(0), folder / f"case-{len(waiting)}.json"
            pid = os.fork()
            if pid == 0:
                try:
                    result.write_text(json.dumps(harness.case(*job)))
                finally:
                    os._exit(0)
            running[pid] = result
        pid, _ = os.wait()
        cases.append(Case(*json.loads(running.pop(pid).read_text())))
    order = {job[0]: i for i, job in enumerate(jobs)}
    good = 0
    for case in sorted(cases, key=lambda case: order[case.name]):
        missed = not case.killed and not case.name.startswith("random")
        whole = f"step={SAVED:09d}.ckpt"
        lost = case.name.startswith("second checkpoint") and case.after != whole
        fine = not case.wrong and not missed and not lost
        good += fine
        result = "identical" if fine else "NOT REACHED" if missed else f"DIFFERS: {case.wrong}"
        result = f"LOST: {whole}, which was whole" if lost and not case.wrong else result
        sys.stdout.write(f"{case.name:<36} {case.kind:<7} {case.after:<60} {result}\n")
    passed = time.perf_counter() - began
    sys.stdout.write(f"{good} of {len(cases)} end as the calm run ({passed:.0f} s)\n")
    return int(good < len(cases))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("lm", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("part", nargs="?", default="")
    parser.add_argument("--in_place", action="store_true")
    given = parser.parse_args()
    folder = given.folder.resolve()
    sys.exit(main(folder, given.lm, given.text, given.part, given.in_place))
