"""What a figure needs beside it: the command, the machine, the versions."""

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import Peers
from kanllama_lightning.runs.revision import commit


def about(benchmark: str, measures: str, threads: int, peers: Peers) -> dict[str, Any]:
    """The head of a result; also told on stderr, before the waiting begins.

    Args:
        benchmark: Name of the script.
        measures: What its figures are, in one line.
        threads: Threads torch may use.
        peers: What is compared with.
    """
    command = shlex.join(["python", *sys.argv])
    for line in (f"{benchmark}: {measures}", command, *peers.notes):
        sys.stderr.write(line + "\n")
    return {
        "benchmark": benchmark,
        "measures": measures,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "threads": threads,
        "peers": peers.versions,
        "notes": peers.notes,
    }


def processor() -> str:
    """Name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
