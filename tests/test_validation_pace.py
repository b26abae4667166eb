"""How often a run is validated where nobody says so, and that training does not depend on it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kanllama_lightning.callbacks import validation_pace
from kanllama_lightning.callbacks.validation_pace import ValidationPace
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.runs.time_share import TimeShare
from tests.conftest import Fit, read_rows, terminate_at

STEPS = 40
GIVEN: dict[str, Any] = {
    "trainer__val_check_interval": None,
    "trainer__logger": "false",
    "model__tokens": str(STEPS * 64),
}


def validated(run: Path) -> list[int]:
    return sorted({int(row["step"]) for row in read_rows(run / "l0.csv")})


def answers(monkeypatch: pytest.MonkeyPatch, *said: bool) -> list[float]:
    """Let the clock say these things one after the other; the prices that it was asked about."""
    left, asked = list(said), []

    def affords(_: TimeShare, seconds: float) -> bool:
        asked.append(seconds)
        return left.pop(0)

    monkeypatch.setattr(validation_pace.TimeShare, "affords", affords)
    return asked


def same_head(one: Path, other: Path) -> bool:
    want, got = (SAEHead.load(folder / "head").state_dict() for folder in (one, other))
    return all(torch.equal(want[name], got[name]) for name in want)


def test_a_share_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    share = TimeShare(0.05)
    share.begin()
    assert not share.affords(1.0)
    now[0] += 19.0
    assert share.affords(1.0), "1 of 20"
    assert not share.affords(1.001)
    share.add(1.0)
    share.add_later(0.5)
    assert (share.spent, share.dearest) == (1.5, 1.5)
    share.add(0.25)
    assert share.dearest == 1.5
    now[0] += 31.0
    assert share.taken() == pytest.approx(1.75 / 50)
    again = TimeShare(0.05)
    again.load_(share.state())
    again.begin()
    now[0] += 10.0
    assert (again.passed(), again.spent, again.dearest) == (60.0, 1.75, 1.5)
    assert not share.affords(float("nan"))


def test_what_is_too_dear_is_left_out_and_training_is_the_same(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the run apart, the one that the final one follows at once never."""
    with monkeypatch.context() as patch:
        asked = answers(patch, False, True, True, *[False] * 5, True)
        assert fit(run=str(tmp_path / "paced"), **GIVEN) == 0
    assert validated(tmp_path / "paced") == [8, 12, 36, STEPS]
    assert len(asked) == 9
    assert all(seconds > 0 for seconds in asked)
    looked = {row["step"] for row in read_rows(tmp_path / "paced" / "lens.csv")}
    assert looked == {str(STEPS)}, "what has no price is left to the final one"
    told = GIVEN | {"trainer__val_check_interval": "10"}
    assert fit(run=str(tmp_path / "told"), **told) == 0
    assert validated(tmp_path / "told") == [10, 20, 30, STEPS]
    assert same_head(tmp_path / "paced", tmp_path / "told")


@pytest.mark.parametrize("stop", [4, 5, 8, 9])
def test_gone_on_with_around_a_validation_that_was_left_out(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    with monkeypatch.context() as patch:
        answers(patch, False, True, *[False] * 7)
        assert fit(run=str(tmp_path / "calm"), **GIVEN) == 0
    with monkeypatch.context() as patch:
        answers(patch, False, True, *[False] * 7)
        terminate_at(patch, stop)
        run = tmp_path / "stopped"
        assert fit(run=str(run), **GIVEN) == 143
        assert fit(f"--ckpt_path={run}", **GIVEN) == 0
    assert same_head(tmp_path / "calm", run)
    assert (run / "l0.csv").read_text() == (tmp_path / "calm" / "l0.csv").read_text()


def test_the_first_is_priced_before_it_is_made(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The price is near what one takes, and none is made that a run this short cannot pay for."""
    asked = answers(monkeypatch, True, *[False] * 8)
    took: list[float] = []
    count = ValidationPace._count

    def noted(self: ValidationPace) -> None:
        before = self.share.spent
        count(self)
        took.extend([self.share.spent - before] * (self.share.spent > before))

    monkeypatch.setattr(ValidationPace, "_count", noted)
    assert fit(run=str(tmp_path / "run"), **GIVEN) == 0
    assert len(took) == 1
    assert 0 < asked[0] < 100 * took[0]
    assert asked[1] == max(took[0], asked[0]), "later ones by the dearest so far"


def test_a_validation_that_is_due_after_the_first_step_has_a_price(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answers(monkeypatch, *[False] * 3)
    few = {"model__tokens": str(4 * 64)}
    assert fit(run=str(tmp_path / "run"), **GIVEN | few) == 0
    assert len(asked) == 3
    assert all(seconds > 0 for seconds in asked)
    assert validated(tmp_path / "run") == [4]
