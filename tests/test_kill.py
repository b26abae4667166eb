"""Killed with SIGKILL at random steps and continued, a run is the undisturbed one, bit for bit."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from kanllama_lightning.heads import SAEHead
from tests.conftest import ALONE, SMALL, read_rows, side_by_side_config

ROOT = Path(__file__).resolve().parents[1]
KILLS = 5
STEPS, BATCH = 400, 64
HEADS = {
    "batch_topk": {"class_path": "BatchTopK"},
    "kan": {"class_path": "KANEncoder"},
    "gated": {"class_path": "Gated", "lr": 0.003},
}


def command(folder: Path, lm: Path, text: Path, config: str) -> list[str]:
    given = SMALL | ALONE | {
        "lm.name": lm, "data.train": text, "run": folder, "model.tokens": STEPS * BATCH,
        "trainer.val_check_interval": 50, "trainer.logger": "false",
    }  # fmt: skip
    args = [f"--{key}={value}" for key, value in given.items() if value is not None]
    return [sys.executable, "train.py", "fit", config, *args]


@pytest.mark.slow
def test_killed_at_random_steps(tiny_lm_dir: Path, text_file: Path, tmp_path: Path) -> None:
    base = yaml.safe_load((ROOT / "configs" / "base.yaml").read_text())
    callbacks = base["trainer"]["callbacks"]
    callbacks[-1]["init_args"] = {"every_n_steps": 7}
    config = side_by_side_config(tmp_path, HEADS, trainer={"callbacks": callbacks})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    calm = command(tmp_path / "calm", tiny_lm_dir, text_file, config)
    assert subprocess.run(calm, cwd=ROOT, env=environment, capture_output=True).returncode == 0

    folder = tmp_path / "killed"
    args = command(folder, tiny_lm_dir, text_file, config)
    draw, kills, reached = random.Random(os.getpid()), 0, []
    for _ in range(KILLS + 3):
        started = any((folder / "checkpoints").glob("*.json"))
        process = subprocess.Popen(
            args + (["--ckpt_path=last"] if started else []),
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        with process:
            assert process.stderr is not None
            want = draw.randint(1, 3)  # lines of progress
            for line in process.stderr:
                step = re.match(r"step (\d+)/", line)
                want -= bool(step)
                if step and want == 0 and kills < KILLS:
                    time.sleep(draw.uniform(0, 0.25))
                    process.send_signal(signal.SIGKILL)
                    reached.append(int(step[1]))
                    kills += 1
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills >= 5, f"the run was over after {kills} kills"
    assert json.loads((folder / "summary.json").read_text())["finished"]
    for name in HEADS:
        want_state = SAEHead.load(tmp_path / "calm" / name / "head").state_dict()
        got = SAEHead.load(folder / name / "head").state_dict()
        for key, value in want_state.items():
            assert torch.equal(got[key], value), (name, key, reached)
        for table in ("l0.csv", "losses.csv", "lens.csv"):
            calm_rows = read_rows(tmp_path / "calm" / name / table)
            assert read_rows(folder / name / table) == calm_rows, (name, table, reached)
    assert (folder / "kan" / "curves.csv").read_bytes() == (
        tmp_path / "calm" / "kan" / "curves.csv"
    ).read_bytes()
    assert not list(folder.rglob("*.tmp"))
