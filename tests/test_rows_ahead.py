"""Activations that a GPU makes a step before they are needed; a CPU can do so as well."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kanllama_lightning.functional import sinks, sparse
from kanllama_lightning.training.head_trainer import HeadTrainer
from kanllama_lightning.training.module import SAEModule
from tests.conftest import Fit
from tests.shapes import unchecked

RATIOS = pytest.mark.parametrize("ratio", [sinks.SINK_RATIO, 1.0])
"""No sinks, and half of all rows: then what was made ahead is too little, and is waited for."""


class Watched:
    """Batches by step, and how often rows were made ahead of a step that had enough."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: dict[int, Tensor] = {}
        self.ahead = 0
        step, look = HeadTrainer.step, SAEModule._look_ahead_

        def stepped(trainee: HeadTrainer, x: Tensor, at: int, progress: float):
            assert at not in self.batches
            self.batches[at] = x.clone()
            return step(trainee, x, at, progress)

        def looked(module: SAEModule, batches: object) -> None:
            self.ahead += 1
            look(module, batches)  # type: ignore[arg-type]

        monkeypatch.setattr(HeadTrainer, "step", stepped)
        monkeypatch.setattr(SAEModule, "_look_ahead_", looked)


def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "COUNTED_ON", ())


@RATIOS
def test_rows_made_ahead_are_those_made_when_needed(
    ratio: float, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And a run that stops goes on with the same ones, whatever had been made ahead."""
    monkeypatch.setattr(sinks, "SINK_RATIO", ratio)
    given = {"model__head": "TopK", "trainer__val_check_interval": "40"}
    with unchecked():
        with monkeypatch.context() as patch:
            needed = Watched(patch)
            assert fit(runs_dir=str(tmp_path / "needed"), **given) == 0
        assert needed.ahead == 0
        fixed(monkeypatch)
        with monkeypatch.context() as patch:
            ahead = Watched(patch)
            assert fit(runs_dir=str(tmp_path / "ahead"), **given) == 0
        assert ahead.ahead > 0
        again = Watched(monkeypatch)
        stopped = {"runs_dir": str(tmp_path / "stopped"), **given}
        assert fit(**stopped, trainer__max_steps="7") == 0
        assert fit("--ckpt_path=last", **stopped) == 0
    assert list(needed.batches) == list(ahead.batches) == list(again.batches) == list(range(40))
    for step, batch in needed.batches.items():
        assert torch.equal(batch, ahead.batches[step]), step
        assert torch.equal(batch, again.batches[step]), step
