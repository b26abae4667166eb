"""The end of a run on one page: `summary.json` and a table."""

import math
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table

from kanllama_lightning.callbacks.baselines import UNTRAINED, Baselines
from kanllama_lightning.callbacks.checkpoint import RunCheckpoint
from kanllama_lightning.callbacks.validation_pace import ValidationPace
from kanllama_lightning.console.terminal import terminal
from kanllama_lightning.measures import cells
from kanllama_lightning.measures.metrics import score
from kanllama_lightning.runs.folder import SUMMARY, head_folder
from kanllama_lightning.runs.sections import by_section
from kanllama_lightning.runs.wandb_logger import watch_command
from kanllama_lightning.storage.small_files import plain, write_json

DELTA_CE = "delta CE (95 % interval)"
COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "L0": lambda values: cells.plain(values, "l0", "{:.2f}"),
    "FVU": lambda values: cells.plain(values, "fvu", "{:.4f}"),
    DELTA_CE: cells.delta_ce,
    cells.SHARE: cells.share,
    "KL": lambda values: cells.plain(values, "kl_recon", "{:.4f}"),
    "dead": lambda values: cells.plain(values, "dead_frac", "{:.1%}"),
}
"""Columns of the table; losses in nats per token."""
OF_CONTROLS = (
    *("l0", "fvu", "ce_recon", "delta_ce", "delta_ce_low", "delta_ce_high", "delta_ce_share"),
    *("ce_score", "kl_recon", "dead_frac"),
)
"""Figures of a control that `summary.json` has."""
ABLATIONS = ("ce_zero", "ce_mean", "kl_zero")
"""What controls share with the head: the same tokens, the same positions."""


class Summary(L.Callback):
    """After the final validation writes `summary.json` (flat keys) and prints the table.

    Of heads side by side each folder gets its own, and the run's has all of them under their names.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Training time so far, over all sessions of a run."""
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.seconds = state_dict["seconds"]

    def _elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self._began if self._began else 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self.seconds, self._began = self._elapsed(), 0.0

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write and print, after the final validation only."""
        final = trainer.state.fn == TrainerFn.VALIDATING
        if not final or not trainer.is_global_zero or not pl_module.started:
            return
        shared: dict[str, Any] = {
            "lm": pl_module.lm.name,
            "hook_point": pl_module.lm.hook.name,
            **({"input_point": lm.input.name} if (lm := pl_module.lm).input else {}),
            "d_model": pl_module.head.d_model,
            "steps": pl_module.tokens_seen // pl_module.schedule.batch,
            "tokens": pl_module.tokens_seen,
            "finished": pl_module.tokens_seen >= pl_module.schedule.tokens,
            "seconds": round(self.seconds, 3),
            **self._between_steps(trainer),
            "tokens_per_second": pl_module.tokens_seen / max(self.seconds, 1e-9),
            **{f"time/{part}": share for part, share in pl_module.clock.overall().items()},
        }
        baselines = self._baselines(trainer)
        found = {
            name: self._of_head(trainer, name, head, shared, baselines.get(name, {}))
            for name, head in pl_module.heads().items()
        }
        root = Path(trainer.default_root_dir)
        summary = dict(found[""]) if "" in found else shared | {"heads": list(found)}
        for name, values in found.items():
            write_json(head_folder(root, name) / SUMMARY, values)
            if name:
                summary |= {f"{name}/{k}": v for k, v in values.items() if k not in shared}
        write_json(root / SUMMARY, summary)
        if isinstance(trainer.logger, WandbLogger):
            self._send(trainer.logger, plain(summary))
        console = terminal(max(100, terminal().width))
        console.print(self._table(trainer, shared, found, baselines))
        said = f"Everything is in {root}"
        if isinstance(trainer.logger, WandbLogger):
            watch = watch_command(trainer.logger.experiment)
            said += f"; `{watch}` shows its course" if watch else ""
        said += f"; `python evaluate.py report {shlex.quote(str(root))}` writes its record"
        console.print(said, soft_wrap=True, highlight=False)

    @staticmethod
    def _between_steps(trainer: L.Trainer) -> dict[str, float]:
        """Those of the `seconds` that went to checkpoints and to validations within training."""
        found = {}
        for callback in trainer.callbacks:
            if isinstance(callback, RunCheckpoint):
                found["seconds_in_checkpoints"] = round(callback.share.spent, 3)
            elif isinstance(callback, ValidationPace):
                found["seconds_in_validations"] = round(callback.share.spent, 3)
        return found

    @staticmethod
    def _send(logger: WandbLogger, summary: dict[str, Any]) -> None:
        """To W&B, what it does not have: controls, also as charts; what the run ended with."""
        own = {k: v for k, v in summary.items() if "val" not in k.split("/") and v is not None}
        controls = {k: v for k, v in own.items() if "baseline" in k.split("/")}
        if controls:
            logger.log_metrics(controls | {"tokens": summary["tokens"]})
        logger.experiment.summary.update(by_section(own))

    @staticmethod
    def _of_head(
        trainer: L.Trainer,
        name: str,
        head: Any,
        shared: dict[str, Any],
        baselines: dict[str, dict[str, float]],
    ) -> dict[str, Any]:
        """Flat keys of one head; its controls get their scores."""
        metrics = _metrics(trainer, name)
        summary = {
            "head": head.title,
            "d_sae": head.d_sae,
            "parameters": head.n_parameters(),
            **shared,
        }
        summary |= {k: v for k, v in metrics.items() if k.startswith("val/")}
        for control, results in baselines.items():
            costs = {key: metrics[f"val/{key}"] for key in ABLATIONS}
            losses = {key: results[key] for key in ("ce_clean", "ce_recon", "kl_recon")}
            results |= score(losses | costs, int(results["ce_tokens"]))
            under = f"baseline/{control.replace(' ', '_')}"
            summary |= {f"{under}/{k}": results[k] for k in OF_CONTROLS}
        return {k: None if _is_nan(v) else v for k, v in summary.items()}

    def _table(
        self,
        trainer: L.Trainer,
        shared: dict[str, Any],
        found: dict[str, dict[str, Any]],
        baselines: dict[str, dict[str, dict[str, float]]],
    ) -> Table:
        table = Table(title=self._title(trainer, shared, found), title_justify="left")
        table.add_column("validation")
        for column in COLUMNS:
            table.add_column(column, justify="right", no_wrap=column == DELTA_CE)
        sets = trainer.datamodule.val_names
        for name, summary in found.items():
            metrics = _metrics(trainer, name)
            for which in sets:
                under = f"val/{which}/"
                values = {k.removeprefix(under): v for k, v in metrics.items() if under in k}
                _add(table, f"{name or summary['head']} on {which}", values)
        added: list[tuple[str, dict[str, float]]] = []
        for name, own in baselines.items():
            for control, results in own.items():
                if (control, results) in added:  # of heads of one sparsity
                    continue
                added.append((control, results))
                whose = f" of {name}" if name and control == UNTRAINED else ""
                _add(table, f"{control}{whose} on {sets[0]}", results)
        said = [str(cell) for column in table.columns for cell in column.cells]
        table.caption, table.caption_justify = cells.footnote(said) or None, "left"
        return table

    @staticmethod
    def _title(trainer: L.Trainer, shared: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
        first = next(iter(found))
        losses = _metrics(trainer, first)
        clean, mean, zero, uniform = (
            losses[f"val/ce_{run}"] for run in ("clean", "mean", "zero", "uniform")
        )
        heads = [
            f"{name + ': ' if name else ''}{s['head']}, {s['d_sae']} latents, "
            f"{s['parameters']:,} parameters"
            for name, s in found.items()
        ]
        return (
            "\n".join(heads) + f"; {shared['tokens']:,} tokens in {shared['seconds']:.0f} s\n"
            f"{shared['hook_point']} of {shared['lm']}\n"
            f"CE of the LM in nats per token: {clean:.4f} untouched, {mean:.4f} mean-ablated, "
            f"{zero:.4f} zero-ablated, {uniform:.4f} of a uniform guess"
        )

    @staticmethod
    def _baselines(trainer: L.Trainer) -> dict[str, dict[str, dict[str, float]]]:
        for callback in trainer.callbacks:
            if isinstance(callback, Baselines):
                return callback.results
        return {}


def _metrics(trainer: L.Trainer, name: str) -> dict[str, float]:
    """What was logged of a head, without its name."""
    prefix = f"{name}/" if name else ""
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _add(table: Table, name: str, values: Mapping[str, Any]) -> None:
    table.add_row(name, *(cell(values) for cell in COLUMNS.values()))
