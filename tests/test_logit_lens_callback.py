"""LogitLens in real runs: its table, its figures, and that it changes nothing else."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from kanllama_lightning.callbacks.logit_lens import LogitLens
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.measures.directions import FIGURES
from kanllama_lightning.types import InputError
from tests.conftest import Fit, only_run, rest_slow

OFTEN = {"trainer__val_check_interval": "5"}
COLUMNS = ["step", "tokens", *(f"lens_{name}" for name in FIGURES)]


@pytest.mark.slow
def test_every_fifth_validation_and_the_last(fit: Fit, tmp_path: Path) -> None:
    assert fit(**OFTEN) == 0
    folder = only_run(tmp_path)
    table = pd.read_csv(folder / "lens.csv")
    assert list(table.columns) == COLUMNS
    assert list(table["step"]) == [25, 40]
    assert list(table["tokens"]) == [25 * 64, 40 * 64]
    summary = json.loads((folder / "summary.json").read_text())
    last = table.iloc[-1]
    for name in FIGURES:
        if math.isfinite(last[f"lens_{name}"]):
            assert summary[f"val/lens_{name}"] == pytest.approx(last[f"lens_{name}"], rel=1e-5)
        else:
            assert f"val/lens_{name}" not in summary
    assert last["lens_n_alive"] == round(32 * (1 - summary["val/dead_frac"]))
    assert 1 <= last["lens_kurtosis_median"] < 64
    assert last["lens_curved_frac"] == 0


@pytest.mark.parametrize(
    "head", rest_slow(["OnlyKAN", "KANReLUDense", "DenseOnlyKAN", "Standard"], ["Standard"])
)
def test_heads_of_other_families(fit: Fit, tmp_path: Path, head: str) -> None:
    assert fit(model__tokens="640", model__head=head) == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["val/lens_n_directions"] > 0
    assert summary["val/lens_kurtosis_random"] > 1
    assert 0 <= summary["val/lens_curved_frac"] <= 1
    lens = {k: v for k, v in summary.items() if k.startswith("val/lens_")}
    json.dumps(lens, allow_nan=False)


@pytest.mark.slow
def test_changes_nothing_and_says_nothing_without_it(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        assert fit(**OFTEN, model__tokens="1280", runs_dir=str(tmp_path / name)) == 0
        (folder,) = (tmp_path / name).iterdir()
        summary = json.loads((folder / "summary.json").read_text())
        values = {
            k: v for k, v in summary.items() if not any(w in k for w in ("lens", "second", "time/"))
        }
        return values, SAEHead.load(folder / "head").state_dict()

    with_it = run("with")
    for hook in ("on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"):
        monkeypatch.delattr(LogitLens, hook)  # leaves those of the base class, which do nothing
    without = run("without")
    assert with_it[0] == without[0]
    assert all(torch.equal(with_it[1][k], v) for k, v in without[1].items())


@pytest.mark.slow
def test_stopped_and_continued_leaves_the_same_table(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(**OFTEN, runs_dir=str(tmp_path / "undisturbed")) == 0
    (undisturbed,) = (tmp_path / "undisturbed").iterdir()

    from kanllama_lightning.training.module import SAEModule

    original = SAEModule.on_before_optimizer_step
    stops = [18]

    def stop_now(self: SAEModule, optimizer: torch.optim.Optimizer) -> None:
        if stops and self.trainer.global_step == stops[0] - 1:
            stops.pop()
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, optimizer)

    monkeypatch.setattr(SAEModule, "on_before_optimizer_step", stop_now)
    assert fit(**OFTEN) == 128 + signal.SIGTERM
    folder = only_run(tmp_path)
    stale = "25,1600" + ",0" * len(FIGURES) + "\r\n"  # of a validation that was lost
    (folder / "lens.csv").write_bytes((",".join(COLUMNS) + "\r\n" + stale).encode())
    assert fit("--ckpt_path=last", **OFTEN) == 0
    assert (folder / "lens.csv").read_text() == (undisturbed / "lens.csv").read_text()


@pytest.mark.parametrize("name", ["every_n_validations", "block"])
def test_refused_arguments(name: str) -> None:
    with pytest.raises(InputError, match=f"LogitLens.{name}=0"):
        LogitLens(**{name: 0})
