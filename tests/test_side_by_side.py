"""Several heads on the same activations: each exactly what it would be alone."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kanllama_lightning.cli.evaluate_command import main as evaluate
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.training.side_by_side import SideBySide
from kanllama_lightning.types import InputError
from tests.conftest import ALONE, SMALL, Fit, fit_for_many, read_rows, side_by_side_config
from tests.shapes import unchecked
from tests.wandb_file import history
from train import main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
HEADS: dict[str, dict[str, Any]] = {
    "linear": {"class_path": "BatchTopK", "lr": 0.02},
    "kan": {"class_path": "KANEncoder", "init_args": {"d_sae": 24, "target_l0": 3}},
    "gated": {"class_path": "Gated", "init_args": {"seed": 5}},
}
PRINTED = "printed.txt"


@pytest.fixture(scope="module")
def run(tiny_lm_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three heads; not to be changed."""
    folder = tmp_path_factory.mktemp("side_by_side")
    given = {k: v for k, v in SMALL.items() if k not in ALONE}
    given |= {"lm.name": tiny_lm_dir, "data.train": text_file, "run": folder / "run"}
    given |= {"model.tokens": 1280}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fit_for_many(given, side_by_side_config(folder, HEADS))
    (folder / PRINTED).write_text(printed.getvalue())
    return folder / "run"


def test_the_closing_table_has_the_controls(run: Path) -> None:
    """Each that is the same for two heads once."""
    table = (run.parent / PRINTED).read_text().partition("validation")[2]
    first = [cells[1] for line in table.splitlines() if len(cells := line.split("│")) > 2]
    text = " ".join(" ".join(first).split())
    for name in HEADS:
        assert text.count(f"untrained head of {name} on") == 1
    assert text.count("PCA on") == 2, "at L0 4 and at L0 3"


@pytest.mark.slow
def test_each_head_is_what_it_would_be_alone(run: Path, tmp_path: Path) -> None:
    """Weights, statistics and every row of the tables, bit for bit."""
    for name in HEADS:
        folder = tmp_path / "alone" / name
        args = ["fit", f"--config={run / name / 'config.yaml'}", f"--run={folder}"]
        assert main(args) == 0
        want, got = (SAEHead.load(f / "head").state_dict() for f in (folder, run / name))
        assert want.keys() == got.keys()
        for key, value in want.items():
            assert torch.equal(got[key], value), (name, key)
        for table in ("l0.csv", "losses.csv", "lens.csv"):
            assert read_rows(run / name / table) == read_rows(folder / table), (name, table)
        a, b = (json.loads((f / "summary.json").read_text()) for f in (folder, run / name))
        for summary in (a, b):
            for key in [k for k in summary if k.startswith(("time/", "seconds", "tokens_per"))]:
                del summary[key]
        assert a == b


@pytest.mark.slow
def test_gated_is_what_its_own_config_makes_of_it(run: Path, fit: Fit, tmp_path: Path) -> None:
    """Bit for bit, momentum left out as in configs/gated.yaml; the others keep theirs."""
    folder = tmp_path / "alone"
    size = ["--model.head.d_sae=32", "--model.head.target_l0=4", "--model.optimizer.lr=0.01"]
    size += ["--head_seed=5", "--model.tokens=1280"]  # as side by side
    assert fit(f"--config={CONFIGS / 'gated.yaml'}", *size, run=str(folder), **ALONE) == 0
    want, got = (SAEHead.load(f / "head").state_dict() for f in (folder, run / "gated"))
    for key, value in want.items():
        assert torch.equal(got[key], value), key
    betas = {}
    for name in HEADS:
        config = yaml.safe_load((run / name / "config.yaml").read_text())
        betas[name] = config["model"]["optimizer"]["init_args"]["betas"]
    assert betas == {"linear": [0.9, 0.999], "kan": [0.9, 0.999], "gated": [0.0, 0.999]}


@pytest.mark.slow
def test_a_head_may_have_any_argument_of_the_optimizer(fit: Fit, tmp_path: Path) -> None:
    heads = {
        "plain": {"class_path": "TopK"},
        "own": {"class_path": "TopK", "optimizer": {"lr": 0.02, "eps": 1e-3, "betas": [0.5, 0.9]}},
        "momentum": {"class_path": "Gated", "optimizer": {"betas": [0.9, 0.999]}},
    }
    run = tmp_path / "together"
    assert fit(side_by_side_config(tmp_path, heads), run=str(run), **ALONE) == 0
    own = yaml.safe_load((run / "own/config.yaml").read_text())["model"]["optimizer"]["init_args"]
    assert (own["lr"], own["eps"], own["betas"]) == (0.02, 1e-3, [0.5, 0.9])
    gated = yaml.safe_load((run / "momentum/config.yaml").read_text())["model"]["optimizer"]
    assert gated["init_args"]["betas"] == [0.9, 0.999]
    alone = tmp_path / "alone"
    assert main(["fit", f"--config={run / 'own/config.yaml'}", f"--run={alone}"]) == 0
    want, got = (SAEHead.load(f / "head").state_dict() for f in (alone, run / "own"))
    plain = SAEHead.load(run / "plain/head").state_dict()
    for key, value in want.items():
        assert torch.equal(got[key], value), key
    assert not torch.equal(plain["decoder.W_dec"], got["decoder.W_dec"])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"nesterov": True}, "heads.a.optimizer"),
        pytest.param({"betas": [2.0, 0.9]}, "heads.a.optimizer", marks=pytest.mark.slow),
        ({"lr": float("nan")}, "NaN is no value"),
        ([0.9], "heads.a.optimizer=[0.9]: must be arguments"),
    ],
)
def test_arguments_the_optimizer_does_not_take_are_one_line(
    optimizer: Any,
    message: str,
    fit: Fit,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = side_by_side_config(tmp_path, {"a": {"class_path": "TopK", "optimizer": optimizer}})
    assert fit(wrong, **ALONE) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"d_model": 32}, "heads.a.init_args.d_model: follows from the LM"),
        ({"seed": -4}, "heads.a.init_args.seed_everything=-4: must be a whole number"),
        ([3], "heads.a.init_args=[3]: must be arguments"),
    ],
)
def test_arguments_that_are_not_a_heads_own_are_one_line(
    own: Any, message: str, fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = side_by_side_config(tmp_path, {"a": {"class_path": "TopK", "init_args": own}})
    assert fit(wrong, **ALONE) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    assert message in line


def test_figures_are_logged_under_the_names(run: Path) -> None:
    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    found, _ = history(path)
    logged = {key for row in found for key in row}
    for name in HEADS:
        assert {f"a_main/loss/{name}", f"b_train/lr/{name}", f"a_main/fvu/{name}"} <= logged
    assert "i_debug/dropped_frac" in logged
    assert "a_main/fvu" not in logged
    first = next(row for row in found if "b_train/lr/kan" in row)
    assert first["b_train/lr/linear"] / first["b_train/lr/kan"] == pytest.approx(0.02 / 0.01)


def test_summary_names_the_heads(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["heads"] == list(HEADS)
    assert summary["finished"] is True
    own = json.loads((run / "kan" / "summary.json").read_text())
    assert summary["kan/val/fvu"] == own["val/fvu"]
    assert own["d_sae"] == 24
    assert "baseline/PCA/fvu" in own


@pytest.mark.slow
def test_the_record_takes_the_run_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`compare RUN` compares its heads; `report RUN` reports on each; one pass of the LM."""
    run = shutil.copytree(run, tmp_path / "run", symlinks=True)
    out = tmp_path / "comparison"
    given = ["--documents", "10", "--wandb", "false"]
    assert evaluate(["compare", str(run), "--out", str(out), *given]) == 0
    compared = {row["run"] for row in read_rows(out / "comparison.csv")}
    assert compared == set(HEADS)
    assert (out / "comparison.html").is_file()
    # named as people name it, and sent to the run that logged all of the heads
    monkeypatch.chdir(tmp_path)
    assert (
        evaluate(["report", "run", "--reports", "sparsity", "--again", "true", "--documents", "10"])
        == 0
    )
    assert all((run / name / "eval" / "l0.csv").is_file() for name in HEADS)
    pieces = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
    sent = {key for piece in pieces for row in history(piece)[0] for key in row}
    for name in HEADS:
        assert [key for key in sent if key.startswith(f"j_record/{name}/")], sorted(sent)


def test_what_needs_one_head_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(["try", str(run), "--text", "w1 w2"]) == 2
    assert f"name the folder of one of them: {run / 'linear'}" in capsys.readouterr().err


def test_a_head_may_have_a_seed_of_its_own() -> None:
    heads = {n: {"class_path": "TopK", "init_args": {"seed": s}} for n, s in (("a", 1), ("b", 2))}
    both = SideBySide(8, heads | {"c": {"class_path": "TopK"}}, d_sae=16, target_l0=2, seed=2)
    weights = {name: head.decoder.W_dec for name, head in both.members.items()}
    assert not torch.equal(weights["a"], weights["b"])
    assert torch.equal(weights["b"], weights["c"])


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({}, "at least one head"),
        ({"a/b": {"class_path": "TopK"}}, "a/b: the name is that of a folder"),
        ({"eval": {"class_path": "TopK"}}, "eval: the name is that of a folder"),
        ({"a": "TopK"}, "must be a class_path with init_args"),
        ({"a": {"class_path": "TopK", "k": 4}}, r"heads\.a\.k: no such key"),
        ({"a": {"class_path": "TopK", "lr": -1}}, r"heads\.a\.lr=-1: must be a finite number"),
        ({"a": {"class_path": "TopK", "init_args": {"target_l0": 99}}}, r"heads\.a: .*target_l0"),
        ({"a": {"class_path": "TopK", "init_args": {"k": 9}}}, r"heads\.a: .*k"),
        ({"a": {"class_path": "Nothing"}}, r"heads\.a: .*Nothing"),
    ],
)
def test_mistakes_are_named(heads: Any, message: str) -> None:
    with unchecked(), pytest.raises(InputError, match=message):
        SideBySide(8, heads, d_sae=16, target_l0=2)


def test_a_control_takes_no_shared_sparsity() -> None:
    """What the heads share goes to those that have it; that a control is not trained is said."""
    pca = {"class_path": "PCA", "init_args": {"d_sae": 4}}
    made = SideBySide(8, {"pca": pca}, d_sae=16, target_l0=2)
    assert made.members["pca"].d_sae == 4
    linear = {"class_path": "LinearMap"}
    assert SideBySide(8, {"a": linear}, target_l0=2, transcoder=True).members["a"].d_sae == 1
    with pytest.raises(InputError, match=r"heads\.linear: .*LinearMap is a control"):
        SideBySide(8, {"linear": linear}, d_sae=9, target_l0=2, transcoder=True)


def test_a_mistake_on_the_command_line_is_one_line(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = side_by_side_config(tmp_path, {"a": {"class_path": "TopK", "init_args": {"k": 9}}})
    assert fit(wrong, **ALONE) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "model.head.heads.a" in err
    assert "Traceback" not in err
