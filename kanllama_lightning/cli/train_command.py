"""What `train.py` runs: a command, and what is said when it does not end well."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import wandb
import yaml
from jsonargparse import set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException

from kanllama_lightning.callbacks.log_config import LogConfig
from kanllama_lightning.cli.arguments import (
    SUBCOMMANDS,
    explain,
    load_yaml,
    meant,
    parsed_from,
    refuse_linked,
)
from kanllama_lightning.cli.fit import RUN_FOLDER, KanllamaCLI
from kanllama_lightning.console.entry import Aftermath, guarded
from kanllama_lightning.console.quiet import is_first, quiet
from kanllama_lightning.console.stopping import CacheStopped, Stopped, say
from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.runs.checkpoints import newest_whole
from kanllama_lightning.runs.folder import (
    CONFIG,
    remove_parts,
    remove_unused,
)
from kanllama_lightning.storage.lock import gone
from kanllama_lightning.training.module import SAEModule
from kanllama_lightning.types import InputError, RunDiverged, RunFinished

ROOT = Path(__file__).resolve().parents[2]


ESSENTIAL = tuple(
    f"kanllama_lightning.callbacks.{name}"
    for name in (
        "validation_pace.ValidationPace",
        "progress.Progress",
        "sparsity.Sparsity",
        "reconstruction.Reconstruction",
        "spliced_loss.SplicedLoss",
        "baselines.Baselines",
        "save_head.SaveHead",
        "summary.Summary",
        "checkpoint.RunCheckpoint",
    )
)
"""What makes a run a run, whatever a config lists; an entry of the same class gives settings."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        args: Arguments without the program's name (default: those of the process).
    """
    quiet()
    given = list(sys.argv[1:] if args is None else args)
    after = Aftermath(explain, _stopped, lambda: KanllamaCLI.place, _onward, _clear)
    return guarded(lambda: _run(given, args is None), given, after)


def _run(given: list[str], started: bool) -> int:
    """The command itself.

    Args:
        given: Arguments.
        started: Whether they are those of the process.
    """
    own = sys.argv
    # what a launcher of further processes starts again
    sys.argv = own if started else [str(ROOT / "train.py"), *given]
    told, unused = os.environ.get(RUN_FOLDER), False
    KanllamaCLI.made, KanllamaCLI.place, KanllamaCLI.met = False, None, None
    try:
        kind = KanllamaCLI
        if given[:1] == ["plan"]:
            from kanllama_lightning.cli.plan_command import PlanCLI

            kind, given = PlanCLI, ["fit", *given[1:]]
        line = meant(given)
        given = line.canonical()
        set_loader("yaml", load_yaml, (yaml.YAMLError,))
        refuse_linked(given)
        KanllamaCLI.given, KanllamaCLI.files = given, line.files
        kind(
            SAEModule,
            TokenData,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "allow_abbrev": False,
                "exit_on_error": False,
                **{sub: {"exit_on_error": False} for sub in SUBCOMMANDS},
            },
            args=parsed_from(line),
            save_config_callback=LogConfig,
            essential=ESSENTIAL,
        )
    except RunFinished as e:
        say(str(e))
    except InputError:
        unused = True
        raise
    except Stopped as e:
        unused = e.step is None
        raise
    except RunDiverged as e:
        if is_first():
            say(f"error: {e.what}. {_after_divergence(e.folder)}")
        return 1
    except MisconfigurationException as e:
        unused = True
        raise InputError(f"Lightning refuses this configuration: {e}") from e
    except Exception as e:
        if KanllamaCLI.lock is None or not KanllamaCLI.lock.lost:
            raise
        raise InputError(gone(KanllamaCLI.lock.folder)) from e
    finally:
        sys.argv = own
        os.environ.pop(RUN_FOLDER, None)
        if told is not None:
            os.environ[RUN_FOLDER] = told
        if wandb.run is not None:
            wandb.finish()
        _let_go(unused)
    return 0


def _after_divergence(folder: Path) -> str:
    """Where the last good state is, and what to change."""
    checkpoint = newest_whole(folder)
    kept = f"The last good checkpoint is {checkpoint}" if checkpoint else "No checkpoint was saved"
    return (
        f"{kept}; the same settings would end here again: start anew with a lower "
        "--model.optimizer.lr, or with the LM in float32 if its activations are the cause"
    )


def _let_go(unused: bool) -> None:
    """Give the run folder back; leave no empty run behind a mistake or an early Ctrl-C.

    Args:
        unused: Whether the run ended before it began, as far as is known.
    """
    lock, KanllamaCLI.lock = KanllamaCLI.lock, None
    if lock is None:
        return
    folder, gone_already = lock.folder, lock.lost
    lock.release()
    if gone_already or not unused or not KanllamaCLI.made:
        return
    remove_unused(folder)


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
    if not KanllamaCLI.made and KanllamaCLI.place is not None:
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
    """Leave nothing half written behind a full disk."""
    if disk and KanllamaCLI.place is not None and is_first():
        remove_parts(KanllamaCLI.place)
