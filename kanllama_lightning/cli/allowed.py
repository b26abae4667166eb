"""Values of options that could only fail later, or would change the experiment without a word.

Nothing of size is imported: they are refused before torch is loaded.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kanllama_lightning.cli.catalogue import TRAINER

ALLOWED = tuple(TRAINER)
"""Options of Lightning's Trainer that mean something here."""


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


def is_number(value: Any) -> bool:
    """Whether it is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least_one(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return None if whole and value >= 1 else "must be a whole number of steps, at least 1"


def _interval(value: Any) -> str | None:
    return None if value is None else _at_least_one(value)


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
    good = value is None or (is_number(value) and 0 < value < math.inf)
    return None if good else "must be a finite number larger than 0; leave it out to clip spikes"


def _algorithm(value: Any) -> str | None:
    return None if value in (None, "norm", "value") else "must be norm or value"


def _time(value: Any) -> str | None:
    good = not isinstance(value, str) or re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value)
    return None if good else "must be DD:HH:MM:SS, such as 00:01:30:00 for an hour and a half"


def _accelerator(value: Any) -> str | None:
    known = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
    plain = not isinstance(value, str) or value in known
    return None if plain else f"must be {', '.join(known[:-1])} or {known[-1]}"


def _logger(value: Any) -> str | None:
    if isinstance(value, str) and "." not in value and value not in ("RunLogger", "wandb"):
        return (
            "must be false, wandb, or a class with its arguments, such as {class_path: "
            "lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: tb}}; CSV files "
            "are written in any case"
        )
    return None


CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    "accelerator": _accelerator,
    "devices": _devices,
    "gradient_clip_algorithm": _algorithm,
    "gradient_clip_val": _clipping,
    "log_every_n_steps": _at_least_one,
    "logger": _logger,
    "max_steps": _steps,
    "max_time": _time,
    "num_nodes": _at_least_one,
    "val_check_interval": _interval,
}

LEAST = {
    "model.tokens": 1,
    "model.sae_batch_tokens": 1,
    "model.start_tokens": 1,
    "data.ctx_len": 2,
    "data.lm_batch_seqs": 1,
    "data.val_batch_seqs": 1,
    "data.cache_tokens": 1,
}
"""Counts that mean nothing below these."""


def problem(name: str, value: Any) -> str | None:
    """The line on a value that is refused; None where there is nothing to say of it.

    Args:
        name: The option, such as `trainer.devices`.
        value: As YAML has it.
    """
    group, _, option = name.partition(".")
    if group == "trainer" and option in FIXED:
        own = FIXED[option]
        neutral = (own.value, None, *SAME.get(option, ()))
        if any(value == same and type(value) is type(same) for same in neutral):
            return None
        return f"{name}={value!r}: is not an option here; {own.instead}"
    if group == "trainer" and option in CHECKS:
        said = CHECKS[option](value)
        return f"{name}={value!r}: {said}" if said else None
    if name in LEAST and is_number(value) and value < LEAST[name]:
        return f"{name}={value!r}: must be at least {LEAST[name]}"
    if name == "model.optimizer.lr" and not (is_number(value) and 0 < value < math.inf):
        return f"{name}={value!r}: must be a finite number larger than 0"
    if name in ("seed_everything", "head_seed") and not _seed(value, name):
        return f"{name}={value!r}: must be a whole number from 0 to {(1 << 32) - 1}"
    return None


def _seed(value: Any, name: str) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
    return whole or value is None and name == "head_seed"
