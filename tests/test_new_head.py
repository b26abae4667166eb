"""The section "A new head" of CONTRIBUTING.md, followed to the letter."""

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
    """The files that a section of CONTRIBUTING.md shows, by their paths."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition(f"## {section}\n")[2]
    text = text.partition("\n## ")[0]
    found = re.findall(r"\*\*([\w/.]+)\*\*:\n\n```\w+\n(.*?)```", text, flags=re.DOTALL)
    return dict(found)


@pytest.mark.slow
def test_a_head_is_a_file_and_a_config(tmp_path: Path) -> None:
    files = written("A new head")
    assert len(files) == 2
    tree = tmp_path / "tree"
    for name in ("kanllama_lightning", "callbacks", "configs", "train.py", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        tree.mkdir(exist_ok=True)
        copy(ROOT / name, tree / name)
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
    python("train.py", "fit", *configs, "--run", "run", *cut, "--model.head.share", "4")
    said = python(
        "-c",
        "from kanllama_lightning.heads import SAEHead;"
        "head = SAEHead.load('run/head');"
        "print(type(head).__name__, head.share, head.selection.k * 4 == head.target_l0);"
        "import train; train.main(['fit', '--model.head.help', 'HalfTopK'])",
    )
    assert said.splitlines()[0].split() == ["HalfTopK", "4", "True"]
    assert "--model.head.share" in said
    assert "By which target_l0 is divided." in said
    assert "Weight of AuxK" in said
