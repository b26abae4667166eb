"""Where commands begin: help and misspelt options are answered before torch is loaded."""

import difflib
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from kanllama_lightning import __version__
from kanllama_lightning.cli import help
from kanllama_lightning.console.allocator import keep_freed_memory
from kanllama_lightning.console.secrets import learn, scrubbed
from kanllama_lightning.console.stopping import answered, say
from kanllama_lightning.console.units import duration

TRAIN = ("fit", "validate", "plan")
EVALUATE = ("list", "report", "compare", "try", "export", "publish")
MEANT = {"train": "fit", "run": "fit", "start": "fit", "eval": "report", "evaluate": "report",
         "test": "validate", "val": "validate", "dry-run": "plan", "cost": "plan",
         "generate": "try", "prompt": "try", "show": "report", "diff": "compare",
         "upload": "publish", "push": "publish", "share": "publish"}  # fmt: skip
"""What commands are called elsewhere."""
LONG_S = 20.0
WANDB_SERVICE = "WANDB_SERVICE"
"""Where W&B looks for the service of the process that started this one, which may have ended:
a command starts its own."""


def train(args: Sequence[str] | None = None) -> int:
    """`train.py`; returns the exit code."""
    return _timed(lambda: _train(args))


def evaluate(args: Sequence[str] | None = None) -> int:
    """`evaluate.py`; returns the exit code."""
    return _timed(lambda: _evaluate(args))


def _timed(run: Callable[[], int]) -> int:
    """Run a command; one that took long says how long, from before torch is loaded."""
    began = time.perf_counter()
    keep_freed_memory()
    code = answered(run)
    seconds = time.perf_counter() - began
    if code == 0 and seconds >= LONG_S and os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"took {duration(seconds)}")
    return code


def _train(args: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if args is None else args)
    quick = _quick(given, "python train.py", TRAIN, help.TRAIN, _train_help)
    if quick is not None:
        return quick
    from kanllama_lightning.cli import command_line
    from kanllama_lightning.cli.kinds import NotUnderstood

    try:
        command_line.read(given, _loaded)
    except NotUnderstood as e:
        _refuse(given, str(e))
        return 2
    except _Unread:
        pass  # the command says what is wrong with it

    from kanllama_lightning.cli import train_command

    os.environ.pop(WANDB_SERVICE, None)
    return train_command.main(args)


def _evaluate(args: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if args is None else args)
    quick = _quick(given, "python evaluate.py", EVALUATE, help.EVALUATE, _evaluate_help)
    if quick is not None:
        return quick
    from kanllama_lightning.cli import evaluate_options
    from kanllama_lightning.cli.kinds import NotUnderstood

    try:
        meant = evaluate_options.read(given)
    except NotUnderstood as e:
        _refuse(given, str(e))
        return 2
    if given[0] == "list":
        from kanllama_lightning.cli import list_command

        return list_command.main(meant[1:])

    from kanllama_lightning.cli import evaluate_command

    os.environ.pop(WANDB_SERVICE, None)
    return evaluate_command.main(meant)


def kanllama() -> int:
    """The command of an installed package: those of `train.py` and of `evaluate.py`."""
    if sys.argv[1:2] and sys.argv[1] in EVALUATE:
        return evaluate()
    if sys.argv[1:2] and sys.argv[1] in TRAIN:
        return train()
    if sys.argv[1:2] == ["--version"]:
        print(_version())  # noqa: T201
        return 0
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        commands = (*TRAIN, *EVALUATE)
        _refuse(sys.argv[1:], f"{sys.argv[1]}: no such command; there are {', '.join(commands)}."
                f"{_near(sys.argv[1], commands)} See `kanllama --help`")  # fmt: skip
        return 2
    about = f"{help.TRAIN}\n{help.EVALUATE}"
    for program in ("python train.py", "python evaluate.py"):
        about = about.replace(program, "kanllama")
    print(  # noqa: T201
        f"usage: kanllama COMMAND [--option VALUE ...]\n\n{about}\n"
        "Where a message says `python train.py` or `python evaluate.py`, type `kanllama`."
    )
    return 0 if sys.argv[1:2] in (["--help"], ["-h"]) else 2


def _refuse(given: Sequence[str], why: str) -> None:
    """Say what is wrong with a command, without the secrets that it may hold."""
    learn(given)
    say(scrubbed(f"error: {why}"))


def _quick(
    given: list[str],
    program: str,
    commands: Sequence[str],
    about: str,
    own_help: Callable[[list[str]], str | None],
) -> int | None:
    """Answer what needs no command to run; None if one does."""
    if given[:1] == ["--version"]:
        print(_version())  # noqa: T201
        return 0
    if not given or given[0] in ("-h", "--help"):
        print(f"usage: {program} COMMAND [--option VALUE ...]\n\n{about}", end="")  # noqa: T201
        return 0 if given else 2
    if given[0] not in commands:
        if later := [one for one in given if one in commands]:
            others = [one for one in given if one != later[0]]
            _refuse(given, f"{given[0]}: the command comes first: {program} "
                    f"{' '.join([later[0], *others])}")  # fmt: skip
            return 2
        _refuse(given, f"{given[0]}: no such command; there are {', '.join(commands)}."
                f"{_near(given[0], commands)} See `{program} --help`")  # fmt: skip
        return 2
    told = own_help(given)
    if told is None:
        return None
    print(told, end="")  # noqa: T201
    return 0


def _near(word: str, commands: Sequence[str]) -> str:
    meant = MEANT.get(word, word)
    near = difflib.get_close_matches(meant, commands, n=1)
    if near:
        return f" Did you mean {near[0]}?"
    for program, others in (("train.py", TRAIN), ("evaluate.py", EVALUATE)):
        if meant in others:
            return f" Did you mean `python {program} {meant}`?"
    return ""


class _Unread(Exception):
    """A config file cannot be read."""


def _loaded(file: Path) -> dict[str, Any]:
    """What a config file says, without any check of it."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except Exception as e:
        raise _Unread from e
    if not isinstance(tree, dict | None):
        raise _Unread
    return tree or {}


def _train_help(given: list[str]) -> str | None:
    if any(arg in ("-h", "--help") for arg in given[1:]):
        return help.fit_help(given[0])
    for arg, value in itertools.pairwise([*given[1:], ""]):
        option, equals, given_value = arg.partition("=")
        if option == "--model.head.help":
            return help.head_help(given_value if equals else value)
    return None


def _evaluate_help(given: list[str]) -> str | None:
    if not any(arg in ("-h", "--help") for arg in given[1:]):
        return None
    from kanllama_lightning.cli import evaluate_options

    return evaluate_options.help_of(given[0])


def _version() -> str:
    from kanllama_lightning.runs.revision import commit

    code = commit()
    return f"kanllama-lightning {__version__}" + (f" ({code})" if code else "")
