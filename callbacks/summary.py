"""The end of a run on one page: `summary.json` and a table."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from callbacks.baselines import Baselines
from kanllama_lightning.run import SUMMARY, write_json

COLUMNS = {
    "L0": ("l0", "{:.2f}"),
    "FVU": ("fvu", "{:.4f}"),
    "CE": ("ce_recon", "{:.4f}"),
    "delta CE": ("delta_ce", "{:.4f}"),
    "CE score": ("ce_score", "{:.4f}"),
    "KL": ("kl_recon", "{:.4f}"),
    "dead": ("dead_frac", "{:.1%}"),
}


class Summary(L.Callback):
    """After the final validation writes `summary.json` (flat keys) and prints the table."""

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
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        summary: dict[str, Any] = {
            "head": type(pl_module.head).__name__,
            "lm": pl_module.lm.name,
            "hook_point": pl_module.lm.hook.name,
            "d_model": pl_module.head.d_model,
            "d_sae": pl_module.head.d_sae,
            "parameters": pl_module.head.n_parameters(),
            "steps": pl_module.tokens_seen // pl_module.schedule.batch,
            "tokens": pl_module.tokens_seen,
            "finished": pl_module.tokens_seen >= pl_module.schedule.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": pl_module.tokens_seen / max(self.seconds, 1e-9),
        }
        summary |= {k: v for k, v in metrics.items() if k.startswith("val/")}
        table = Table(title=self._title(trainer, summary), title_justify="left")
        table.add_column("validation")
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for name in trainer.datamodule.val_names:
            values = {k: metrics.get(f"val/{name}/{k}") for k, _ in COLUMNS.values()}
            _add(table, f"{summary['head']} on {name}", values)
        for name, results in self._baselines(trainer).items():
            clean, zero = metrics["val/ce_clean"], metrics["val/ce_zero"]
            results["ce_score"] = (zero - results["ce_recon"]) / (zero - clean)
            _add(table, name, results)  # type: ignore[arg-type]
            summary |= {
                f"baseline/{name.replace(' ', '_')}/{k}": results[k] for k, _ in COLUMNS.values()
            }
        folder = Path(trainer.default_root_dir)
        write_json(folder / SUMMARY, summary)
        if isinstance(trainer.logger, WandbLogger):
            trainer.logger.experiment.summary.update(json.loads(json.dumps(summary)))
        console = Console(width=max(100, Console().width))
        console.print(table)
        console.print(f"Everything is in {folder}", soft_wrap=True, highlight=False)

    @staticmethod
    def _title(trainer: L.Trainer, summary: dict[str, Any]) -> str:
        clean, zero = (
            float(trainer.callback_metrics[f"val/ce_{run}"]) for run in ("clean", "zero")
        )
        return (
            f"{summary['head']}, {summary['d_sae']} latents, {summary['parameters']:,} parameters; "
            f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s\n"
            f"{summary['hook_point']} of {summary['lm']}\n"
            f"CE of the LM in nats per token: {clean:.4f} untouched, {zero:.4f} zero-ablated"
        )

    @staticmethod
    def _baselines(trainer: L.Trainer) -> dict[str, dict[str, float]]:
        for callback in trainer.callbacks:
            if isinstance(callback, Baselines):
                return callback.results
        return {}


def _add(table: Table, name: str, values: dict[str, float | None]) -> None:
    cells = []
    for key, form in COLUMNS.values():
        value = values.get(key)
        cells.append("" if value is None else form.format(value))
    table.add_row(name, *cells)
