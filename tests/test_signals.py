"""Signals in every phase of a command: obeyed at once, a clear line, nothing lost, no debris."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kanllama_lightning.console import stopping
from kanllama_lightning.heads import SAEHead
from tests.conftest import SMALL, Fit, only_run, read_rows
from tests.hold import HERE, Forks

ROOT = Path(__file__).resolve().parents[1]
TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.fixture(autouse=True)
def _heeded() -> Iterator[None]:
    """Under nohup, and in a shell's background, signals are ignored from the start."""
    before = {HUP: signal.signal(HUP, signal.SIG_DFL)}
    before[INT] = signal.signal(INT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


NOTHING = "stopped before there was anything to save"
GONE_ON = "everything is saved; the same command with `--ckpt_path last` goes on from here"


def kill_self_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, n: int) -> None:
    """Let this very process get a signal in a function's n-th call."""
    original, calls = getattr(owner, name), [0]

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), n)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, killed)


def same_head(one: Path, other: Path) -> None:
    want, got = (SAEHead.load(folder / "head").state_dict() for folder in (one, other))
    for name, value in want.items():
        assert torch.equal(value, got[name]), name


# ------------------------------------------------------------------ in this process


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    with stopping.listening(), stopping.listening():
        assert all(signal.getsignal(n) is stopping._on_signal for n in stopping.SIGNALS)
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before
    with pytest.raises(stopping.Stopped) as stop, stopping.listening():
        os.kill(os.getpid(), HUP)
    assert stop.value.exit_code == stop.value.code == 129
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before


def test_held_a_signal_is_only_noted(capsys: pytest.CaptureFixture) -> None:
    with stopping.listening():
        stopping.hold("a line")
        os.kill(os.getpid(), TERM)
        assert stopping.asked() == TERM
        stopping.obey()
        stopping.release()
        with pytest.raises(stopping.Stopped):
            stopping.obey()
    assert capsys.readouterr().err == "a line\n"


def test_nohup_is_respected() -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with stopping.listening():
            os.kill(os.getpid(), HUP)
    finally:
        signal.signal(HUP, before)


@pytest.mark.slow
def test_stopped_in_a_validation_and_gone_on(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In the second batch of the second validation: it is made again, and all is as without."""
    from kanllama_lightning.training.module import SAEModule

    given: dict[str, Any] = {"model__tokens": "1920", "trainer__logger": "false"}
    assert fit(**given, runs_dir=str(tmp_path / "undisturbed")) == 0
    (calm,) = (tmp_path / "undisturbed").iterdir()
    with monkeypatch.context() as patch:
        kill_self_at(patch, SAEModule, "validation_step", 4, HUP)
        assert fit(**given) == 129
    assert f"stopped at step 20, {GONE_ON}" in capsys.readouterr().err
    stopped = only_run(tmp_path)
    assert {row["step"] for row in read_rows(stopped / "l0.csv")} == {"10"}
    assert fit("--ckpt_path=last", **given) == 0
    same_head(calm, stopped)
    for table in ("l0.csv", "losses.csv", "lens.csv"):
        assert (calm / table).read_text() == (stopped / table).read_text()


# ------------------------------------------------------------------ real processes


class At(NamedTuple):
    """A place to stop at."""

    place: str
    call: int
    says: str
    left: bool
    """Whether there is a run to go on with."""
    more: tuple[str, ...] = ()


CALLBACKS = "kanllama_lightning.callbacks"
MODULE = "kanllama_lightning.training.module:SAEModule"
PLACES = {
    "imports": At("", 0, NOTHING, False),
    "model": At("kanllama_lightning.lm.frozen:FrozenLM.load_", 1, NOTHING, False),
    "text": At("kanllama_lightning.data.vocabulary:TextEncoder.first_rows", 1, NOTHING, False),
    "pre-flight": At("kanllama_lightning.training.module:preflight", 1, NOTHING, False),
    "start statistics": At("kanllama_lightning.lm.frozen:FrozenLM.acts", 2, NOTHING, False),
    "filling the buffer": At(
        "kanllama_lightning.data.buffer:ShuffleBuffer.push_", 2, NOTHING, False
    ),
    "cache": At(
        "kanllama_lightning.data.shards:ActivationCache.write_", 2, "holds 1,024", False, ("cache",)
    ),
    "training": At(
        "kanllama_lightning.training.head_trainer:HeadTrainer.step", 5, f"step 5, {GONE_ON}", True
    ),
    "calibration": At(f"{MODULE}.sample", 1, f"step 10, {GONE_ON}", True),
    "validation": At(f"{MODULE}.validation_step", 2, f"step 10, {GONE_ON}", True),
    "a CSV row": At("kanllama_lightning.runs.folder:Table.put", 2, f"step 10, {GONE_ON}", True),
    "final validation": At(f"{MODULE}.validation_step", 6, f"step 20, {GONE_ON}", True),
    "controls": At(
        "kanllama_lightning.callbacks.baselines:Baselines._add", 1, f"step 20, {GONE_ON}", True
    ),
    "saving the head": At(
        "kanllama_lightning.callbacks.save_head:SaveHead._provenance", 1, "step 20", True
    ),
}
SIGNALS = dict(zip(PLACES, [INT, TERM, HUP] * len(PLACES), strict=False))


@pytest.fixture(scope="module")
def command(tiny_lm_dir: Path, text_file: Path) -> Callable[..., list[str]]:
    """Arguments of a run in a folder."""

    def make(folder: Path) -> list[str]:
        given = SMALL | {
            "lm.name": tiny_lm_dir, "data.train": text_file, "run": folder,
            "runs_dir": folder.parent, "model.tokens": 20 * 64,
        }  # fmt: skip
        return ["train.py", "fit", *(f"--{key}={value}" for key, value in given.items())]

    return make


def heed() -> None:
    """Let signals count that a child of nohup, or of a shell's background, would ignore too."""
    for number in (HUP, INT):
        signal.signal(number, signal.SIG_DFL)


def start(args: list[str], at: At | None = None) -> subprocess.Popen[str]:
    held = ["-m", "tests.hold", at.place, str(at.call)] if at and at.place else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.Popen(
        [sys.executable, *held, *args], cwd=ROOT, env=environment, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        preexec_fn=heed,
    )  # fmt: skip


def listens(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (HUP - 1) & 1)


def stop_at_once(args: list[str], number: int) -> tuple[int, str]:
    """Exit code and what was said of a command that gets a signal while it loads its libraries."""
    with start(args) as process:
        assert process.stderr is not None
        while not listens(process.pid):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(number)
        began = time.monotonic()
        said = process.stderr.read()
    assert time.monotonic() - began < 60
    return process.returncode, said


def stop_at(forks: Forks, args: list[str], at: At, number: int, tmp_path: Path) -> tuple[int, str]:
    """Exit code and what was said of a command that gets a signal at a place."""
    process = forks.start(args, tmp_path / "log", at.place, at.call)
    while HERE not in process.said():
        assert process.running(), process.said()
        time.sleep(0.01)
    process.kill(number)
    began = time.monotonic()
    code = process.wait()
    assert time.monotonic() - began < 60
    return code, process.said().rpartition(HERE)[2]


@pytest.mark.slow
@pytest.mark.parametrize("phase", PLACES)
def test_every_phase_of_a_run(
    phase: str, command: Callable[..., list[str]], forks: Forks, tmp_path: Path
) -> None:
    at, folder = PLACES[phase], tmp_path / "runs" / "run"
    more = [f"--data.{name}={tmp_path / name}" for name in at.more]
    args = [*command(folder), *more]
    if at.place:
        code, said = stop_at(forks, args, at, SIGNALS[phase], tmp_path)
    else:
        code, said = stop_at_once(args, SIGNALS[phase])
    assert code == 128 + SIGNALS[phase], said
    assert at.says in said.splitlines()[-1], said
    assert "Traceback" not in said
    assert folder.exists() == at.left, list(folder.rglob("*"))
    if not at.left:
        return
    process = forks.start([*command(folder), "--ckpt_path=last"], tmp_path / "log")
    assert process.wait() == 0, process.said()
    steps = [row["step"] for row in read_rows(folder / "l0.csv")]
    assert steps == ["10", "10", "20", "20"]
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(command: Callable[..., list[str]], tmp_path: Path) -> None:

    with start(command(tmp_path / "run"), PLACES["training"]) as process:
        assert process.stderr is not None
        while HERE not in process.stderr.readline():
            pass
        process.send_signal(TERM)
        assert "once more: at once" in process.stderr.readline()
        process.send_signal(INT)
        said = process.stderr.read()

    if process.returncode == 130:  # else it had saved before the second one came
        assert "left at once, without saving" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "kanllama_lightning.reports.one_pass:preflight",
        "kanllama_lightning.reports.losses_report:LossesReport.observe",
        "kanllama_lightning.reports.losses_report:LossesReport.finish",
    ],
)
def test_every_phase_of_a_record(
    place: str, run_folder: Path, forks: Forks, tmp_path: Path
) -> None:
    args = ["evaluate.py", "report", str(run_folder), "--documents", "19", "--wandb", "false"]
    args += ["--reports", "sparsity", "losses", "--losses.resamples", "50", "--lm.untrained=true"]
    code, said = stop_at(forks, args, At(place, 1, "", True), TERM, tmp_path)
    assert code == 143, said
    assert said.splitlines()[-1].startswith("stopped; finished reports are kept")
    assert "Traceback" not in said
    process = forks.start(args, tmp_path / "log")
    assert process.wait() == 0, process.said()
    assert (run_folder / "eval" / "losses.csv").is_file()
