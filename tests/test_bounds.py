"""No endless loop over text without a usable row; checkpoints by the clock; long phases show."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kanllama_lightning.callbacks.checkpoint import RunCheckpoint
from kanllama_lightning.console import phase
from kanllama_lightning.console.phase import Phase
from kanllama_lightning.training.drought import Drought
from kanllama_lightning.types import InputError
from tests.conftest import Fit, only_run

EMPTY = {
    "unknown words alone": ["zzz qqq zzz"] * 60,
    "special tokens alone": ["<eos> <bos>"] * 60,
    "one document of them": ["zzz " * 400],
    "blanks": ["   \n "] * 60,
}


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("kind", EMPTY)
def test_text_without_a_token_ends_with_an_error(
    fit: Fit, kind: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = jsonl(tmp_path / "train.jsonl", EMPTY[kind])
    given = {"data__train": str(train), "data__val_fraction": "0", "trainer__logger": "false"}
    began = time.monotonic()
    assert fit(f"--data.val=[{text_file}]", **given, data__val=None) == 2
    assert time.monotonic() - began < 60
    said = capsys.readouterr().err
    assert "train" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "runs").glob("*")), "no debris"


@pytest.mark.parametrize("how", ["--data.cache={}/cache", "--data.workers=1"])
def test_so_it_does_in_a_cache_and_in_the_background(
    fit: Fit, how: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = jsonl(tmp_path / "train.jsonl", EMPTY["unknown words alone"])
    given = {"data__train": str(train), "data__val_fraction": "0", "trainer__logger": "false"}
    assert fit(f"--data.val=[{text_file}]", how.format(tmp_path), **given, data__val=None) == 2
    said = capsys.readouterr().err
    assert "train" in said.splitlines()[-1]
    assert "special tokens" in said.splitlines()[-1]


def test_nothing_but_sinks(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All rows are longer than the limit: here it is set to 0 behind the start statistics."""

    def shrink(*about: Any) -> None:
        about[2].head.norm_limit.zero_()

    monkeypatch.setattr(RunCheckpoint, "on_head_started", shrink)
    assert fit(trainer__logger="false") == 2
    assert "longer than the sink limit" in capsys.readouterr().err


def test_a_drought_is_a_whole_pass() -> None:
    def at(*place: int) -> torch.Tensor:
        return torch.tensor(place)

    drought = Drought()
    drought.check(8, 0, at(0, 3, 40))
    drought.check(8, 0, at(0, 9, 40))
    drought.check(8, 0, at(1, 3, 39))
    with pytest.raises(InputError, match="all 32 are longer"):
        drought.check(8, 0, at(1, 3, 40))
    drought = Drought()
    drought.check(0, 0, at(0, 3, 40))
    drought.check(9, 1, at(1, 3, 0))  # one usable row, and a new pass is waited for
    drought.check(0, 0, at(1, 4, 0))
    drought.check(0, 0, at(2, 3, 0))
    with pytest.raises(InputError, match="special tokens"):
        drought.check(0, 0, at(5, 0, 0))


def with_checkpoints(path: Path, **args: Any) -> str:
    callback = {
        "class_path": "kanllama_lightning.callbacks.checkpoint.RunCheckpoint",
        "init_args": args,
    }
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return f"--config={path}"


@pytest.mark.slow
def test_checkpoints_by_the_clock(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = RunCheckpoint.save

    def counted(self: RunCheckpoint, trainer: Any, pl_module: Any) -> None:
        saved.append(trainer.global_step)
        save(self, trainer, pl_module)

    monkeypatch.setattr(RunCheckpoint, "save", counted)
    given = {"model__tokens": "640", "trainer__logger": "false"}
    config = with_checkpoints(tmp_path / "often.yaml", every_n_minutes=1e-9)
    assert fit(config, **given, runs_dir=str(tmp_path / "often")) == 0
    assert saved == list(range(1, 11)), "before each step but the first, and at the end"
    saved.clear()
    config = with_checkpoints(tmp_path / "never.yaml", every_n_minutes=0)
    assert fit(config, **given) == 0
    assert saved == [10]
    names = [p.name for p in sorted((only_run(tmp_path) / "checkpoints").glob("*.ckpt"))]
    assert names == ["step=000000010.ckpt"]


@pytest.mark.parametrize(
    "wrong", [{"every_n_minutes": -1}, {"every_n_minutes": float("nan")}, {"keep": 0},
              {"every_n_steps": 0}])  # fmt: skip
def test_checkpoints_that_make_no_sense(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=f"RunCheckpoint.{name}="):
        RunCheckpoint(**wrong)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass for phases."""
    now = [100.0]
    monkeypatch.setattr(phase.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_short_phase_says_nothing(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Phase("reading", 4, "batches") as progress:
        for _ in range(4):
            clock(1.2)
            progress.add()
    assert caplog.text == ""


def test_a_slow_first_batch_says_nothing_of_the_others(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Phase("reading", 61, "batches") as progress:
        clock(190.0)
        progress.add()
        assert caplog.text == ""
        clock(28.0)
        progress.add()
    assert [record.message for record in caplog.records] == [
        "reading: 2 of 61 batches, 28 min left"
    ]


def test_a_long_phase_says_how_far_it_is(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Phase("reading", 10_000, "batches") as progress:
        for _ in range(10_000):
            clock(1.0)
            progress.add()
    lines = [record.message for record in caplog.records]
    assert lines[0] == "reading: 5 of 10,000 batches, 2.8 h left"
    assert 15 <= len(lines) <= 22
    with Phase("quiet", 100, "batches", shown=False) as progress:
        for _ in range(100):
            clock(60.0)
            progress.add()
    assert "quiet" not in caplog.text
