"""`fit` and `validate`: links, guards, and the folder of a run."""

import argparse
import inspect
import logging
import os
import pydoc
import re
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from kanllama_lightning.cli import options
from kanllama_lightning.cli.arguments import SUBCOMMANDS, config_tree, mentions
from kanllama_lightning.cli.catalogue import RUN
from kanllama_lightning.cli.command_line import BASE
from kanllama_lightning.cli.meeting import Meeting, patience, started_with_others
from kanllama_lightning.cli.resume import find_checkpoint
from kanllama_lightning.console.quiet import is_first
from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.number_format import AUTO, fastest
from kanllama_lightning.lm.preflight import check_room
from kanllama_lightning.plan.costs import start_bytes, step_bytes
from kanllama_lightning.plan.validation import spacing, validation_size
from kanllama_lightning.runs.folder import (
    HEAD,
    LOGGER_ID,
    SUMMARY,
    around,
    make_folder,
)
from kanllama_lightning.runs.lookup import folder_named
from kanllama_lightning.runs.state import Kind, RunState, clear, look, step_of
from kanllama_lightning.runs.wandb_logger import RunLogger, check_mode
from kanllama_lightning.storage.files import write_text
from kanllama_lightning.storage.lock import RunLock
from kanllama_lightning.storage.named import arguments_of, check_nulls
from kanllama_lightning.training.fill_cache import fill_
from kanllama_lightning.training.module import SAEModule, check_precision
from kanllama_lightning.training.schedule import Schedule
from kanllama_lightning.training.seeds import seed_number
from kanllama_lightning.types import InputError, RunFinished

log = logging.getLogger(__name__)

RUN_FOLDER = "KANLLAMA_RUN_FOLDER"
"""Environment variable in which the first process tells those it starts where the run goes."""
EXECUTION = ("run", "runs_dir", "ckpt_path", "weights_only", "config", "allow")
"""Arguments that say where and how a run happens, not what it is: kept in `sessions.json`."""
OF_THIS_EXECUTION = ("run", "ckpt_path", "weights_only")
"""Those that count on the command line alone."""
LOGGER_ID_FORM = re.compile(r"[A-Za-z0-9_-]{1,64}")


class KanllamaCLI(LightningCLI):
    """One module, one data module; variety comes in as injected objects."""

    run_folder: Path
    given: ClassVar[Sequence[str]] = ()
    """Arguments of the command line."""
    files: ClassVar[Sequence[str]] = ()
    """Its configs."""
    lock: ClassVar[RunLock | None] = None
    """The run folder, taken."""
    made: ClassVar[bool] = False
    """Whether the folder was made for the run."""
    met: ClassVar[Meeting | None] = None
    """Where the run's processes met, if something else started them."""
    place: ClassVar[Path | None] = None
    """The folder that the command writes into."""

    def __init__(self, *args: Any, essential: Sequence[str] = (), **kwargs: Any) -> None:
        self.essential = essential
        super().__init__(*args, **kwargs)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed is a number, from before anything is linked to it."""
        parser.add_argument(
            "--seed_everything",
            type=seed_number,
            default=0,
            help=RUN["seed_everything"],
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Hide the Trainer's options that mean nothing here; they are refused when given.

        A file named in `data` is text: jsonargparse would read it as a configuration first, and
        take a line of it for the name of a corpus.
        """
        super().add_core_arguments_to_parser(parser)
        for action in parser._actions:
            group, _, name = action.dest.partition(".")
            if group == "data" and isinstance(action, ActionTypeHint):
                action._enable_path = False
                action.sub_add_kwargs["sub_configs"] = False
            if group == "trainer" and name and options.fixed(name.partition(".")[0]):
                action.help = argparse.SUPPRESS

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The LM, the run folder, and the links that keep them consistent."""
        parser.add_class_arguments(FrozenLM, "lm")
        parser.add_argument("--run", type=str | None, default=None, help=RUN["run"])
        parser.add_argument("--runs_dir", type=str, default="runs", help=RUN["runs_dir"])
        parser.add_argument(
            "--allow",
            nargs="+",
            type=str,
            default=[],
            help=RUN["allow"],
        )
        parser.link_arguments("lm", "model.lm", apply_on="instantiate")
        parser.link_arguments("lm.tokenizer", "data.tokenizer", apply_on="instantiate")
        parser.link_arguments("lm.d_model", "model.head.init_args.d_model", apply_on="instantiate")
        parser.link_arguments(
            "lm.transcodes", "model.head.init_args.transcoder", apply_on="instantiate"
        )
        parser.add_argument(
            "--head_seed",
            type=int | None,
            default=None,
            help=RUN["head_seed"],
        )
        for seed in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", seed)
        parser.link_arguments(
            ("seed_everything", "head_seed"),
            "model.head.init_args.seed",
            compute_fn=lambda of_run, own: of_run if own is None else own,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Training, and validating a checkpoint."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in SUBCOMMANDS}

    def _parse_ckpt_path(self) -> None:
        """Checkpoints hold no arguments here: the configuration always counts."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse what could only fail later or would change the experiment."""
        super().parse_arguments(parser, args)
        config = self.config[self.config["subcommand"]]
        for key in OF_THIS_EXECUTION:
            if config.get(key) is not None and not _on_command_line(args, key):
                log.info(
                    "%s in a config is left out of account (%s): give --%s on the command line",
                    key,
                    config[key],
                    key,
                )
                config[key] = None
        check_precision(str(config.trainer.precision))  # a CPU's trainer changes it silently
        options.check(config)
        for place, kind in (("lm", FrozenLM), ("data", TokenData), ("model", SAEModule)):
            check_nulls(config[place], kind, place)
        Schedule.of(config.model.tokens, config.model.sae_batch_tokens)

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and take it, find what to continue, derive the clock."""
        config = self.config[self.subcommand]
        trainer, model = config.trainer, config.model
        if "RunLogger" in str(trainer.logger):
            check_mode()
        self._drop_default_val(config)
        if model.init_from is not None:
            first = folder_named(model.init_from, config.runs_dir, "model.init_from")
            model.init_from = str(first)
        if config.lm.dtype == AUTO:
            # what was chosen stands in config.yaml: a run goes on in it, on whatever machine
            config.lm.dtype, why = fastest()
            log.info("lm.dtype: %s (auto: %s)", config.lm.dtype, why)
        trainer.callbacks = _with_essential(trainer.callbacks, self.essential)
        resolved = self._parser(self.subcommand).dump(config, skip_unset=False)
        self.save_config_kwargs["resolved"] = resolved = recipe(resolved)
        fit = self.subcommand == "fit"
        steps = Schedule.of(model.tokens, model.sae_batch_tokens).steps
        asked = trainer.max_steps if trainer.max_steps is not None else -1
        trainer.max_steps = steps if asked < 0 else min(asked, steps)
        trainer.max_epochs = -1
        if trainer.val_check_interval is None:
            trainer.val_check_interval = spacing(steps)
            pace = next(c for c in trainer.callbacks if c.class_path.endswith("ValidationPace"))
            pace.init_args.paced = True
        self.save_config_kwargs["execution"] = execution = {
            key: None if config.get(key) is None else str(config[key]) for key in EXECUTION
        }
        execution["config"] = str([*self.files])
        for option in ("run", "runs_dir", "ckpt_path"):
            if config.get(option) == "":
                raise InputError(f"{option}='': names nothing; give a path, or leave it out")
        self._settle_folder(config, resolved, fit)
        if config.get("ckpt_path"):
            execution["ckpt_path"] = config.ckpt_path
            log.info("continuing from %s" if fit else "validating %s", config.ckpt_path)
        if trainer.accelerator == "auto" and not torch.cuda.is_available():
            trainer.accelerator = "cpu"  # Apple's GPUs have no fp64, which the metrics need
        os.environ[RUN_FOLDER] = str(self.run_folder)
        config.run = execution["run"] = trainer.default_root_dir = str(self.run_folder)
        if isinstance(trainer.logger, bool) or trainer.logger is None:
            return
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        for logger in loggers:
            if "RunLogger" in logger.class_path:
                logger.init_args.save_dir = str(self.run_folder)
                logger.init_args.name = logger.init_args.name or self.run_folder.name
                logger.init_args.id = logger.init_args.id or _logger_id(self.run_folder)

    def _settle_folder(self, config: Any, resolved: str, fit: bool) -> None:
        """Choose and take the run folder, which the first process tells those started with it."""
        own = started_with_others(config.trainer.num_nodes)
        if own is None:
            self._choose_folder(config, resolved, fit)
            return
        KanllamaCLI.met = met = Meeting(own, patience())
        if own.rank:
            heard = met.hear()
            config.run = config.run or heard
            self._choose_folder(config, resolved, fit)
            return
        try:
            self._choose_folder(config, resolved, fit)
        except (InputError, RunFinished) as e:
            met.refuse(e)
            raise
        met.tell(str(self.run_folder))

    def _choose_folder(self, config: Any, resolved: str, fit: bool) -> None:
        """The run folder, taken by the first process; find what is to be continued."""
        named = config.run or self._told()
        if config.get("ckpt_path"):
            where = named if fit else None  # a validation has a folder of its own
            checkpoint = find_checkpoint(config.ckpt_path, config.runs_dir, resolved, where, fit)
            config.ckpt_path = str(checkpoint)
        elif not fit:
            raise InputError(
                "validate: nothing to validate; name a run or one of its checkpoints with "
                "--ckpt_path (a saved head is measured by `python evaluate.py report HEAD`)"
            )
        goes_on = fit and bool(config.get("ckpt_path"))
        self.run_folder = checkpoint.parent.parent if goes_on else self._folder(config, named)
        if goes_on:
            _refuse_finished(checkpoint, config.trainer.max_steps)
        if is_first():
            self._take(goes_on)

    def _drop_default_val(self, config: Any) -> None:
        """Leave the default's other text out of a run on the user's own text, unless asked for."""
        default, train = config_tree(BASE)["data"], config.data.train
        init_args = train.get("init_args") if not isinstance(train, str) else None
        name = train if isinstance(train, str) else (init_args or {}).get("name")
        if name == default["train"]["init_args"]["name"] or not config.data.val_fraction:
            return
        if config.data.val is None or mentions(self.given, "data", "val"):
            return
        config.data.val = None
        log.info(
            "data.val: left out, as data.train is other text (%s is the default's); --data.val "
            "names further validation sets",
            ", ".join(one["init_args"]["name"] for one in default["val"]),
        )

    def _take(self, goes_on: bool) -> None:
        """Make the run folder this process's own, empty unless a run goes on in it."""
        folder = self.run_folder
        new = not folder.exists()
        if (other := around(folder)) is not None:
            raise InputError(
                f"run folder {str(folder)!r}: lies inside the run folder {str(other)!r}; choose "
                "another --run"
            )
        make_folder(folder)
        KanllamaCLI.lock = RunLock.take(folder)
        KanllamaCLI.made, KanllamaCLI.place = new, folder
        if goes_on:
            return
        state = look(folder, mine=True, was_left=KanllamaCLI.lock.was_left)
        if state.kind == Kind.DEBRIS:
            log.info(
                "run folder %s: a run ended there before its first checkpoint; what it left is "
                "cleared away (%s), and the run starts afresh",
                folder,
                ", ".join(state.left),
            )
            clear(state)
        elif state.kind != Kind.FRESH:
            raise InputError(f"run folder {str(folder)!r}: {_occupied(state)}")

    def _told(self) -> str | None:
        """The run folder in the environment: of a launcher's user, or of the first process."""
        return os.environ.get(RUN_FOLDER) or None

    def _folder(self, config: Any, named: str | None) -> Path:
        """The run folder, the same in all processes of a run."""
        told = self._told()
        if config.run and told and Path(told).resolve() != Path(config.run).resolve():
            raise InputError(
                f"--run {config.run}: the environment says {RUN_FOLDER}={told}; name one folder"
            )
        return Path(named) if named else self._new_folder(config)

    def _new_folder(self, config: Any) -> Path:
        """A folder that was not there, so that runs that start at once have one each."""
        stems = [Path(file).stem for file in self.files]
        if self.subcommand != "fit":
            stems.append(self.subcommand)
        name = "-".join([time.strftime("%Y%m%d-%H%M%S"), *stems])
        folder, n = Path(config.runs_dir) / name, 1
        while folder.exists():
            n += 1
            folder = Path(config.runs_dir) / f"{name}-{n}"
        return folder

    def before_fit(self) -> None:
        """Refuse an unusable LM or text, and what cannot fit into memory or onto the disk."""
        lm, buffer, world = self.model.lm, self.model.buffer, self.trainer.world_size
        row, lm_bytes = lm.d_row * buffer.dtype.itemsize, lm.n_parameters * lm.dtype.itemsize
        rows = buffer.capacity_tokens + self.model.schedule.batch
        heads, batch = list(self.model.heads().values()), self.model.schedule.batch
        check_room(
            self.model.trainees,
            rows * row,
            lm_bytes,
            self.run_folder,
            max(
                step_bytes(heads, batch // world), start_bytes(self.model.start_tokens, row, world)
            ),
        )
        lm.load_(self.trainer.strategy.root_device)
        self.datamodule.setup("fit")
        self.model.check_lm(self.datamodule, self.trainer.strategy.root_device)
        if not self.config[self.subcommand].get("ckpt_path"):
            self.model.read_first()
        if self.datamodule.cache is not None:
            needed = self.model.schedule.rows_read(self.model.filling_rows)
            fill_(lm, self.datamodule, needed, self.trainer.strategy.root_device)

    def before_validate(self) -> None:
        """Refuse an unusable LM and unusable data."""
        device = self.trainer.strategy.root_device
        self.model.lm.load_(device)
        self.datamodule.setup("validate")
        self.model.check_lm(self.datamodule, device)

    def after_instantiate_classes(self) -> None:
        """Say which heads they are; refuse too long rows; name W&B's group, size validations."""
        for name, head in self.model.heads().items():
            shared = self.config[self.subcommand].model.optimizer
            own = self.model.together.optimizers[name] if self.model.together else {}
            log.info("%s", told_of(name, head, dict(shared.get("init_args") or {}) | own))
        lm, length = self.model.lm, self.datamodule.ctx_len
        lm.check_length(
            length, f"data.ctx_len={length}", f"set --data.ctx_len {lm.positions} or less"
        )
        for logger in self.trainer.loggers if self.trainer else ():  # a plan has none
            if isinstance(logger, RunLogger):
                logger.group_by(lm.hook.name, lm.name)
        if self.datamodule.val_sized:
            every = self.config[self.subcommand].trainer.val_check_interval
            every = spacing(self.model.schedule.steps) if every is None else every
            size = validation_size(self.model, self.datamodule, every)
            self.datamodule.val_tokens = size.tokens
            log.info(
                "validation: %s tokens of each set, %.2g %% of the training's operations for all "
                "validations; --data.val_tokens sets another number",
                f"{size.tokens:,}",
                100 * size.share,
            )

    def after_fit(self) -> None:
        """Calibrate, validate and save, in that order."""
        self.trainer.validate(self.model, self.datamodule, verbose=False)
        if is_first():
            missing = [
                f for f in (HEAD, SUMMARY) for part in self._parts() if not (part / f).exists()
            ]
            if missing:
                raise InputError(
                    f"run folder {str(self.run_folder)!r}: the run ended without {missing[0]} in "
                    f"it; go on with --ckpt_path {self.run_folder}"
                )

    def _parts(self) -> list[Path]:
        """The folders that heads are saved in."""
        return [self.run_folder / name for name in self.model.heads()]


def told_of(name: str, head: SAEHead, optimizer: Mapping[str, Any]) -> str:
    """What a run trains, in a line: kind, width, L0, learning rate.

    Args:
        name: Of one of several heads; empty for one alone.
        head: The head.
        optimizer: Arguments of its optimizer.
    """
    said = [f"{head.d_sae:,} latents on {head.d_model} coordinates"]
    if "target_l0" in arguments_of(type(head)):
        said.append(f"L0 {head.target_l0}")
    said.append(f"learning rate {optimizer.get('lr', 'that of the optimizer')}")
    return f"head {f'{name}: ' if name else ''}{type(head).__name__}, {', '.join(said)}"


def _logger_id(folder: Path) -> str:
    """The W&B id of a run: made once, kept beside it, used again when it is continued."""
    path = folder / LOGGER_ID
    known = path.read_bytes().decode(errors="replace").strip() if path.is_file() else None
    if known and LOGGER_ID_FORM.fullmatch(known):
        return known
    made = uuid.uuid4().hex[:8]
    if is_first():
        if known is not None:
            log.warning("%s: holds no id (%r); W&B logs go to a new run, %s", path, known, made)
        write_text(path, made + "\n")
    return made


def recipe(resolved: str) -> str:
    """A configuration without what concerns one execution: as YAML that runs as `--config`."""
    tree = yaml.safe_load(resolved)
    return yaml.safe_dump({k: v for k, v in tree.items() if k not in EXECUTION}, sort_keys=False)


def _on_command_line(args: Any, key: str) -> bool:
    given = args if isinstance(args, list) else sys.argv[1:]
    return any(a == f"--{key}" or a.startswith(f"--{key}=") for a in given)


def _with_essential(given: Any, essential: Sequence[str]) -> list[Any]:
    """The callbacks of a run: those that make it one, with the settings given, and the extras.

    Args:
        given: What configs and the command line list: extras, and essential ones with settings.
        essential: Class paths, in their order; extras come before `...SaveHead`, which is the first
            of those that look at what all others have found.
    """
    given = [] if given is None else given if isinstance(given, list) else [given]
    listed = {callback.class_path: callback for callback in given}
    own = [listed.pop(path, None) or _by_default(path) for path in essential]
    at = next((i for i, c in enumerate(own) if c.class_path.endswith("SaveHead")), len(own))
    return [*own[:at], *listed.values(), *own[at:]]


def _by_default(class_path: str) -> Namespace:
    """A callback with its default settings, as a config would say it."""
    kind: Any = pydoc.locate(class_path)
    settings = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    return Namespace(class_path=class_path, init_args=Namespace(**settings))


def _refuse_finished(checkpoint: Path, max_steps: int) -> None:
    """Do nothing to a run in which nothing is left to do.

    Raises:
        RunFinished: It has all that was asked for.
        InputError: It has been further already.
    """
    state, step = look(checkpoint.parent.parent, mine=True), step_of(checkpoint)
    if step > max_steps:
        raise InputError(
            f"run folder {str(state.folder)!r}: its checkpoint is of step {step}, and "
            f"--model.tokens or --trainer.max_steps ask for {max_steps} only; ask for more "
            "to extend the run"
        )
    if step == max_steps and state.summary_steps == step:
        raise RunFinished(
            f"run folder {state.folder}: nothing is left to do, the run has its {step:,} steps "
            f"({state.tokens:,} tokens) and is finished; nothing was written. To extend it: "
            f"--ckpt_path {state.folder} --model.tokens MORE"
        )


def _occupied(state: RunState) -> str:
    """Why nothing can be started in a folder, and what to do instead."""
    folder = state.folder
    if state.kind == Kind.FINISHED:
        return (
            f"holds a run already, finished after {state.tokens:,} tokens; extend it with "
            f"--ckpt_path {folder} --model.tokens MORE, or choose another --run"
        )
    if state.kind == Kind.RESUMABLE:
        return (
            f"holds a run already, saved at step {state.step}; go on with it: "
            f"--ckpt_path {folder}; or choose another --run"
        )
    if state.kind == Kind.FOREIGN:
        few = ", ".join(state.left[:5]) + (", ..." if len(state.left) > 5 else "")
        return f"is not empty, and what it holds is not of a run ({few}); choose another --run"
    return (
        "holds a run already, but no whole checkpoint to go on from; choose another --run, or "
        "delete the folder if its results are not wanted"
    )
