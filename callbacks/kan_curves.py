"""What a KAN head has learned: which of its curves bend, how, and over what they see."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from kanllama_lightning.callbacks.looking import LookingCallback
from kanllama_lightning.functional import ranks
from kanllama_lightning.functional.curves import reading
from kanllama_lightning.pages.plots import curves_figure, write_page
from kanllama_lightning.runs.folder import Table, head_folder, prefixed
from kanllama_lightning.types import Curves, InputError

log = logging.getLogger(__name__)

TABLE, PAGE = "curves.csv", "curves.html"
COLUMNS = ["step", "tokens", "kind", "rank", "name", "bend", "size", "out_of_grid", "reading", "r2"]
ROWS = 4096
"""Activations of the first validation set that the curves are judged over."""
OUT_OF_GRID = 0.01
"""Share beyond the grid from which on a run says so."""


class KANCurves(LookingCallback):
    """The most bent curves of a KAN head; does nothing at all for a head without curves.

    Writes `curves.csv` of each head (bend: share of a curve's variance that no straight line
    explains; size: its RMS deviation; reading: a family that fits, and R2), logs `val/kan_bend`
    (bend of all curves, weighted by their variance) and `val/kan_out_of_grid`, with `_decoder`
    behind the name for those of a KAN decoder. The final validation also draws `curves.html`, which
    opens offline. A validation at step s first drops rows of step s and later, as all tables do.

    Args:
        every_n_validations: Validations from one look at the curves to the next; the final one
            always looks.
        top: Curves of each kind.
    """

    def __init__(self, every_n_validations: int = 1, top: int = 64) -> None:
        super().__init__(every_n_validations)
        if top < 1:
            raise InputError(f"KANCurves.top={top}: must be at least 1")
        self.top = top
        self._warned = False
        self._x: list[Tensor] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begin without rows."""
        super().on_validation_start(trainer, pl_module)
        self._x = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take rows of the first set, until there are enough."""
        room = ROWS // trainer.world_size - sum(len(x) for x in self._x)
        if self.looks and dataloader_idx == 0 and room > 0:
            self._x.append(next(iter(outputs.values())).rows[:room])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look at the curves; log, write and draw."""
        if not self.looks:
            return
        own = torch.cat(self._x) if self._x else torch.zeros(0, pl_module.head.d_row)
        self._x = []
        with ranks.pooled():
            x = ranks.rows(own.to(pl_module.device))
        for name, head in pl_module.heads().items():
            found = head.curves(x, self.top) if len(x) else []
            if found:
                self._report(trainer, pl_module, name, found, len(x))

    def _report(
        self, trainer: L.Trainer, pl_module: Any, name: str, found: list[Curves], rows: int
    ) -> None:
        logged: dict[str, float] = {}
        for curves in found:
            which = "_decoder" if curves.kind.startswith("decoder") else ""
            logged.setdefault(f"val/kan_bend{which}", curves.mean_bend)
            logged.setdefault(f"val/kan_out_of_grid{which}", curves.mean_out_of_grid)
        self._warn(found)
        pl_module.log_dict(prefixed(name, logged) | {"tokens": float(pl_module.tokens_seen)})
        if not trainer.is_global_zero:
            return
        table = Table(head_folder(trainer.default_root_dir, name) / TABLE, COLUMNS)
        where = {"step": trainer.global_step, "tokens": pl_module.tokens_seen}
        table.put(trainer.global_step, [where | row for curves in found for row in _rows(curves)])
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._draw(trainer, pl_module, name, found, rows)

    def _warn(self, found: list[Curves]) -> None:
        """Say once when a grid has become too narrow for what lies on it (METHODS B3d)."""
        worst = max(found, key=lambda curves: curves.mean_out_of_grid)
        if worst.mean_out_of_grid > OUT_OF_GRID and not self._warned:
            self._warned = True
            log.warning(
                "%.1f %% of what the %s curves see lies beyond their grid, where they are straight "
                "lines or fade; %s says of which",
                100 * worst.mean_out_of_grid,
                worst.kind,
                TABLE,
            )

    @staticmethod
    def _draw(
        trainer: L.Trainer, pl_module: Any, name: str, found: list[Curves], rows: int
    ) -> None:
        figures = {curves.kind: curves_figure(curves) for curves in found}
        kind = pl_module.heads()[name].title
        title = f"Curves of {name or kind}" + (f" ({kind})" if name else "")
        text = (
            f"{pl_module.lm.hook.name} of {pl_module.lm.name}, after {pl_module.tokens_seen:,} "
            f"tokens of training; judged over {rows:,} activations of the first validation set. "
            "Ranked by the RMS distance of a curve from its best straight line; the bent share is "
            "that of its variance which the line leaves over. “by” and “into” in brackets: the "
            "share is that of many curves together, and the most bent of them is drawn. R² is that "
            "of the simplest family with 0.98 or more; where there is none, the best of all. More "
            f"curves are in {TABLE}."
        )
        path = head_folder(trainer.default_root_dir, name) / PAGE
        write_page(path, title, text, list(figures.values()), Path(trainer.default_root_dir))
        if isinstance(trainer.logger, WandbLogger):
            named = {f"val/curves_{k.replace(' ', '_')}": f for k, f in figures.items()}
            drawn = prefixed(name, named) | {"tokens": pl_module.tokens_seen}
            trainer.logger.log_metrics(drawn)


def _rows(curves: Curves) -> list[dict[str, Any]]:
    """Rows of the table, most bent first."""
    rows = []
    for i, name in enumerate(curves.names):
        family, r2 = reading(curves.points[i], curves.values[i], curves.density[i])
        rows.append(
            {
                "kind": curves.kind,
                "rank": i + 1,
                "name": name,
                "bend": curves.bend[i].item(),
                "size": curves.size[i].item(),
                "out_of_grid": curves.out_of_grid[i].item(),
                "reading": family,
                "r2": r2,
            }
        )
    return rows
