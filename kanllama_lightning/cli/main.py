"""Where commands begin: help and misspelt options are answered before torch is loaded."""

import itertools
import os
import sys
from collections.abc import Callable, Sequence

from kanllama_lightning import __version__
from kanllama_lightning.cli import catalogue, help
from kanllama_lightning.console.stopping import answered, say

TRAIN = ("fit", "validate", "plan")
EVALUATE = ("list", "report", "compare", "try")
WANDB_SERVICE = "WANDB_SERVICE"
"""Where W&B looks for the service of the process that started this one, which may have ended:
a command starts its own."""


def train(args: Sequence[str] | None = None) -> int:
    """`train.py`; returns the exit code."""
    return answered(lambda: _train(args))


def evaluate(args: Sequence[str] | None = None) -> int:
    """`evaluate.py`; returns the exit code."""
    return answered(lambda: _evaluate(args))


def _train(args: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if args is None else args)
    quick = _quick(given, "python train.py", TRAIN, help.TRAIN, _train_help)
    if quick is not None:
        return quick
    wrong = catalogue.wrong_option(given[1:])
    if wrong is not None:
        known = [o.name for group in catalogue.fit_groups().values() for o in group]
        say(help.no_such_option(wrong, f"python train.py {given[0]}", known))
        return 2

    from kanllama_lightning.cli import train_command

    os.environ.pop(WANDB_SERVICE, None)
    return train_command.main(args)


def _evaluate(args: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if args is None else args)
    quick = _quick(given, "python evaluate.py", EVALUATE, help.EVALUATE, _evaluate_help)
    if quick is not None:
        return quick
    from kanllama_lightning.cli import evaluate_options

    wrong = evaluate_options.wrong_option(given[0], given[1:])
    if wrong is not None:
        known = evaluate_options.names(given[0])
        say(help.no_such_option(wrong, f"python evaluate.py {given[0]}", known))
        return 2
    if given[0] == "list":
        from kanllama_lightning.cli import list_command

        return list_command.main(given[1:])

    from kanllama_lightning.cli import evaluate_command

    os.environ.pop(WANDB_SERVICE, None)
    return evaluate_command.main(args)


def kanllama() -> int:
    """The command of an installed package: those of `train.py` and of `evaluate.py`."""
    if sys.argv[1:2] and sys.argv[1] in EVALUATE:
        return evaluate()
    if sys.argv[1:2] and sys.argv[1] in TRAIN:
        return train()
    if sys.argv[1:2] == ["--version"]:
        print(_version())  # noqa: T201
        return 0
    print(f"kanllama COMMAND\n\n{help.TRAIN}\n{help.EVALUATE}")  # noqa: T201
    return 0 if sys.argv[1:2] in (["--help"], ["-h"]) else 2


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
        say(f"error: {given[0]}: no such command; there are {', '.join(commands)}. See "
            f"`{program} --help`")  # fmt: skip
        return 2
    told = own_help(given)
    if told is None:
        return None
    print(told, end="")  # noqa: T201
    return 0


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
