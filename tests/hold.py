"""Runs a command in a real process that waits at a named place, until a signal comes.

    python -m tests.hold MODULE:CLASS.FUNCTION CALL train.py fit ...
    python -m tests.hold

The second imports everything once and then forks for every command that it reads; `Forks` is the
other side of it.
"""

import gc
import importlib
import json
import os
import pydoc
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

HERE = "@@here"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
SECONDS = 60.0


def wait_at(place: str, call: int) -> None:
    """Let a function wait for a signal before its n-th call; once it came, it goes on."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), [0]

    def waiting(*args: Any, **kwargs: Any) -> Any:
        from kanllama_lightning.console import stopping

        calls[0] += 1
        if calls[0] == call:
            sys.stderr.write(f"{HERE}\n")
            sys.stderr.flush()
            end = time.monotonic() + SECONDS
            while stopping.asked() is None and time.monotonic() < end:
                time.sleep(0.02)
        return original(*args, **kwargs)

    setattr(owner, name, waiting)


class Fork:
    """A command in a process of its own."""

    def __init__(self, pid: int, log: Path, ask: Callable[..., Any]) -> None:
        self.pid, self.log, self._ask = pid, log, ask

    def said(self) -> str:
        """What it wrote to stderr up to now."""
        return self.log.read_text()

    def running(self) -> bool:
        """Whether it has not ended; not to be asked once it was waited for."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0] != "Z"

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, once; a negative one is that of the signal that took it."""
        return int(self._ask(wait=self.pid))


class Forks:
    """A process that has imported everything and forks for each command.

    The first fork that ends takes W&B's folder for tables with it, so none may log a table.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hold"], cwd=ROOT, text=True,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, args: Sequence[Any], log: Path, place: str = "", call: int = 0) -> Fork:
        """Begin a command such as `train.py fit ...`, held at a place if one is named."""
        log.touch()
        out = log.with_suffix(".out")
        given = {"args": [str(a) for a in args], "log": str(log), "out": str(out)}
        return Fork(self._ask(**given, place=place, call=call), log, self._ask)

    def _ask(self, **what: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> "Forks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def next_command() -> dict[str, Any] | None:
    """What this process, a fork by now, is to run; None in the first one, at the end."""
    while line := sys.stdin.readline():
        ask: dict[str, Any] = json.loads(line)
        if pid := ask.get("wait", 0):
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        elif not (answer := os.fork()):
            return ask
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    return None


def import_everything() -> None:
    """So that no fork of this process has to, nor copies what the collector looks through."""
    from kanllama_lightning.cli import train_command

    for name in ("evaluate_command", "plan_command"):
        importlib.import_module(f"kanllama_lightning.cli.{name}")
    for name in ("concepts", "kan_curves", "log_config", "logit_lens"):
        importlib.import_module(f"kanllama_lightning.callbacks.{name}")
    for class_path in (*train_command.ESSENTIAL, "wandb.apis.public", "openai"):
        pydoc.locate(class_path)
    gc.freeze()


def serve() -> None:
    """Import everything, and let forks run what is read from stdin."""
    import_everything()
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    ask = next_command()
    if ask is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, number in (("out", 1), ("log", 2)):
        os.dup2(os.open(ask[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.argv = ask["args"]
    if ask["place"]:
        wait_at(ask["place"], ask["call"])
    sys.exit(importlib.import_module(sys.argv[0].removesuffix(".py")).main())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:
        place, call, program = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        sys.argv = sys.argv[3:]
        wait_at(place, call)
        main = importlib.import_module(program.removesuffix(".py")).main
        sys.exit(main())
