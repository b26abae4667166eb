"""Is there a run in this folder, and whose is it? Locks are tried by real processes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kanllama_lightning.runs.checkpoints import outdated, seal
from kanllama_lightning.runs.seals import written
from kanllama_lightning.runs.state import Kind, clear, look, states
from kanllama_lightning.storage.files import replacing, write_text
from kanllama_lightning.storage.lock import LOCK, RunLock, confirm_mine, holder_of
from kanllama_lightning.types import InputError

HOLD = """
import sys
from pathlib import Path
from kanllama_lightning.storage.lock import RunLock
RunLock.take(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


def checkpoint(folder: Path, step: int, sealed: bool = True) -> Path:
    path = folder / "checkpoints" / f"step={step:09d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"state")
    if sealed:
        seal(path, [written(path)])
    return path


def finish(folder: Path, tokens: int = 640, steps: int = 10) -> None:
    (folder / "head").mkdir(exist_ok=True)
    (folder / "head" / "head.json").touch()
    summary = {"finished": True, "tokens": tokens, "steps": steps}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, "subprocess.Popen[str]"]]:
    """A folder that another process has."""
    folder = tmp_path / "run"
    folder.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "taken\n"
        yield folder, process
        process.kill()


# ---------------------------------------------------------------------------- locks


def test_a_folder_in_use_is_refused_by_whom_and_free_once_that_was_killed(held) -> None:
    folder, process = held
    assert look(folder).kind == Kind.IN_USE
    said = f"in use by process {process.pid} on {socket.gethostname()} since 20"
    with pytest.raises(InputError, match=said):
        RunLock.take(folder)
    process.kill()
    process.wait()
    assert (folder / LOCK).exists()
    assert holder_of(folder) is None
    lock = RunLock.take(folder)
    assert lock.was_left
    lock.release()
    assert not (folder / LOCK).exists()


def test_a_lock_of_another_machine_has_to_be_deleted_by_hand(tmp_path: Path) -> None:
    said = {"pid": 12, "host": "another-machine", "since": "2026-01-01 00:00:00"}
    (tmp_path / LOCK).write_text(json.dumps(said))
    assert look(tmp_path).kind == Kind.IN_USE
    with pytest.raises(InputError, match=r"process 12 on another-machine.*or delete .*run\.lock"):
        RunLock.take(tmp_path)
    (tmp_path / LOCK).unlink()
    RunLock.take(tmp_path).release()


def test_an_empty_lock_is_one_that_was_left(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    assert look(tmp_path).kind == Kind.FRESH
    RunLock.take(tmp_path).release()


def test_a_lock_that_is_deleted_is_put_back(tmp_path: Path) -> None:
    lock = RunLock.take(tmp_path)
    (tmp_path / LOCK).unlink()
    confirm_mine(tmp_path)
    assert (tmp_path / LOCK).exists()
    assert not lock.lost
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_goes_away_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = RunLock.take(folder)
    confirm_mine(folder)
    folder.rename(tmp_path / "moved")
    folder.mkdir()  # and something else stands in its place
    try:
        with pytest.raises(InputError, match="deleted, moved or replaced.*--ckpt_path NEW_FOLDER"):
            confirm_mine(folder)
    finally:
        lock.release()
    assert (tmp_path / "moved" / LOCK).exists(), "not ours to take away any more"


# ------------------------------------------------------------------- what is in it


def test_nothing(tmp_path: Path) -> None:
    assert look(tmp_path / "none").kind == Kind.FRESH
    assert look(tmp_path).kind == Kind.FRESH
    (tmp_path / "notes.txt").touch()
    (tmp_path / "config.yaml").touch()  # anybody's
    state = look(tmp_path)
    assert (state.kind, state.left) == (Kind.FOREIGN, ("config.yaml", "notes.txt"))


def test_killed_in_the_first_checkpoint_is_debris_and_only_that_is_cleared(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5, sealed=False)
    (tmp_path / "checkpoints" / "step=000000005.rank0.safetensors.tmp").touch()
    for name in ("config.yaml", "wandb_id", "l0.csv", "config.yaml.tmp", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "kan" / "baselines" / "untrained").mkdir(parents=True)
    (tmp_path / "kan" / "config.yaml").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "l0.csv").touch()
    state = look(tmp_path)
    assert state.kind == Kind.DEBRIS
    clear(state)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"notes.txt", "data", "data/l0.csv"}


def test_saved_stopped_extended_finished(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    assert (look(tmp_path).kind, look(tmp_path).step) == (Kind.RESUMABLE, 10)
    finish(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"tokens": 640}}))
    assert look(tmp_path).kind == Kind.FINISHED
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"tokens": 900}}))
    assert look(tmp_path).kind == Kind.RESUMABLE, "an extension was begun"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"tokens": 640}}))
    checkpoint(tmp_path, 12)
    assert look(tmp_path).kind == Kind.RESUMABLE, "it has been further than its summary"


def test_a_finished_run_whose_head_is_gone_is_not_finished(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    finish(tmp_path)
    (tmp_path / "head" / "head.json").unlink()
    assert look(tmp_path).kind == Kind.RESUMABLE


@pytest.mark.parametrize(
    "what", ["head/head.json", "heads/tokens=1/head.json", "kan/head/head.json"]
)
def test_results_are_never_debris(tmp_path: Path, what: str) -> None:
    checkpoint(tmp_path, 5, sealed=False)
    (tmp_path / what).parent.mkdir(parents=True)
    (tmp_path / what).touch()
    if what.startswith("kan"):
        (tmp_path / "kan" / "config.yaml").touch()
    assert look(tmp_path).kind == Kind.DAMAGED


def test_a_sealed_checkpoint_that_is_torn_is_never_debris(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5).write_bytes(b"")
    assert look(tmp_path).kind == Kind.DAMAGED


def test_a_neighbour_that_cannot_be_read_is_named(tmp_path: Path, caplog) -> None:
    checkpoint(tmp_path / "good", 5)
    checkpoint(tmp_path / "bad", 5)
    (tmp_path / "bad" / "summary.json").write_text('{"finished": tr')
    assert [state.folder.name for state in states(tmp_path)] == ["good"]
    assert f"{tmp_path / 'bad'} is left out" in caplog.text


def test_checkpoints_of_a_future_that_was_given_up_go(tmp_path: Path) -> None:
    for step in (10, 20, 25, 30, 40):
        newest = checkpoint(tmp_path, step)
    newest = tmp_path / "checkpoints" / "step=000000025.ckpt"
    steps = [path.stem[-2:] for path in outdated(tmp_path, newest, keep=2)]
    assert steps == ["30", "40", "10"]


# ------------------------------------------------------------------- whole or not at all


def test_a_file_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            with replacing(tmp_path / "a") as part:
                save_file({"a": zeros(1)}, part)
            write_text(tmp_path / "b", "b")
        finally:
            os.umask(before)
        assert [(tmp_path / n).stat().st_mode & 0o777 for n in "ab"] == [mode, mode]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")

    def write() -> None:
        with replacing(tmp_path / "a") as part:
            part.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
