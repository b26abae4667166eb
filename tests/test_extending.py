"""The sections of docs/extending.md on heads, metrics and reports, followed to the letter."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CUT = {
    "model.tokens": 8192,
    "model.sae_batch_tokens": 2048,
    "model.start_tokens": 2048,
    "model.buffer.capacity_tokens": 4096,
    "data.val_tokens": 4096,
    "trainer.logger": "false",
    "trainer.accelerator": "cpu",
}


def written(section: str) -> dict[str, str]:
    """The files that a section of docs/extending.md shows, by their paths."""
    text = (ROOT / "docs" / "extending.md").read_text().partition(f"## {section}\n")[2]
    text = text.partition("\n## ")[0]
    found = re.findall(r"\*\*([\w/.]+)\*\*:\n\n```\w+\n(.*?)```", text, flags=re.DOTALL)
    return dict(found)


@pytest.mark.slow
def test_a_head_a_metric_and_a_report_are_files(tmp_path: Path) -> None:
    files = written("A new head")
    assert len(files) == 2
    files |= written("A new metric") | written("A new report")
    assert len(files) == 4
    tree = tmp_path / "tree"
    for name in (
        "kanllama_lightning",
        "callbacks",
        "configs",
        "train.py",
        "evaluate.py",
        "pyproject.toml",
    ):
        tree.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, tree / name)
    for name, text in files.items():
        assert not (tree / name).exists()
        (tree / name).write_text(text)

    def python(*args: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *args],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    configs = ["--config", "configs/half_topk.yaml", "--config", "configs/embedded.yaml"]
    cut = [f"--{name}={value}" for name, value in CUT.items()]
    metric = "--trainer.callbacks+=kanllama_lightning.callbacks.strongest.Strongest"
    head = ["--model.head.share", "4"]
    python("train.py", "fit", *configs, "--run", "run", *cut, *head, metric)
    said = python(
        "-c",
        "from kanllama_lightning.heads import SAEHead;"
        "head = SAEHead.load('run/head');"
        "print(type(head).__name__, head.share, head.selection.k * 4 == head.target_l0);"
        "import train; train.main(['fit', '--model.head.help', 'HalfTopK'])",
    )
    assert said.splitlines()[0].split() == ["HalfTopK", "4", "True"]
    assert "--model.head.share" in said
    assert "By which target_l0 is divided (default: 2)." in said
    assert "Weight of AuxK" in said
    assert json.loads((tree / "run" / "summary.json").read_text())["val/strongest"] > 0
    assert "--strongest.tokens" in python("evaluate.py", "report", "--help")
    python("evaluate.py", "report", "run", "--reports", "strongest", "--documents", "20")
    rows = (tree / "run" / "eval" / "strongest.csv").read_text().splitlines()
    assert rows[0] == "set,batch,strongest"
    assert float(rows[1].split(",")[2]) > 0
