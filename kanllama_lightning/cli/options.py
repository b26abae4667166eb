"""Options of the command line that are refused before anything is loaded, and why."""

import inspect
import math
import pydoc
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from kanllama_lightning.cli.catalogue import TRAINER
from kanllama_lightning.types import InputError

ALLOWED = tuple(TRAINER)
"""Options of Lightning's Trainer that mean something here."""
DEFAULTS = inspect.signature(L.Trainer.__init__).parameters


class Fixed(NamedTuple):
    """An option of Lightning's Trainer that this program sets itself."""

    value: Any
    """What it sets."""
    instead: str
    """What does here what somebody who gives the option is after."""


LENGTH = "a run is as long as --model.tokens says"
VALIDATED = "every validation is of --data.val_tokens tokens of each set"
FIXED = {
    "accumulate_grad_batches": Fixed(1, "a step is a batch of --model.sae_batch_tokens"),
    "barebones": Fixed(False, "what slows a step down is in time/* of the summary"),
    "check_val_every_n_epoch": Fixed(1, "--trainer.val_check_interval counts steps"),
    "default_root_dir": Fixed(None, "--run names the folder of a run, --runs_dir that of all runs"),
    "enable_checkpointing": Fixed(
        False,
        "kanllama_lightning.callbacks.checkpoint.RunCheckpoint saves, every --every_n_steps of it",
    ),
    "enable_progress_bar": Fixed(
        False, "kanllama_lightning.callbacks.progress.Progress shows how a run is doing"
    ),
    "enable_model_summary": Fixed(False, "the sizes are in the table at the end"),
    "fast_dev_run": Fixed(False, "a short run is one with a small --model.tokens, such as 20000"),
    "limit_predict_batches": Fixed(None, "there is nothing to predict"),
    "limit_test_batches": Fixed(None, "there is no test set; " + VALIDATED),
    "limit_train_batches": Fixed(None, LENGTH),
    "limit_val_batches": Fixed(None, VALIDATED),
    "max_epochs": Fixed(None, LENGTH),
    "min_epochs": Fixed(None, LENGTH),
    "min_steps": Fixed(None, LENGTH),
    "num_sanity_val_steps": Fixed(0, "the pre-flight looks at a batch in its place"),
    "overfit_batches": Fixed(0.0, "give a small text with --data.train"),
    "reload_dataloaders_every_n_epochs": Fixed(0, "the text is one stream without epochs"),
    "use_distributed_sampler": Fixed(False, "the data deals out its rows itself"),
}
SAME = {
    "max_epochs": (-1,),  # what configurations of runs say
    "enable_checkpointing": (None,),
    "enable_progress_bar": (None,),
    "enable_model_summary": (None,),
    "num_sanity_val_steps": (None,),
    "overfit_batches": (0,),
    "use_distributed_sampler": (True,),  # Lightning's defaults
}
"""Values beside the one that is set, and Lightning's default, that ask for nothing else."""


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
    if not (_is_number(lr) and 0 < lr < math.inf):
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _at_least_one(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return None if whole and value >= 1 else "must be a whole number of steps, at least 1"


def _steps(value: Any) -> str | None:
    if value is None or (isinstance(value, int) and value == -1 and not isinstance(value, bool)):
        return None
    problem = _at_least_one(value)
    return f"{problem}; leave it out to train on all of --model.tokens" if problem else None


def _devices(value: Any) -> str | None:
    if value == "auto" or (isinstance(value, list) and value):
        return None
    number = int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value
    if isinstance(number, str) and number.strip():
        return None  # a list of devices, which Lightning reads
    whole = isinstance(number, int) and not isinstance(number, bool)
    good = whole and (number == -1 or number >= 1)
    return None if good else "must be a number of devices from 1 up, a list of them, or auto"


def _clipping(value: Any) -> str | None:
    good = value is None or (_is_number(value) and 0 < value < math.inf)
    return None if good else "must be a finite number larger than 0; leave it out to clip spikes"


def _algorithm(value: Any) -> str | None:
    return None if value in (None, "norm", "value") else "must be norm or value"


def _time(value: Any) -> str | None:
    good = not isinstance(value, str) or re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value)
    return None if good else "must be DD:HH:MM:SS, such as 00:01:30:00 for an hour and a half"


CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    "devices": _devices,
    "gradient_clip_algorithm": _algorithm,
    "gradient_clip_val": _clipping,
    "log_every_n_steps": _at_least_one,
    "max_steps": _steps,
    "max_time": _time,
    "num_nodes": _at_least_one,
    "val_check_interval": _at_least_one,
}
