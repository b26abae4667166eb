"""`python train.py plan ...`: the arguments of `fit`; nothing is loaded, started or written."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kanllama_lightning.cli.evaluate_command import REPORTS
from kanllama_lightning.cli.fit import KanllamaCLI
from kanllama_lightning.console.terminal import terminal
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.preflight import free_memory
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.plan.cpu_use import CPUUse
from kanllama_lightning.plan.estimate import RunEstimate
from kanllama_lightning.plan.plan_page import RECORD_TOKENS, Free, table
from kanllama_lightning.reports.report import EvalRun
from kanllama_lightning.training.module import check_precision
from kanllama_lightning.types import InputError


class PlanCLI(KanllamaCLI):
    """Parses and checks what `fit` does, and builds the parts, but says what they would take."""

    estimate: RunEstimate

    def before_instantiate_classes(self) -> None:
        """No run folder; no logger and no callbacks, which might start something."""
        trainer = self.config[self.subcommand].trainer
        check_precision(str(trainer.precision))
        trainer.logger, trainer.callbacks = False, None

    def instantiate_trainer(self, **kwargs: Any) -> None:
        """None is needed."""

    def _run_subcommand(self, subcommand: str) -> None:
        trainer = self.config[subcommand].trainer
        cuda = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
        device = torch.device("cuda" if cuda else "cpu")
        module, data = self.model, self.datamodule
        autocast = str(trainer.precision) == "bf16-mixed"
        every, watch = trainer.val_check_interval, CPUUse()
        processes = _devices(trainer.devices, cuda) * trainer.num_nodes
        self.estimate = RunEstimate.of(module.lm, module, data, device, autocast, every, processes)
        name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
        free = Free(free_memory(), shutil.disk_usage(".").free)
        record = _record(module.lm, list(module.heads().values()), data.ctx_len)
        shown = table(self.estimate, module.lm.hook_point, name, free, record)
        terminal().print(shown)
        busy, cores = watch.others(), os.cpu_count() or 1
        if not busy <= cores / 4:
            terminal().print(
                f"Other processes kept {busy:.1f} of {cores} cores busy: the times above are too "
                "long for an idle machine, perhaps many times; plan again when it is."
            )


def _devices(given: Any, cuda: bool) -> int:
    """How many devices of a machine `trainer.devices` names."""
    if isinstance(given, str) and "," in given:
        given = [one for one in given.split(",") if one]
    if isinstance(given, list):
        return len(given)
    if given in ("auto", "-1", -1, None):
        return torch.cuda.device_count() if cuda else 1
    return int(given)


def _record(lm: FrozenLM, heads: Sequence[SAEHead], ctx_len: int) -> dict[str, Work | str]:
    """What every report takes for the heads that it applies to, or why it cannot be, by name."""
    nowhere = Path()
    found: dict[str, Work | str] = {}
    for report in (kind() for kind in REPORTS):
        runs = [EvalRun(nowhere, head, lm, {}, [], nowhere) for head in heads]
        served = [run.head for run in runs if report.applies(run) is None]
        if not served:
            continue
        try:
            found[report.name] = report.work(lm, served, RECORD_TOKENS, ctx_len)
        except InputError as e:
            found[report.name] = str(e)
    return found
