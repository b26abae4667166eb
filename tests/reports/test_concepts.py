"""The report on known concepts, on the embedded model with few stories."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from kanllama_lightning.console.phase import Phase
from kanllama_lightning.heads import JumpReLU, SAEHead, TopK
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.measures.concept_matching import read_stories
from kanllama_lightning.pages.plots import LIBRARY
from kanllama_lightning.reports import concepts_report as concepts
from kanllama_lightning.reports.concepts_report import ConceptsReport
from kanllama_lightning.reports.report import EvalRun
from kanllama_lightning.types import InputError

KEYS = ["subject", "fact", "kind", "n_tokens", "latent", "threshold"]
SCORES = ["f1", "precision", "recall", "auroc", "best_auroc", "split", "union_recall"]


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM("embedded", "model.layers.1.mlp").load_()


@pytest.fixture
def make_run(lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(concepts, "CONTROL_STORIES", 10)

    def make(kind: type[SAEHead] = TopK, **kwargs: Any) -> EvalRun:
        head = kind(d_model=lm.d_model, d_sae=64, **kwargs)
        head.start_(read_stories(lm, 5, seed=3).x)
        head.save(tmp_path / "baselines" / "untrained")
        (tmp_path / "eval").mkdir()
        return EvalRun(tmp_path, head.eval(), lm, {}, [], tmp_path / "eval")

    return make


def test_report(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, report = make_run(target_l0=4), ConceptsReport(stories=20)
    done: list[tuple[int, int]] = []
    monkeypatch.setattr(Phase, "close", lambda phase: done.append((phase.done, phase.total)))
    report.begin(run)
    before = torch.random.get_rng_state()
    figures = report.finish(run)
    assert done == [(3, 3)]
    assert torch.equal(torch.random.get_rng_state(), before)
    beside = {"svg", LIBRARY}
    assert {p.name for p in run.out.iterdir()} == {*ConceptsReport.files, *beside}
    drawings = sorted(p.name for p in (run.out / "svg").iterdir())
    assert drawings == [f"concepts_{i}.svg" for i in range(5)]
    table = pd.read_csv(run.path("concepts.csv"), keep_default_na=False, na_values=[""])
    assert list(table.columns) == KEYS + SCORES
    subjects = ["head", "raw coordinates", "untrained head"]
    assert list(table["subject"].unique()) == subjects
    assert table.groupby("subject").size().unique().tolist() == [figures["n_facts"]]
    assert figures["n_facts"] > 10
    assert table["n_tokens"].min() >= 20
    for column in ("f1", "precision", "recall", "auroc", "best_auroc", "union_recall"):
        assert table[column].between(0, 1).all(), column
    assert table[table["subject"] == "raw coordinates"]["latent"].max() > run.head.d_model
    assert all(math.isfinite(v) for v in figures.values())
    for prefix in ("", "raw_coordinates/", "untrained_head/"):
        assert 0 <= figures[f"{prefix}recovered_frac"] <= 1
        f1 = table[table["subject"] == (prefix.rstrip("/").replace("_", " ") or "head")]["f1"]
        assert figures[f"{prefix}mean_f1"] == pytest.approx(f1.mean())
    kinds = [v for k, v in figures.items() if k.startswith("kind/") and k.endswith("n_facts")]
    assert sum(kinds) == figures["n_facts"]
    html = (run.out / "concepts.html").read_text()
    assert "http:" not in html
    assert "https:" not in html
    for subject in subjects:
        assert subject in html


def test_without_controls_and_for_a_head_without_target_l0(make_run: Any) -> None:
    run = make_run(JumpReLU, target_l0=4)
    del run.head.target_l0
    figures = ConceptsReport(stories=20, controls=False).finish(run)
    assert not any("/" in k and not k.startswith("kind/") for k in figures)
    assert list(
        pd.read_csv(run.path("concepts.csv"), keep_default_na=False, na_values=[""])[
            "subject"
        ].unique()
    ) == ["head"]


def test_the_same_twice(make_run: Any) -> None:
    run = make_run(target_l0=4)
    report = ConceptsReport(stories=20, seed=9)
    assert report.fresh().finish(run) == report.finish(run)
    assert report.settings() == {"stories": 20, "seed": 9, "controls": True}


def test_too_few_stories(make_run: Any) -> None:
    with pytest.raises(InputError, match="no fact holds on 20 tokens"):
        ConceptsReport(stories=2, controls=False).finish(make_run(target_l0=4))
    with pytest.raises(InputError, match="Concepts.stories=1"):
        ConceptsReport(stories=1)


def test_other_models_are_no_story_world(make_lm: Any, tmp_path: Path) -> None:
    lm = make_lm()
    run = EvalRun(tmp_path, TopK(d_model=lm.d_model, d_sae=8, target_l0=2), lm, {}, [], tmp_path)
    reason = ConceptsReport().applies(run)
    assert reason is not None
    assert "embedded" in reason
    with pytest.raises(InputError, match="report concepts"):
        ConceptsReport().begin(run)


def test_applies_to_the_embedded_model(make_run: Any) -> None:
    assert ConceptsReport().applies(make_run(target_l0=4)) is None
