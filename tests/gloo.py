"""Several processes on the CPU that know each other by gloo, for functions of tests."""

import os
import pydoc
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]


def children(n: int, target: str, args: tuple[Any, ...]) -> None:
    """Fork a child for each rank, so that all is imported once."""
    function: Any = pydoc.locate(target)
    pids = []
    for rank in range(n):
        os.environ["RANK"] = str(rank)
        if not (pid := os.fork()):
            dist.init_process_group("gloo")
            function(*args)
            dist.destroy_process_group()
            return
        pids.append(pid)
    sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(n: int, target: str, *args: Any, timeout: float = 240) -> None:
    """Run a function in n processes that know each other.

    Args:
        n: How many.
        target: Its full name; it is given the arguments, in each process the same.
        args: Plain values.
        timeout: Seconds that they have.
    """
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(n),
        "OMP_NUM_THREADS": "1",
    }
    code = (
        f"import tests.shapes; from tests.gloo import children; children({n}, {target!r}, {args!r})"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=timeout
    )
