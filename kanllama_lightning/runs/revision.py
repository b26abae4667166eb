"""Which code made a figure."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commit(root: Path = ROOT) -> str:
    """Short hash of the code's commit, `-dirty` where files differ; empty outside of its git.

    Args:
        root: Folder of the code; what lies in somebody else's repository has no commit.
    """
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
