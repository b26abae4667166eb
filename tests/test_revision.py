"""The commit beside a figure."""

import subprocess
from pathlib import Path

from kanllama_lightning.runs.revision import commit


def git(folder: Path, *args: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *own, *args], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    file = tmp_path / "code.py"
    file.write_text("a = 1\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "Begin")
    short = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit(tmp_path) == short
    file.write_text("a = 2\n")
    assert commit(tmp_path) == f"{short}-dirty"


def test_code_inside_another_repository_has_none(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert commit(inside) == ""
