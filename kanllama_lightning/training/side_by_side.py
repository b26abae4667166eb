"""Several heads, to be trained on the same activations."""

import copy
import inspect
import math
import re
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from kanllama_lightning.heads import SAEHead
from kanllama_lightning.heads.head import Trained
from kanllama_lightning.storage.named import arguments_of, named_class
from kanllama_lightning.training.seeds import NoSeed, seed_number
from kanllama_lightning.types import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=-]*")
RESERVED = {
    *("head", "heads", "checkpoints", "baselines", "wandb", "eval"),
    *("train", "val", "time", "baseline"),
}
"""Names of what else is in a run folder, or in front of a figure."""
KEYS = ("class_path", "init_args", "lr", "optimizer")


class SideBySide(Trained):
    """Any heads on the activations of one LM pass, each exactly what it would be alone.

    Each has its own losses, optimizer state, clipping, counters, metrics and folder
    `RUN/<name>/`; they share the LM, the buffer, the validation runs and the token budget.

    Args:
        d_model: Width of the activations (linked from the LM on the command line).
        heads: For each name a `class_path` of a head with its `init_args` (`d_model` apart), and,
            where it is not that of `model.optimizer`, an `lr`; `optimizer` has any of its
            init_args for this head. Heads whose kind has arguments of its own (`Gated`: betas 0
            and 0.999) are trained with these. A `seed` among the init_args takes the place of
            the run's.
        d_sae: Number of latents of the heads that do not say their own (default: 8 times the
            width).
        target_l0: Latents per token of the heads that do not say their own.
        transcoder: Whether the heads read another place than they write (linked to
            `lm.input_point`).
        seed: Seed of the heads that do not say their own (linked to `seed_everything`).
    """

    def __init__(
        self,
        d_model: int,
        heads: dict[str, dict[str, Any]],
        d_sae: int | None = None,
        target_l0: int | None = None,
        seed: int = 0,
        transcoder: bool = False,
    ) -> None:
        super().__init__()
        if not heads:
            raise InputError("model.head.heads={}: name at least one head")
        self.d_model = d_model
        shared = {"d_model": d_model, "d_sae": d_sae, "target_l0": target_l0, "seed": seed}
        given = {k: v for k, v in shared.items() if v is not None or k == "d_sae"}
        if transcoder:
            given["transcoder"] = True
        self.members: dict[str, SAEHead] = {}
        self.optimizers: dict[str, dict[str, Any]] = {}
        """Arguments of the optimizer that are a head's own."""
        for name, spec in heads.items():
            _check(name, spec)
            self.members[name] = _built(name, spec, given)
            given_ = dict(self.members[name].optimizer_args) | (spec.get("optimizer") or {})
            if spec.get("lr") is not None:
                given_["lr"] = spec["lr"]
            if "lr" in given_:
                given_["lr"] = _rate(name, given_["lr"])
            self.optimizers[name] = given_
        self.seeds = {
            name: (spec.get("init_args") or {}).get("seed") for name, spec in heads.items()
        }
        self.alone = {name: alone(spec, d_sae, target_l0) for name, spec in heads.items()}


def alone(spec: dict[str, Any], d_sae: int | None, target_l0: int | None) -> dict[str, Any]:
    """The `model.head` of a run that trains this head alone; seed and width follow from links."""
    shared = {"d_sae": d_sae, "target_l0": target_l0}
    own = {k: v for k, v in (spec.get("init_args") or {}).items() if k != "seed"}
    given = {k: v for k, v in shared.items() if v is not None or k == "d_sae"}
    return {"class_path": spec["class_path"], "init_args": given | own}


def alone_config(config: dict[str, Any], together: SideBySide, name: str) -> dict[str, Any]:
    """The configuration of a run that would train one of the heads alone, from that of all."""
    config = copy.deepcopy(config)
    config["model"]["head"] = copy.deepcopy(together.alone[name])
    optimizer = config["model"].get("optimizer")
    if isinstance(optimizer, dict):
        own = {
            k: list(v) if isinstance(v, tuple) else v for k, v in together.optimizers[name].items()
        }
        optimizer["init_args"] = (optimizer.get("init_args") or {}) | own
    if together.seeds[name] is not None:
        config["head_seed"] = together.seeds[name]
    return config


def _check(name: str, spec: Any) -> None:
    where = f"model.head.heads.{name}"
    if not NAME.fullmatch(name) or name in RESERVED:
        raise InputError(
            f"{where}: the name is that of a folder and of figures: letters, digits and _.=- are "
            f"allowed, and none of {', '.join(sorted(RESERVED))}"
        )
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        raise InputError(
            f"{where}={spec!r}: must be a class_path with init_args, such as "
            "{class_path: BatchTopK, init_args: {d_sae: 1024, target_l0: 16}}"
        )
    if not isinstance(spec.get("optimizer") or {}, dict):
        raise InputError(
            f"{where}.optimizer={spec['optimizer']!r}: must be arguments of model.optimizer, such "
            "as {betas: [0.0, 0.999]}"
        )
    own = spec.get("init_args") or {}
    if not isinstance(own, dict):
        raise InputError(f"{where}.init_args={own!r}: must be arguments of the head, by name")
    if "d_model" in own:
        raise InputError(f"{where}.init_args.d_model: follows from the LM; leave it out")
    if "transcoder" in own:
        raise InputError(f"{where}.init_args.transcoder: follows from lm.input_point; leave it out")
    if own.get("seed") is not None:
        try:
            seed_number(own["seed"])
        except NoSeed as e:
            raise InputError(f"{where}.init_args.{e}") from e
    if spec.get("lr") is not None and "lr" in (spec.get("optimizer") or {}):
        raise InputError(f"{where}: gives lr twice, by itself and in optimizer; leave one out")
    unknown = sorted(spec.keys() - set(KEYS))
    if unknown:
        raise InputError(f"{where}.{unknown[0]}: no such key; allowed are {', '.join(KEYS)}")


def _rate(name: str, lr: Any) -> float:
    try:
        rate = float(lr)
    except (TypeError, ValueError):
        rate = -1.0
    if not 0 < rate < math.inf:
        raise InputError(
            f"model.head.heads.{name}.lr={lr!r}: must be a finite number larger than 0"
        )
    return rate


def _needed(argument: inspect.Parameter) -> bool:
    return argument.default is inspect.Parameter.empty


def _built(name: str, spec: dict[str, Any], given: dict[str, Any]) -> SAEHead:
    """The head, its arguments checked like those of a head on the command line."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SAEHead, "head")
    own = spec.get("init_args") or {}
    try:
        takes = arguments_of(named_class(spec["class_path"], SAEHead))
        meant = {k: v for k, v in given.items() if k in takes}
        # None is said to heads that would otherwise lack the argument
        args = {k: v for k, v in meant.items() if v is not None or _needed(takes[k][0])} | own
        asked = {"class_path": spec["class_path"], "init_args": args}
        parsed = parser.parse_object({"head": asked}).head
        head: SAEHead = named_class(parsed.class_path, SAEHead)(**parsed.init_args.as_dict())
    except ArgumentError as e:
        text = re.sub(r"\s*\n\s*", " ", str(e)).strip()
        raise InputError(f"model.head.heads.{name}: {text[:600]}") from e
    except InputError as e:
        raise InputError(f"model.head.heads.{name}: {e}") from e
    return head
