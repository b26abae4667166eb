"""The concepts callback: in runs on the embedded model, nowhere else, and without a trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerFn

from kanllama_lightning.callbacks.concepts import Concepts
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.training.module import SAEModule
from kanllama_lightning.types import InputError
from tests.conftest import Fit, IdleTrainer, only_run

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = {
    "lm__name": "embedded",
    "lm__untrained": "false",
    "data__train": None,
    "model__head": "TopK",
}
NAMES = {"val/concepts_recovered", "val/concepts_f1", "val/concepts_auroc"}


def callbacks(tmp_path: Path, stories: int | None) -> str:
    """The story world, and the shipped callbacks with few stories or without Concepts."""
    base = yaml.safe_load((ROOT / "configs" / "base.yaml").read_text())["trainer"]["callbacks"]
    kept = [entry for entry in base if not entry["class_path"].endswith("Concepts")]
    assert len(kept) == len(base) - 1
    if stories:
        args = {"every_n_validations": 2, "stories": stories}
        kept.insert(
            0, {"class_path": "kanllama_lightning.callbacks.concepts.Concepts", "init_args": args}
        )
    path = tmp_path / f"callbacks{stories}.yaml"
    corpus = "kanllama_lightning.corpus.StoryWorldCorpus"
    data = {"train": {"class_path": corpus, "init_args": {"n_documents": 500}}}
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": kept}, "data": data}))
    return f"--config={path}"


@pytest.mark.slow
def test_on_the_embedded_model(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, looks = SAEModule.log_dict, []

    def log_dict(self: SAEModule, values: Any, *args: Any, **kwargs: Any) -> None:
        if values.keys() >= NAMES:
            looks.append(values["tokens"])
        original(self, values, *args, **kwargs)

    monkeypatch.setattr(SAEModule, "log_dict", log_dict)
    assert fit(callbacks(tmp_path, 20), **EMBEDDED) == 0
    folder = only_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["val/concepts_recovered"] <= 1
    assert 0 < summary["val/concepts_f1"] < 1
    assert 0.4 < summary["val/concepts_auroc"] < 1
    assert looks == [1280, 2560, 2560], "every second of four, and the final one"

    runs = tmp_path / "without"
    assert fit(callbacks(tmp_path, None), **EMBEDDED, runs_dir=str(runs)) == 0
    (without,) = runs.iterdir()
    weights = SAEHead.load(without / "head").state_dict()
    for name, value in SAEHead.load(folder / "head").state_dict().items():
        assert torch.equal(value, weights[name]), name
    other = json.loads((without / "summary.json").read_text())
    assert other.keys() == summary.keys() - NAMES


def test_nothing_on_another_model(run_folder: Path) -> None:
    assert not any("concepts" in k for k in json.loads((run_folder / "summary.json").read_text()))


def test_every_second_validation_and_the_last() -> None:
    callback = Concepts(every_n_validations=2)

    trainer, looks = IdleTrainer(), []
    for trainer.global_step in range(4):
        callback.on_validation_start(trainer, None)
        looks.append(callback.looks)
    assert looks == [False, True, False, True]
    continued = Concepts(every_n_validations=2)
    continued.load_state_dict(callback.state_dict())
    trainer.global_step = 4
    continued.on_validation_start(trainer, None)
    assert not continued.looks
    trainer.state.fn = TrainerFn.VALIDATING
    trainer.global_step = 4
    continued.on_validation_start(trainer, None)
    assert continued.looks


@pytest.mark.parametrize("name", ["every_n_validations", "stories"])
def test_refused_arguments(name: str) -> None:
    with pytest.raises(InputError, match=f"Concepts.{name}=0"):
        Concepts(**{name: 0})
