"""Runs a command in a real process that waits at a named place, until a signal comes.

python -m tests.hold MODULE:CLASS.FUNCTION CALL train.py fit ...
"""

import importlib
import sys
import time
from typing import Any

HERE = "@@here"
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


if __name__ == "__main__":
    place, call, program = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    sys.argv = sys.argv[3:]
    wait_at(place, call)
    main = importlib.import_module(program.removesuffix(".py")).main
    sys.exit(main())
