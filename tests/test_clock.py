"""Where the time of a step goes."""

import json
import time
from pathlib import Path

import pytest

from kanllama_lightning.training.clock import PARTS, StepClock


def spend(clock: StepClock, part: str, seconds: float) -> None:
    time.sleep(seconds)
    clock.mark(part)


def test_time_between_marks_belongs_to_the_part_named_at_its_end() -> None:
    clock = StepClock()
    clock.mark("logging")
    spend(clock, "lm", 0.06)
    spend(clock, "head", 0.02)
    found = clock.shares()
    assert set(found) == set(PARTS)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["lm"] > 2 * found["head"] > 0
    assert found["data"] == 0


def test_shares_are_since_the_last_look_and_overall_since_the_start() -> None:
    clock = StepClock()
    clock.mark("logging")
    spend(clock, "lm", 0.03)
    clock.shares()
    spend(clock, "head", 0.03)
    assert clock.shares()["head"] == 1.0
    assert clock.shares() == {}
    assert 0.3 < clock.overall()["lm"] < 0.7


def test_steps_per_second_are_those_since_the_last_look() -> None:
    clock = StepClock()
    clock.mark("logging")
    assert clock.rate() is None
    for _ in range(2):
        spend(clock, "head", 0.02)
        clock.mark("optimizer")
    assert 20 < clock.rate() < 50
    clock.shares()
    assert clock.rate() is None


def test_a_restart_forgets_what_was_between_steps() -> None:
    clock = StepClock()
    clock.mark("logging")
    spend(clock, "lm", 0.02)
    time.sleep(0.05)
    clock.restart()
    clock.mark("head")
    spend(clock, "head", 0.02)
    assert clock.overall()["lm"] > 0.3
    clock.reset()
    assert clock.overall() == {}


@pytest.mark.slow
def test_a_run_says_where_its_time_went(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    shares = {part: summary[f"time/{part}"] for part in PARTS}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(share >= 0 for share in shares.values())
    assert shares["head"] > 0.05
    assert shares["lm"] > 0.005
