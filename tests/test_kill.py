"""Killed at named and at random points and continued, a run is the calm one, bit for bit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kill_harness import N_RANDOM, POINTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_killed_at_named_and_random_points(
    tiny_lm_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_harness", tmp_path / "k", tiny_lm_dir, text_file],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    with capsys.disabled():
        sys.stdout.write(f"\n{done.stdout}")
    assert len(POINTS) >= 30
    n = len(POINTS) + N_RANDOM
    assert re.search(rf"^{n} of {n} end as the calm run", done.stdout, re.M), done.stdout
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_checkpoint_written_in_place_would_be_lost(
    tiny_lm_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """The control: the harness finds out what it is there for."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    folder = str(tmp_path / "k")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_harness", folder, tiny_lm_dir, text_file,
         "second checkpoint: state half", "--in_place"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert re.search(r"^second checkpoint: state half written .*LOST", done.stdout, re.M)
    assert "0 of 1 end as the calm run" in done.stdout
