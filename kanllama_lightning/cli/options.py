"""Options of the command line that are refused before anything is loaded, and why."""

import inspect
import math
import pydoc
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from kanllama_lightning.cli.allowed import ALLOWED, CHECKS, FIXED, SAME, Fixed, is_number
from kanllama_lightning.types import InputError

DEFAULTS = inspect.signature(L.Trainer.__init__).parameters


def fixed(option: str) -> bool:
    """Whether an option of the Trainer is none here: the program sets it."""
    return option in DEFAULTS and option not in ALLOWED


def check(config: Any) -> None:
    """Refuse what could only fail later, or would change the experiment without a word.

    Sets the options that are the program's own.

    Args:
        config: Parsed arguments of `fit` or `validate`.

    Raises:
        InputError: Names the option, its value, what is allowed and what to give instead.
    """
    trainer = config.trainer
    for name in sorted(vars(trainer)):
        value = trainer[name]
        if name in ALLOWED:
            if name in CHECKS:
                problem = CHECKS[name](value)
                if problem:
                    raise InputError(f"trainer.{name}={value!r}: {problem}")
            continue
        default = DEFAULTS[name].default
        own = FIXED.get(name, Fixed(default, "leave it out"))
        neutral = (own.value, default, *SAME.get(name, ()))
        if not any(value == same and type(value) is type(same) for same in neutral):
            raise InputError(f"trainer.{name}={value!r}: is not an option here; {own.instead}")
        trainer[name] = own.value
    _check_optimizer(config.model.get("optimizer"))
    _check_trainer(trainer)


def _check_trainer(trainer: Any) -> None:
    """Let Lightning say now what it would say after everything has been loaded."""
    given = {
        name: trainer[name]
        for name in ("accelerator", "devices", "num_nodes", "strategy", "precision", "profiler")
        if trainer[name] is None or isinstance(trainer[name], str | int | list)
    }
    given["accelerator"] = "cpu" if _no_gpu(given.get("accelerator")) else given["accelerator"]
    try:
        L.Trainer(
            **given,
            max_time=trainer.max_time,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, KeyError) as e:
        said = ", ".join(f"trainer.{name}={value!r}" for name, value in given.items())
        raise InputError(f"{said}: Lightning refuses them: {_first_line(e)}") from e


def _no_gpu(accelerator: Any) -> bool:
    return accelerator in ("auto", None) and not torch.cuda.is_available()


def _check_optimizer(optimizer: Any) -> None:
    """Try the optimizer on one number, before a Llama is loaded for it."""
    if optimizer is None or "class_path" not in optimizer:
        return
    args = dict((optimizer.get("init_args") or {}).items())
    lr = args.get("lr", 1.0)
    if not (is_number(lr) and 0 < lr < math.inf):
        raise InputError(f"model.optimizer.lr={lr!r}: must be a finite number larger than 0")
    for name, value in args.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"model.optimizer.{name}={value!r}: must be a finite number")
    kind: Any = pydoc.locate(optimizer.class_path)
    try:
        kind([torch.nn.Parameter(torch.zeros(1))], **args)
    except (ValueError, TypeError, RuntimeError) as e:
        raise InputError(
            f"model.optimizer: {optimizer.class_path} refuses its arguments "
            f"{args}: {_first_line(e)}"
        ) from e


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
