"""The command line: links, guards, run folders, and what happens after `fit`."""

import difflib
import logging
import os
import re
import sys
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
import wandb
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from kanllama_lightning import heads
from kanllama_lightning.cache.filling import fill_
from kanllama_lightning.entry import Aftermath, guarded
from kanllama_lightning.lm import FrozenLM
from kanllama_lightning.module import SAEModule, check_precision
from kanllama_lightning.preflight import check_room
from kanllama_lightning.resume import find_checkpoint
from kanllama_lightning.run import (
    CHECKPOINTS,
    CONFIG,
    LOGGER_ID,
    make_folder,
    remove_parts,
    remove_unused,
)
from kanllama_lightning.saved import newest_whole
from kanllama_lightning.schedule import Schedule
from kanllama_lightning.stopping import CacheStopped, Stopped
from kanllama_lightning.tokens import TokenData
from kanllama_lightning.types import InputError
from kanllama_lightning.wandb_logger import check_mode

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
BASE_CONFIG = ROOT / "configs" / "base.yaml"
LINKED = {
    "model.lm": "lm",
    "model.seed": "seed_everything",
    "data.seed": "seed_everything",
    "data.tokenizer": "lm.name",
    "model.head.init_args.d_model": "lm.name (the model's width)",
    "model.head.d_model": "lm.name (the model's width)",
    "model.head.init_args.seed": "seed_everything",
    "model.head.seed": "seed_everything",
}
"""Arguments that follow from another one; setting them would be ignored silently."""
SUBCOMMANDS = ("fit", "validate")
RUN_FOLDER = "KANLLAMA_RUN_FOLDER"
"""Environment variable in which the first process tells those it starts where the run goes."""
NOISE = (
    r".*LightningCLI's args parameter is intended.*",
    r".*`broadcast_buffers` is deprecated.*",
    r".*It is recommended to use `self.log.*sync_dist=True.*",  # metrics are summed by torchmetrics
    r".*You are using the `dataloader_iter` step flavor.*",
    r".*Found `dataloader_iter` argument.*",
    r".*does not have many workers.*",
    r".*litlogger.*",
    r".*is smaller than the logging interval.*",
    r".*LeafSpec.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*`isinstance\(treespec, LeafSpec\)`.*",
    r".*Trying to infer the `batch_size`.*",
    r".*You are using a CUDA device.*",
)


class KanllamaCLI(LightningCLI):
    """One module, one data module; variety comes in as injected objects."""

    run_folder: Path
    made: ClassVar[Path | None] = None
    """The folder made for the run, if it is new."""
    place: ClassVar[Path | None] = None
    """The folder that the command writes into."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The LM, the run folder, and the links that keep them consistent."""
        parser.add_class_arguments(FrozenLM, "lm")
        parser.add_argument(
            "--run", type=str | None, default=None, help="Folder of this run (default: a new one)."
        )
        parser.add_argument(
            "--runs_dir", type=str, default="runs", help="Folder that new run folders are made in."
        )
        parser.link_arguments("lm", "model.lm", apply_on="instantiate")
        parser.link_arguments("lm.tokenizer", "data.tokenizer", apply_on="instantiate")
        parser.link_arguments("lm.d_model", "model.head.init_args.d_model", apply_on="instantiate")
        for seed in ("model.seed", "model.head.init_args.seed", "data.seed"):
            parser.link_arguments("seed_everything", seed, compute_fn=int)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Training, and validating a checkpoint."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in SUBCOMMANDS}

    def _parse_ckpt_path(self) -> None:
        """Checkpoints hold no arguments here: the configuration always counts."""

    def before_instantiate_classes(self) -> None:
        """Choose the run folder, find what to continue, derive the clock."""
        config = self.config[self.subcommand]
        trainer, model = config.trainer, config.model
        if "RunLogger" in str(trainer.logger):
            check_mode()
        check_precision(str(trainer.precision))  # on a CPU the trainer would change it silently
        resolved = self._parser(self.subcommand).dump(config, skip_unset=False)
        self.save_config_kwargs["resolved"] = resolved
        fit = self.subcommand == "fit"
        self.run_folder = self._folder(config)
        if config.get("ckpt_path"):
            checkpoint = find_checkpoint(
                config.ckpt_path, config.runs_dir, resolved, config.run, fit
            )
            config.ckpt_path = str(checkpoint)
            log.info("continuing from %s", checkpoint)
            if fit:
                self.run_folder = checkpoint.parent.parent
        elif fit and is_first() and any((self.run_folder / CHECKPOINTS).glob("step=*")):
            raise InputError(
                f"run folder {str(self.run_folder)!r}: holds a run already; continue it with "
                f"--ckpt_path {self.run_folder}, or choose another --run"
            )
        if trainer.accelerator == "auto" and not torch.cuda.is_available():
            trainer.accelerator = "cpu"  # Apple's GPUs have no fp64, which the metrics need
        new = is_first() and not self.run_folder.exists()
        make_folder(self.run_folder)
        KanllamaCLI.made = self.run_folder if new else None
        KanllamaCLI.place = self.run_folder
        os.environ[RUN_FOLDER] = str(self.run_folder)
        config.run = trainer.default_root_dir = str(self.run_folder)
        trainer.max_epochs = -1
        steps = Schedule.of(model.tokens, model.sae_batch_tokens).steps
        asked = trainer.max_steps if trainer.max_steps is not None else -1
        trainer.max_steps = steps if asked < 0 else min(asked, steps)
        if isinstance(trainer.logger, bool) or trainer.logger is None:
            return
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        for logger in loggers:
            if "RunLogger" in logger.class_path:
                logger.init_args.save_dir = str(self.run_folder)
                logger.init_args.name = logger.init_args.name or self.run_folder.name
                logger.init_args.id = logger.init_args.id or _logger_id(self.run_folder)

    def _folder(self, config: Any) -> Path:
        """The run folder, the same in all processes of a run."""
        if config.run:
            return Path(config.run)
        if is_first() and not _started_with_others():
            return Path(self._new_name(config))
        told = os.environ.get(RUN_FOLDER)
        if told is None:
            raise InputError(
                "--run: several processes were started from outside and would each choose a folder "
                f"of their own; name one with --run FOLDER, or with {RUN_FOLDER}=FOLDER in the "
                "environment"
            )
        return Path(told)

    def _new_name(self, config: Any) -> str:
        stems = [Path(str(c)).stem for c in (config.get("config") or [])[1:]]
        if self.subcommand != "fit":
            stems.append(self.subcommand)
        name = "-".join([time.strftime("%Y%m%d-%H%M%S"), *stems])
        folder, n = Path(config.runs_dir) / name, 1
        while folder.exists():
            n += 1
            folder = Path(config.runs_dir) / f"{name}-{n}"
        return str(folder)

    def before_fit(self) -> None:
        """Refuse unusable data, and what cannot fit into memory or onto the disk."""
        self.datamodule.setup("fit")
        lm, buffer = self.model.lm, self.model.buffer
        lm_bytes = lm.n_parameters * lm.dtype.itemsize
        rows = buffer.capacity_tokens + self.model.schedule.batch
        check_room(
            self.model.trainees,
            rows * lm.d_model * buffer.dtype.itemsize,
            lm_bytes,
            self.run_folder,
        )
        if self.datamodule.cache is not None:
            needed = self.model.schedule.rows_read(self.model.filling_rows)
            fill_(lm, self.datamodule, needed, self.trainer.strategy.root_device)

    def after_fit(self) -> None:
        """Calibrate, validate and save, in that order."""
        if self.trainer.fast_dev_run:
            return
        self.trainer.validate(self.model, self.datamodule, verbose=False)


def is_first() -> bool:
    """Whether this process speaks for all that train together."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def _started_with_others() -> bool:
    """Whether something else than Lightning (torchrun, say) started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ


def _logger_id(folder: Path) -> str:
    """The W&B id of a run: made once, kept beside it, used again when it is continued."""
    path = folder / LOGGER_ID
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()


def _with_base(args: list[str]) -> list[str]:
    """Read `configs/base.yaml` before every other config.

    (jsonargparse 4.53 loses the class path of a callable, our optimizer, that stands in a
    default config file, so the file is given as an ordinary one.)
    """
    if args and args[0] in SUBCOMMANDS:
        return [args[0], "--config", str(BASE_CONFIG), *args[1:]]
    return args


def _refuse_linked(args: Sequence[str]) -> None:
    """Say so when an argument is set that follows from another one."""
    for arg in args:
        key = arg.split("=")[0].removeprefix("--")
        for linked, source in LINKED.items():
            if key == linked or (key.startswith(f"{linked}.") and linked == "model.lm"):
                raise InputError(f"--{key}: follows from {source}; set that instead")
    files = [b for a, b in zip(args, args[1:], strict=False) if a in ("--config", "-c")]
    files += [a.split("=", 1)[1] for a in args if a.startswith("--config=")]
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"--config {file}: no such file")
        _refuse_linked_in(Path(file))


def _refuse_linked_in(file: Path) -> None:
    import yaml

    try:
        tree = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as e:
        raise InputError(f"--config {file}: is no valid YAML: {e}") from e
    for linked, source in LINKED.items():
        node: Any = tree
        for part in linked.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            raise InputError(f"{linked} in {file}: follows from {source}; set that instead")


def _explain(message: str) -> str:
    """One clear message from what the parser says, with a hint where a name is misspelt."""
    text = re.sub(r"\s*\n\s*", " ", message).strip()
    head = re.search(
        r"(?:Expected a dot import path string|not a subclass|import path)[^:]*: (\w+)", text
    )
    known = [n for n in heads.__all__ if n != "SAEHead"]
    option = re.search(r"does not accept option '([\w.]+)'|Option '([\w.]+)' is not accepted", text)
    unknown = re.search(r"[Uu]nrecognized arguments: --([\w.]+)", text)
    if option or unknown:
        name = next(g for m in (option, unknown) if m for g in m.groups() if g)
        hint = " Latents per token are `target_l0`, for every head." if name.endswith("k") else ""
        return (
            f"{name}: no such option.{hint} See `python train.py fit --help`, or for a head "
            f"`python train.py fit --model.head.help KANEncoder`\n({text[:600]})"
        )
    if "head" in text and head:
        near = difflib.get_close_matches(head[1], known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"model.head={head[1]!r}: no such head.{hint} Known: {', '.join(known)}"
    return text[:1500]


def main(args: Sequence[str] | None = None, **kwargs: Any) -> int:
    """Run the command line; returns the exit code.

    Args:
        args: Arguments without the program's name; left out, those of the process.
        kwargs: Passed to `KanllamaCLI`.
    """
    quiet()
    given = list(sys.argv[1:] if args is None else args)
    after = Aftermath(_explain, _stopped, lambda: KanllamaCLI.place, _onward, _clear)
    return guarded(lambda: _run(given, args is None, kwargs), given, after)


def _run(given: list[str], started: bool, kwargs: dict[str, Any]) -> int:
    """The command itself.

    Args:
        given: Arguments.
        started: Whether they are those of the process.
        kwargs: Passed to `KanllamaCLI`.
    """
    own = sys.argv
    # what a launcher of further processes starts again
    sys.argv = own if started else [str(ROOT / "train.py"), *given]
    KanllamaCLI.made = KanllamaCLI.place = None
    try:
        kind = KanllamaCLI
        if given[:1] == ["plan"]:
            from kanllama_lightning.plan.cli import PlanCLI

            kind, given = PlanCLI, ["fit", *given[1:]]
        _refuse_linked(given)
        kind(
            SAEModule,
            TokenData,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "allow_abbrev": False,
                "exit_on_error": False,
                **{sub: {"exit_on_error": False} for sub in SUBCOMMANDS},
            },
            args=_with_base(given),
            **kwargs,
        )
    finally:
        sys.argv = own
        os.environ.pop(RUN_FOLDER, None)
        if wandb.run is not None:
            wandb.finish()
    return 0


def _stopped(e: Stopped) -> str:
    """What a person who stopped a command has, and how to go on."""
    if not is_first():
        return ""
    if isinstance(e, CacheStopped):
        return (
            f"stopped; cache {e.folder} holds {e.rows:,} activations, the same command goes on "
            "from its last whole shard"
        )
    if e.step is not None:
        return (
            f"stopped at step {e.step}, everything is saved; the same command with "
            "`--ckpt_path last` goes on from here"
        )
    if KanllamaCLI.made is None and KanllamaCLI.place is not None:
        return f"stopped; {KanllamaCLI.place} is as it was, the same command goes on from there"
    return "stopped before there was anything to save; the same command does it all"


def _onward() -> str:
    """How to go on after a write that failed."""
    folder = KanllamaCLI.place
    if folder is None or not (folder / CONFIG).is_file():
        return "make room, or choose another place, and start again"
    checkpoint = newest_whole(folder)
    if checkpoint is None:
        return f"make room, or choose another place, and start again; {folder} holds no checkpoint"
    return (
        f"make room, then the same command with `--ckpt_path {folder}` goes on from "
        f"{checkpoint.name}, which is whole"
    )


def _clear(disk: bool) -> None:
    """Leave no empty run behind a mistake, or behind Ctrl-C before the first step, and nothing
    half written behind a full disk."""
    if disk and KanllamaCLI.place is not None and is_first():
        remove_parts(KanllamaCLI.place)
    if KanllamaCLI.made is not None:
        remove_unused(KanllamaCLI.made)


def quiet() -> None:
    """Our own lines plain; of the libraries' only what a person can use."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("kanllama_lightning", "callbacks"):
        logging.getLogger(name).setLevel(logging.INFO if is_first() else logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for pattern in NOISE:
        warnings.filterwarnings("ignore", pattern)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
