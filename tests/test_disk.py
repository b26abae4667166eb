"""A disk that is full: one line that names the place and the way on, and nothing whole is lost."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from kanllama_lightning.console.entry import disk_trouble
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.runs.checkpoints import newest_whole
from kanllama_lightning.runs.folder import Table
from kanllama_lightning.training.head_trainer import HeadTrainer
from tests.conftest import Fit, read_rows

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of 12 MiB, or of as many as a test says."""
    size = getattr(request, "param", 12) * MIB
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        for size in (MIB, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def filling_at(
    monkeypatch: pytest.MonkeyPatch, disk: Path, owner: Any, name: str, call: int
) -> None:
    """Fill the disk before the n-th call of a function."""
    original, calls = getattr(owner, name), [0]

    def filled(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            fill(disk)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, filled)


def one_line(capsys: pytest.CaptureFixture, code: int, *words: str) -> str:
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2, said
    assert "Traceback" not in said
    assert len(errors) == 1, said
    for word in words:
        assert word in errors[0], said
    return errors[0]


# step 1: nothing is saved yet; the CSV row of the first validation is the first write
@pytest.mark.parametrize(
    ("place", "call", "goes_on"),
    [
        ((HeadTrainer, "step"), 2, False),
        ((HeadTrainer, "step"), 15, False),
        ((SAEHead, "save"), 1, False),  # the untrained head
        ((SAEHead, "save"), 2, True),  # the trained one, behind the last checkpoint
    ],
    ids=["first step", "later step", "untrained head", "trained head"],
)
@pytest.mark.parametrize("logger", ["false", None], ids=["alone", "with W&B"])
@pytest.mark.slow
def test_filled_in_a_run(
    fit: Fit, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture, place: tuple[Any, str], call: int, goes_on: bool,
    logger: str | None,
) -> None:  # fmt: skip
    run = disk / "run"
    given: dict[str, Any] = {"trainer__logger": logger, "model__tokens": "1280"}
    with monkeypatch.context() as patch:
        filling_at(patch, disk, *place, call)
        code = fit(run=str(run), **given)
    line = one_line(capsys, code, str(run), "the disk is full", "make room")
    assert not list(disk.rglob("*.tmp"))
    assert (newest_whole(run) is not None) == goes_on
    assert (f"--ckpt_path {run}" in line) == goes_on
    (disk / "filler").unlink()
    if not goes_on:
        return
    assert fit(f"--ckpt_path={run}", **given) == 0
    assert fit(run=str(tmp_path / "calm"), **given | {"trainer__logger": "false"}) == 0
    for table in ("l0.csv", "losses.csv"):
        assert read_rows(run / table) == read_rows(tmp_path / "calm" / table)
    want, got = (SAEHead.load(f / "head").state_dict() for f in (tmp_path / "calm", run))
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_it(
    fit: Fit, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    from tests.test_bounds import with_checkpoints

    run = disk / "run"
    config = with_checkpoints(tmp_path / "often.yaml", every_n_steps=5)
    given: dict[str, Any] = {"trainer__logger": "false", "model__tokens": "1280"}
    with monkeypatch.context() as patch:
        filling_at(patch, disk, HeadTrainer, "step", 8)
        # rows still go into the page that the file has
        patch.setattr(Table, "put", lambda *_: None)
        code = fit(config, run=str(run), **given)
    line = one_line(capsys, code, "the disk is full")
    assert "goes on from step=000000005.ckpt, which is whole" in line
    left = {path.name.split(".")[0] for path in (run / "checkpoints").iterdir()}
    assert left == {"step=000000005"}
    (disk / "filler").unlink()
    assert fit(config, f"--ckpt_path={run}", **given) == 0


def test_too_small_from_the_beginning(fit: Fit, disk: Path, capsys: pytest.CaptureFixture) -> None:
    fill(disk)
    with (disk / "filler").open("r+b") as file:
        file.truncate(12 * MIB - 65_536)
    line = one_line(capsys, fit(run=str(disk / "run"), trainer__logger="false"))
    assert "the run needs" in line
    assert "KiB are free" in line
    assert " 0.0 " not in line.split("choose")[0]
    assert not (disk / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("disk", [32], indirect=True)  # a page with plotly.js is 4.6 MiB
def test_filled_in_a_record(
    fit: Fit, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from kanllama_lightning.cli.evaluate_command import main
    from kanllama_lightning.reports.losses_report import LossesReport

    run = disk / "run"
    assert fit(run=str(run), model__tokens="640") == 0
    capsys.readouterr()
    args = ["report", str(run), "--documents", "19", "--reports", "sparsity", "losses"]
    args += ["--losses.resamples", "50", "--lm.untrained", "true"]
    with monkeypatch.context() as patch:
        filling_at(patch, disk, LossesReport, "finish", 1)
        code = main(args)
    one_line(capsys, code, str(run), "the disk is full", "finished reports are kept")
    assert not list(run.rglob("*.tmp"))
    (disk / "filler").unlink()
    wandb.teardown()  # as the end of the command's process does
    code = main(args)
    assert code == 0, capsys.readouterr().err
    assert len(list(run.rglob("losses.html"))) == 1


# ------------------------------------------------------------------------------ by itself


def chained(inner: BaseException) -> BaseException:
    try:
        try:
            raise inner
        except BaseException as e:
            raise RuntimeError("saving failed") from e
    except RuntimeError as e:
        return e


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left", "RUN/l0.csv"), "RUN: l0.csv: cannot be written"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "RUN/l0.csv"), "the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system", "RUN/x"), "the disk can only be read"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), "/etc/x: cannot be used"),
        (OSError(errno.ENOSPC, "No space left on device"), "RUN: cannot be written"),
        (chained(OSError(errno.ENOSPC, "No space", "RUN/a/b")), "a/b: cannot be written"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)  # fmt: skip
def test_errors_of_the_disk_are_known(error: BaseException, says: str, tmp_path: Path) -> None:
    if isinstance(error, OSError) and error.filename:
        error.filename = str(error.filename).replace("RUN", str(tmp_path))
    inner = error.__cause__
    if isinstance(inner, OSError):
        inner.filename = str(inner.filename).replace("RUN", str(tmp_path))
    said = disk_trouble(error, tmp_path)
    assert said is not None
    assert says.replace("RUN", str(tmp_path)) in said


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError(errno.ENOENT, "No such file", "x"), MemoryError(),
              RuntimeError("file write failed")])  # fmt: skip
def test_other_errors_are_not(error: BaseException, tmp_path: Path) -> None:
    assert disk_trouble(error, tmp_path) is None


def test_a_folder_that_may_not_be_written(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    one_line(capsys, fit(run=str(tmp_path / "closed" / "run")), "closed")
