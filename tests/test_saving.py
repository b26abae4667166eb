"""Checkpoints written beside training: whole or not there, of the step they were taken at."""

import errno
import json
import math
import resource
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kanllama_lightning.callbacks import checkpoint as saver
from kanllama_lightning.callbacks.checkpoint import RunCheckpoint
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.runs import saving
from kanllama_lightning.runs.checkpoints import newest_whole
from kanllama_lightning.runs.saving import Writer, copied, write_state, write_tensors
from kanllama_lightning.runs.seals import written
from kanllama_lightning.storage.files import CHUNK, SummedFile
from kanllama_lightning.training.head_trainer import HeadTrainer
from tests.conftest import Fit, only_run, read_rows, terminate_at
from tests.test_bounds import with_checkpoints
from train import main

# ------------------------------------------------------------------------------- files


def test_the_checksum_is_of_what_is_in_the_file(tmp_path: Path) -> None:
    file = SummedFile(tmp_path / "file")
    parts = [b"", b"abc", bytes(range(256)) * 3, b"\x01" * (CHUNK + 5)]
    assert [file.write(part) for part in parts] == [len(part) for part in parts]
    file.close()
    whole = b"".join(parts)
    assert (tmp_path / "file").read_bytes() == whole
    assert (file.size, file.crc32) == (len(whole), zlib.crc32(whole))


def test_a_disk_that_is_full_is_an_error_of_close() -> None:
    file = SummedFile(Path("/dev/full"))
    assert file.write(b"x" * CHUNK) == CHUNK
    with pytest.raises(OSError, match="No space left") as error:
        file.close()
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/dev/full")
    file = SummedFile(Path("/dev/full"))
    file.write(b"few")  # waits in a buffer
    with pytest.raises(OSError, match="No space left"):
        file.close()


def test_files_are_those_of_the_libraries_and_what_is_said_of_them_is_right(
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "held": torch.randn(7, 3, generator=generator).bfloat16(),
        "half": torch.randn(2, 5, generator=generator).half(),
        "none": torch.zeros(0, 3),
        "turned": torch.randn(4, 6, generator=generator).T,
        "generator": generator.get_state(),
    }
    said = write_tensors(tensors, tmp_path / "a.safetensors")
    assert said == written(tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    state = {"weights": tensors, "step": 3, "more": [1.5, ("a", None)]}
    said = write_state(state, tmp_path / "b.ckpt")
    assert said == written(tmp_path / "b.ckpt")
    got = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert all(torch.equal(got["weights"][name], value) for name, value in tensors.items())
    assert (got["step"], got["more"]) == (3, [1.5, ("a", None)])
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.ckpt"}


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may have more than a MiB."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"the one before")
    tensors = {f"t{i}": torch.zeros(1 << 16) for i in range(8)}
    for write in (write_state, write_tensors):
        with pytest.raises(OSError, match="File too large") as error:
            write(tensors, path)
        assert error.value.filename == f"{path}.tmp"
        assert path.read_bytes() == b"the one before"
        assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------- copies


def test_a_copy_does_not_change_any_more() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    state = {"a": [weight, {"b": weight[0]}], "c": (torch.ones(2), 5), "d": "e"}
    copy = copied(state)
    with torch.no_grad():
        weight.zero_()
    state["c"][0].zero_()
    assert copy["a"][0].flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert copy["a"][0].stride() == weight.stride(), "moments lie as weights do"
    assert copy["a"][1]["b"].tolist() == [0, 3]
    assert copy["a"][1]["b"].untyped_storage().nbytes() == 8, "no more than the view"
    assert not copy["a"][0].requires_grad
    assert copy["c"][0].tolist() == [1, 1]
    assert (copy["c"][1], copy["d"]) == (5, "e")


# ------------------------------------------------------------------------------- the thread


def test_a_writer_does_one_thing_at_a_time() -> None:
    writer, gate, order = Writer(), threading.Event(), []

    def first() -> None:
        gate.wait(60)
        order.append("first")

    writer.start(first)
    assert writer.busy
    writer.check()
    threading.Timer(0.05, gate.set).start()
    writer.start(lambda: order.append("second"))  # behind the first
    writer.wait()
    assert order == ["first", "second"]
    assert not writer.busy


def test_an_error_of_the_thread_is_raised_once_here() -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    for ask in ("check", "wait", "start"):
        writer = Writer()
        writer.start(fail)
        while writer.busy:
            time.sleep(0.001)
        with pytest.raises(OSError, match="No space left"):
            writer.start(lambda: None) if ask == "start" else getattr(writer, ask)()
        writer.check()
        writer.wait()


# ------------------------------------------------------------------------------- whole runs

GIVEN: dict[str, Any] = {"model__tokens": "1280", "trainer__logger": "false"}
SAVED, AHEAD = 5, 3


def held_back(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the writer begin with a first state only when training is some steps ahead; the steps."""
    ahead, steps, began = threading.Event(), [0], []
    step, write = HeadTrainer.step, saver.write_state

    def counted(self: HeadTrainer, x: Any, number: int, progress: float) -> Any:
        steps[0] = number
        if number == SAVED + AHEAD:
            ahead.set()
        return step(self, x, number, progress)

    def late(state: dict[str, Any], path: Path) -> Any:
        assert ahead.wait(60)
        began.append(steps[0])
        return write(state, path)

    monkeypatch.setattr(HeadTrainer, "step", counted)
    monkeypatch.setattr(saver, "write_state", late)
    return began


def same_head(one: Path, other: Path) -> bool:
    want, got = (SAEHead.load(folder / "head").state_dict() for folder in (one, other))
    return all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("copies", [True, False], ids=["copied", "not copied"])
def test_what_is_written_is_of_the_step_it_was_taken_at(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: bool
) -> None:
    """Training is steps ahead when the file is made; without a copy it would be of those."""
    config = with_checkpoints(tmp_path / "often.yaml", every_n_steps=SAVED, keep=9)
    with monkeypatch.context() as patch:
        began = held_back(patch)
        if not copies:
            for module in (saver, saving):
                patch.setattr(module, "copied", lambda state: state)
        assert fit(config, **GIVEN) == 0
    assert began[0] >= SAVED + AHEAD
    run = only_run(tmp_path)
    assert fit(config, run=str(tmp_path / "again"), **GIVEN, trainer__max_steps="6") == 0
    again = tmp_path / "again"
    for path in (again / "checkpoints").iterdir():
        path.unlink()
    for path in (run / "checkpoints").glob(f"step={SAVED:09d}.*"):
        path.rename(again / "checkpoints" / path.name)
    assert fit(config, f"--ckpt_path={again}", **GIVEN) == 0
    assert same_head(run, again) == copies


def test_a_signal_waits_for_what_is_being_written(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = with_checkpoints(tmp_path / "often.yaml", every_n_steps=SAVED, keep=9)
    with monkeypatch.context() as patch:
        held_back(patch)
        terminate_at(patch, SAVED + AHEAD + 1)
        assert fit(config, **GIVEN) == 143
    assert f"stopped at step {SAVED + AHEAD + 1}, everything is saved" in capsys.readouterr().err
    names = [
        path.stem for path in sorted(only_run(tmp_path).rglob("*.json")) if "step" in path.stem
    ]
    assert names == [f"step={step:09d}" for step in (SAVED, SAVED + AHEAD + 1)]
    assert not [one for one in threading.enumerate() if one.name == "checkpoint"]


def test_an_error_of_the_thread_ends_the_run(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """At the next step, long before the next checkpoint; the one before is what is gone on from."""
    config = with_checkpoints(tmp_path / "often.yaml", every_n_steps=SAVED)
    write = saver.write_state

    def full(state: dict[str, Any], path: Path) -> Any:
        if path.name == f"step={2 * SAVED:09d}.ckpt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(saver, "write_state", full)
        # without this the thread may end later than the run, which waits for it
        start = Writer.start
        patch.setattr(Writer, "start", lambda self, job: (start(self, job), self._thread.join()))
        assert fit(config, **GIVEN) == 2
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert f"goes on from step={SAVED:09d}.ckpt, which is whole" in said
    run = only_run(tmp_path)
    assert {path.stem.split(".")[0] for path in (run / "checkpoints").iterdir()} == {
        f"step={SAVED:09d}"
    }
    assert fit(config, "--ckpt_path=last", **GIVEN) == 0


def test_what_a_kill_left_is_taken_away_when_the_run_goes_on(fit: Fit, tmp_path: Path) -> None:
    """At another step, it would be neither written again nor outdated."""
    config = with_checkpoints(tmp_path / "often.yaml", every_n_steps=SAVED, keep=9)
    assert fit(config, **GIVEN, trainer__max_steps="6") == 0
    folder = only_run(tmp_path) / "checkpoints"
    left = ["step=000000009.ckpt.tmp", "step=000000009.rank0.safetensors", "step=000000003.ckpt"]
    left.append("step=000000003.json.tmp")
    for name in left:
        (folder / name).touch()
    sealed = {path.name for path in folder.glob("step=00000000[56].*")}
    assert fit(config, "--ckpt_path=last", **GIVEN, trainer__max_steps="8") == 0
    names = {path.name for path in folder.iterdir()}
    assert not names & set(left)
    assert sealed <= names


# ------------------------------------------------------------------------------- how often


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that can be set."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def late(callback: RunCheckpoint, clock: list[float], seconds: float, step: int = 1) -> bool:
    clock[0] = 1000.0 + seconds
    return callback._late(step)


def started(clock: list[float], **args: Any) -> RunCheckpoint:
    clock[0] = 1000.0
    callback = RunCheckpoint(**args)
    callback._saved_at, callback._saved_when = 0, 1000.0
    callback.share.begin()
    return callback


def test_by_default_the_clock_decides_within_a_share(clock: list[float]) -> None:
    callback = started(clock)
    assert not late(callback, clock, 299)
    assert late(callback, clock, 301)
    assert late(callback, clock, 10, step=20_000)
    assert not late(callback, clock, 10, step=19_999)
    callback.share.add(10.0)  # the next one may come when 2 % hold it and twice that at the end
    assert not late(callback, clock, 1479)
    assert late(callback, clock, 1481)
    callback._writer.seconds = 5.0  # that is waited for at the end
    assert not late(callback, clock, 1969)
    assert late(callback, clock, 1971)
    again = started(clock)
    again.load_state_dict(callback.state_dict())
    assert (again.share.spent, again._writer.seconds) == (10.0, 5.0)


def test_what_a_user_says_counts_whatever_it_costs(clock: list[float]) -> None:
    callback = started(clock, every_n_minutes=1)
    callback.share.add(1e9)
    assert not late(callback, clock, 59)
    assert late(callback, clock, 61)
    assert not late(callback, clock, 10, step=20_000)
    assert "1 minutes, whatever they take" in callback._cadence()
    assert not late(started(clock, every_n_minutes=0), clock, 1e9)
    both = started(clock, every_n_steps=7)
    assert both._cadence().startswith("5 minutes or 7 steps, whatever")
    assert late(both, clock, 301)
    assert math.isclose(saver.SHARE, 0.02)


@pytest.mark.slow
def test_the_shares_hold_on_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model, with checkpoints due at any time and small validations.

    A disk that writes 300 MB a second is stood in for by waiting. Written by training itself, and
    as often as they are due, checkpoints take far more than their share; so do validations at
    each tenth step.
    """
    put = SummedFile._put

    def slowly(self: SummedFile, part: memoryview) -> None:
        time.sleep(len(part) / 300e6)
        put(self, part)

    monkeypatch.setattr(SummedFile, "_put", slowly)
    monkeypatch.setattr(saver, "MINUTES", 0.01)
    saves: list[int] = []
    save = RunCheckpoint.save

    def counted(self: RunCheckpoint, trainer: Any, pl_module: Any) -> None:
        saves.append(trainer.global_step)
        save(self, trainer, pl_module)

    monkeypatch.setattr(RunCheckpoint, "save", counted)

    def run(name: str, tokens: str, interval: str) -> tuple[float, float]:
        args = ["--config", "embedded", "--config", "topk", f"--model.tokens={tokens}"]
        args += ["--trainer.logger=false", "--data.val_tokens=2048", f"--run={tmp_path / name}"]
        assert main(["fit", *args, f"--trainer.val_check_interval={interval}"]) == 0
        found = json.loads((tmp_path / name / "summary.json").read_text())
        shares = [
            found[f"seconds_in_{w}"] / found["seconds"] for w in ("checkpoints", "validations")
        ]
        sys.stdout.write(f"{name}: checkpoints {shares[0]:.2%}, validations {shares[1]:.2%}\n")
        return shares[0], shares[1]

    paced = run("paced", "1500K", "null")
    assert len(saves) >= 4
    assert newest_whole(tmp_path / "paced") is not None
    assert len({row["step"] for row in read_rows(tmp_path / "paced" / "l0.csv")}) >= 2
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "start", lambda _, job: job())
        patch.setattr(saver, "SHARE", 2.0)
        wrong = run("as it should not be", "300K", "10")
    assert wrong[0] > 0.04
    assert wrong[1] > 0.075
    assert paced[0] <= 0.02
    assert paced[1] <= 0.05
