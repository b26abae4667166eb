"""The other projects that benchmarks compare with, in a virtual environment of their own.

    .venv/bin/python benchmarks/peers.py

Makes `.peers/` beside the project (2.3 GB, about two minutes) and says as JSON what is in it. What
they share with this project (torch and the like) has the versions of constraints.txt. A peer that
cannot be installed or imported is left out with a note; nothing fails. Benchmarks that need peers
call `ensure` themselves.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".peers"
PYTHON = VENV / "bin" / "python"
RECORD = VENV / "peers.json"

PEERS = {
    "sae_lens": "sae-lens==6.54.12",
    "dictionary_learning": "dictionary-learning==0.1.0",
    "sparsify": "eai-sparsify==1.3.3",
}
"""Module to import: what to install."""
SHARED = ("torch", "transformers", "datasets", "numpy", "jaxtyping", "safetensors", "pyarrow")
"""Our versions of these: jaxtyping and safetensors so that our heads can be imported there too."""


class Peers(NamedTuple):
    """What there is to compare with."""

    python: str | None
    """The interpreter of `.peers`, if it could be made."""
    versions: dict[str, str]
    """Version of each peer that can be imported, and of torch."""
    notes: list[str]
    """Why the others are left out."""


def pins(constraints: str) -> list[str]:
    """The lines of constraints.txt for SHARED, without markers."""
    lines = (line.split(";")[0].strip() for line in constraints.splitlines())
    return [line for line in lines if line.split("==")[0] in SHARED]


def ensure() -> Peers:
    """The peers, installed if they are not; made once for each set of pins."""
    wanted = [*pins((ROOT / "constraints.txt").read_text()), *PEERS.values()]
    if RECORD.is_file():
        record = json.loads(RECORD.read_text())
        if record["wanted"] == wanted:
            return Peers(str(PYTHON), record["versions"], record["notes"])
    versions, notes = install(wanted[: -len(PEERS)])
    if not versions:
        return Peers(None, {}, notes)
    record = {"wanted": wanted, "versions": versions, "notes": notes}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return Peers(str(PYTHON), versions, notes)


def install(shared: list[str]) -> tuple[dict[str, str], list[str]]:
    """Versions of what can be imported afterwards, and notes about what cannot."""
    sys.stderr.write(f"making {VENV} (once, minutes)\n")
    made = run([sys.executable, "-m", "venv", str(VENV)]) or pip("install", *shared)
    if made:
        return {}, [f"no peers: {VENV} could not be made: {made}"]
    versions, notes = {"torch": version("torch")}, []
    for module, package in PEERS.items():
        failed = pip("install", package, *shared)
        # a peer pulls it in, built for another torch, and then transformers cannot be imported
        pip("uninstall", "-y", "torchvision")
        failed = failed or run([str(PYTHON), "-c", f"import {module}"])
        if failed:
            notes.append(f"{package} left out: {failed}")
        else:
            versions[module] = version(package.split("==")[0])
    return versions, notes


def pip(*args: str) -> str:
    """Runs pip in `.peers`; what went wrong, or nothing."""
    return run([str(PYTHON), "-m", "pip", "-q", *args])


def version(package: str) -> str:
    """Version of an installed package of `.peers`."""
    ask = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run(
        [str(PYTHON), "-c", ask], capture_output=True, text=True, check=True
    ).stdout.strip()


def run(command: list[str]) -> str:
    """Runs a command; the last line of its errors if it failed, else nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        return str(e)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]


def enter(peers: Peers) -> None:
    """Go on in the interpreter of `.peers`, from the start of the script."""
    if peers.python and Path(sys.prefix) != VENV:
        os.execv(peers.python, [peers.python, *sys.argv])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(ensure()._asdict()) + "\n")
