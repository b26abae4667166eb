"""KANCurves in real runs: its table, its page, and what stopping and going on leaves of them."""

import json
import os
import re
import signal
import zlib
from base64 import b64decode
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from plotly.offline import get_plotlyjs

from kanllama_lightning.callbacks.kan_curves import COLUMNS, KANCurves
from kanllama_lightning.pages.plots import LIBRARY, curves_figure, page
from kanllama_lightning.types import Curves, InputError
from tests.conftest import SMALL, Fit, IdleTrainer, fit_for_many, only_run
from tests.wandb_file import history
from train import main

FAMILIES = {"linear", "quadratic", "hinge", "saturating", "bump", "none"}


@pytest.fixture
def fit(tiny_lm_dir: Path, text_file: Path, tmp_path: Path) -> Fit:
    """Runs `fit` on the tiny model; arguments by name, `extra` go last."""

    def run(*extra: str, **changed: Any) -> int:
        given = SMALL | {
            "model.head": "KANEncoder",
            "lm.name": str(tiny_lm_dir),
            "data.train": str(text_file),
        }
        given |= {"runs_dir": str(tmp_path / "runs")}
        given |= {k.replace("__", "."): v for k, v in changed.items()}
        return main(["fit", *[f"--{k}={v}" for k, v in given.items()], *extra])

    return run


@pytest.fixture(scope="module")
def undisturbed(
    tiny_lm_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of a KAN head; not to be changed."""
    folder = tmp_path_factory.mktemp("curves") / "run"
    given = SMALL | {"model.head": "KANEncoder", "lm.name": tiny_lm_dir, "data.train": text_file}
    fit_for_many(given | {"run": folder})
    return folder


def test_a_run_of_a_kan_head(undisturbed: Path) -> None:
    folder = undisturbed
    table = pd.read_csv(folder / "curves.csv", keep_default_na=False)
    assert list(table.columns) == COLUMNS
    assert list(table["step"].unique()) == [10, 20, 30, 40]
    assert list(table["kind"].unique()) == ["edge", "hidden unit", "input"]
    assert not table.duplicated(["step", "kind", "rank"]).any()
    sizes = table[table["step"] == 40].groupby("kind").size()
    assert sizes.to_dict() == {"edge": 64, "hidden unit": 16, "input": 16}
    assert table[["bend", "out_of_grid", "r2"]].min().min() >= 0
    assert table[["bend", "out_of_grid", "r2"]].max().max() <= 1 + 1e-9
    assert set(table["reading"]) <= FAMILIES
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["val/kan_bend"] < 1
    assert 0 <= summary["val/kan_out_of_grid"] < 1

    html = (folder / "curves.html").read_text()
    packed = (folder / LIBRARY).read_text().split('"')[1]
    assert zlib.decompress(b64decode(packed)).decode() == get_plotlyjs()
    assert "http:" not in html
    assert "https:" not in html
    assert re.findall(r"src=\S+", html) == [f'src="{LIBRARY}"></script>']
    assert "input 1" in html
    assert "R²" in html
    assert not list(folder.glob("*.tmp"))

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    logged = [row for row in history(file)[0] if any("/curves_" in k for k in row)]
    assert len(logged) == 1
    assert "e_latents/kan_bend" in {k for row in history(file)[0] for k in row}


@pytest.mark.slow
def test_both_sides_of_a_kan_decoder(fit: Fit, tmp_path: Path) -> None:
    assert fit(model__tokens="1280", model__head="OnlyKAN") == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    for key in ("kan_bend", "kan_bend_decoder", "kan_out_of_grid", "kan_out_of_grid_decoder"):
        assert 0 <= summary[f"val/{key}"] <= 1
    table = pd.read_csv(only_run(tmp_path) / "curves.csv")
    assert table["name"].str.contains("straightness").any()


def test_nothing_for_a_head_without_curves(fit: Fit, tmp_path: Path) -> None:
    assert fit(model__tokens="640", model__head="TopK", trainer__logger="false") == 0
    folder = only_run(tmp_path)
    assert not list(folder.rglob("curves*"))
    assert not any("kan" in k for k in json.loads((folder / "summary.json").read_text()))


@pytest.mark.slow
def test_stopped_and_continued_leaves_the_same_table(
    fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Path,
) -> None:
    from kanllama_lightning.training.module import SAEModule

    original = SAEModule.on_before_optimizer_step
    stops = [23]

    def stop_now(self: SAEModule, optimizer: torch.optim.Optimizer) -> None:
        if stops and self.trainer.global_step == stops[0] - 1:
            stops.pop()
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, optimizer)

    monkeypatch.setattr(SAEModule, "on_before_optimizer_step", stop_now)
    assert fit() == 128 + signal.SIGTERM
    folder = only_run(tmp_path)
    with (folder / "curves.csv").open("a", newline="") as file:  # of a validation that was lost
        file.write("30,1920,edge,1,stale,0,0,0,linear,1\r\n")
    assert fit("--ckpt_path=last") == 0
    assert (folder / "curves.csv").read_text() == (undisturbed / "curves.csv").read_text()


def test_every_second_validation_and_the_last() -> None:
    callback = KANCurves(every_n_validations=2)

    trainer, looks = IdleTrainer(), []
    for trainer.global_step in range(4):
        callback.on_validation_start(trainer, None)
        looks.append(callback.looks)
    assert looks == [False, True, False, True]
    continued = KANCurves(every_n_validations=2)
    continued.load_state_dict(callback.state_dict())
    trainer.global_step = 4
    continued.on_validation_start(trainer, None)
    assert not continued.looks
    trainer.state.fn = TrainerFn.VALIDATING
    continued.on_validation_start(trainer, None)
    assert continued.looks


@pytest.mark.parametrize("name", ["every_n_validations", "top"])
def test_refused_arguments(name: str) -> None:
    with pytest.raises(InputError, match=f"KANCurves.{name}=0"):
        KANCurves(**{name: 0})


def curves(n: int, name: str = "input 1 -> hidden 2") -> Curves:
    x = torch.linspace(-1, 1, 101).repeat(n, 1)
    flat = torch.full((n, 101), 1 / 101)
    share = torch.full((n,), 0.5)
    return Curves("edge", [name] * n, ("a <b>", "c"), x, x**2, flat, share, share, share, 0.1, 0.2)


def test_a_grid_that_is_too_narrow_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    callback = KANCurves()
    callback._warn([curves(2)._replace(mean_out_of_grid=0.009)])
    assert not caplog.records
    for _ in range(2):
        callback._warn([curves(2)._replace(mean_out_of_grid=0.002), curves(1)])
    assert [r.getMessage()[:25] for r in caplog.records] == ["20.0 % of what the edge cu"[:25]]


@pytest.mark.parametrize(
    ("n", "shown", "panels"), [(1, 12, 1), (5, 12, 5), (30, 12, 12), (3, 2, 2)]
)
def test_panels(n: int, shown: int, panels: int) -> None:
    figure = curves_figure(curves(n), shown)
    assert len(figure.data) == 3 * panels
    assert sum(bool(trace.showlegend) for trace in figure.data) == 3
    titles = [a.text for a in figure.layout.annotations if "R²" in a.text]
    assert len(titles) == panels
    assert "quadratic, R² 1.000; 50.0% bent" in titles[0]


def test_text_is_escaped() -> None:
    figure = curves_figure(curves(1, "<script>alert(1)</script>"))
    html = page("<script>", "a & b <i>", [figure])
    assert "<script>alert" not in html
    assert html.count("<title>&lt;script&gt;</title>") == 1
    assert "a &amp; b &lt;i&gt;" in html
    assert "a &lt;b&gt;" in json.dumps(figure.to_dict(), default=str)
