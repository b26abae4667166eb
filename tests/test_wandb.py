"""Weights & Biases: pieces of one run follow on each other; without a network it logs offline."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import plotly.graph_objects as go
import pytest
import wandb
from wandb.integration.weave.weave import init_weave_if_imported

from docs import make_workspace
from kanllama_lightning.cli import main
from kanllama_lightning.reports.send import table_of, titled
from kanllama_lightning.runs.sections import SECTIONS, by_section, charted, titled_section
from kanllama_lightning.runs.wandb_logger import RunLogger, check_mode, watch_command
from kanllama_lightning.types import InputError
from tests.conftest import Fit, only_run, terminate_at
from tests.wandb_file import history, opened

ROOT = Path(__file__).resolve().parents[1]


def pieces(run: Path) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)


@pytest.mark.slow
def test_a_continued_run_is_one_run(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pieces, one id; rows are numbered by tokens, so the second goes on behind the first."""
    terminate_at(monkeypatch, 13)
    given = {"model__tokens": "1280"}
    assert fit(**given) == 143
    assert fit("--ckpt_path=last", **given) == 0
    first, second = (history(piece)[0] for piece in pieces(only_run(tmp_path)))
    assert {piece.name for piece in pieces(only_run(tmp_path))} == {first_name(only_run(tmp_path))}
    steps = [[row["_step"] for row in rows] for rows in (first, second)]
    assert steps[0] == sorted(set(steps[0]))
    assert steps[1] == sorted(set(steps[1]))
    assert max(steps[0]) < min(steps[1])
    for row in (*first, *second):
        if "tokens" in row:
            assert row["_step"] == row["tokens"]
    last = second[-1]
    assert last["_step"] == 1280
    assert "a_main/l0" in last
    began = [opened(piece) for piece in pieces(only_run(tmp_path))]
    groups = {piece.run_group for piece in began}
    assert len(groups) == 1
    assert groups.pop().startswith("blocks.1.hook_mlp_out of tiny")


def first_name(run: Path) -> str:
    return f"run-{(run / 'wandb_id').read_text().strip()}.wandb"


@pytest.mark.parametrize("mode", ["ofline", "Online", "yes"])
def test_a_mode_that_there_is_not(
    fit: Fit, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", mode)
    assert fit() == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"WANDB_MODE={mode!r}" in said
    assert "online, offline and disabled" in said
    assert not (tmp_path / "runs").exists()


def test_modes_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("online", "offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert check_mode() == mode
    monkeypatch.setenv("WANDB_MODE", "")
    assert check_mode() is None
    monkeypatch.setenv("WANDB_MODE", "on")
    with pytest.raises(InputError, match="WANDB_MODE"):
        check_mode()


def test_wandb_does_not_advertise_beside_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A record loads `openai`, where W&B would say three lines of another product."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DISABLE_WEAVE", "")  # so that it is as before afterwards
    monkeypatch.delenv("WANDB_DISABLE_WEAVE")
    monkeypatch.setitem(sys.modules, "openai", sys)
    RunLogger(save_dir=str(tmp_path), name="x")
    init_weave_if_imported(None, "x")
    assert "weave" not in capsys.readouterr().err.lower()


@pytest.mark.parametrize(
    ("program", "command"), [("train", "fit --config kan"), ("evaluate", "report last")]
)
def test_the_service_of_a_process_that_ended_is_not_asked(
    program: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-/tmp/nowhere/socket")
    asked: list[bool] = []
    monkeypatch.setattr(
        f"kanllama_lightning.cli.{program}_command.main",
        lambda _: asked.append("WANDB_SERVICE" in os.environ) or 0,
    )
    assert getattr(main, program)(command.split()) == 0
    assert asked == [False]


FALLBACK = """
import sys
from docs import make_workspace
from kanllama_lightning.cli import main
from kanllama_lightning.runs.wandb_logger import RunLogger
run = RunLogger(save_dir=sys.argv[1], name="x", id="abcd1234").experiment
run.log({"a": 1})
run.finish()
sys.exit(0 if run.settings.mode == "offline" else 3)
"""


@pytest.mark.slow
def test_a_key_without_a_network(tmp_path: Path) -> None:
    """A made-up key, and a server at a closed port: the second start has the first one's id."""
    environment = {
        **os.environ, "WANDB_MODE": "online", "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
        "WANDB_BASE_URL": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    environment.pop("WANDB_SERVICE", None)  # of this process, where the id may be in use
    ran = subprocess.run(
        [sys.executable, "-c", FALLBACK, str(tmp_path)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "logging offline" in ran.stderr
    (piece,) = pieces(tmp_path)
    assert [row["a"] for row in history(piece)[0]] == [1]


def test_a_log_is_watched_where_there_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "offline-run-1"
    (folder / "files").mkdir(parents=True)
    run = SimpleNamespace(dir=str(folder / "files"))
    assert watch_command(run) is None
    (folder / "run-1.wandb").touch()
    assert watch_command(run) == f"wandb leet run {folder}"


def test_figures_go_by_their_titles() -> None:
    figure = go.Figure().update_layout(title="Latents&#x27; logits: <b>of</b> x")
    assert titled("losses_3", figure) == "losses_latents_logits_b_of_b_x"
    assert titled("losses_3", go.Figure()) == "losses_3"


@pytest.mark.parametrize(
    ("figure", "name"),
    [
        ("val/fvu", "a_main/fvu"),
        ("kan/val/fvu", "a_main/fvu/kan"),
        ("train/tokens_per_second", "a_main/tokens_per_second"),
        ("train/auxk", "b_train/auxk"),
        ("val/l0_p95", "c_sparsity/l0_p95"),
        ("val/delta_ce_low", "d_losses/delta_ce_low"),
        ("val/of_my_own", "e_latents/of_my_own"),
        ("kan/val/pile-10k/fvu", "f_other_sets/pile-10k/fvu/kan"),
        ("val/ce_set/fvu", "f_other_sets/ce_set/fvu"),
        ("kan/baseline/PCA/fvu", "g_controls/PCA/fvu/kan"),
        ("time/lm", "h_speed/lm"),
        ("val/ce_tokens", "i_debug/ce_tokens"),
        ("a/train/grad_norm", "i_debug/grad_norm/a"),
        ("tokens", "tokens"),
        ("mine/x", "mine/x"),
    ],
)
def test_figures_are_in_sections(figure: str, name: str) -> None:
    assert charted(figure) == name


def test_sections_sort_in_reading_order() -> None:
    titles = [titled_section(section) for section in SECTIONS]
    assert titles == sorted(titles)
    assert [title[0].isalpha() for title in titles] == [True] * len(titles)
    assert by_section({"epoch": 1, "val/a/ev": 0.5, "train/ev": 0.5, "lm": "x"}) == {"lm": "x"}


def test_the_web_workspace_shows_every_main_figure_of_every_head():
    patterns = make_workspace.main_charts()
    of_heads = [figure for figure in SECTIONS["main"] if "/" in figure]
    for figure in (*SECTIONS["main"], *(f"kan/{figure}" for figure in of_heads)):
        name = charted(figure)
        fitting = [title for title, pattern in patterns.items() if re.search(pattern, name)]
        assert fitting == [name.split("/")[1]]
    assert not [p for p in patterns.values() if re.search(p, "a_main/fvu_of_another")]


@pytest.mark.filterwarnings("ignore")
def test_the_web_workspace_is_made_of_charts():
    pytest.importorskip("wandb_workspaces")
    (first,) = make_workspace.workspace("team", "project").sections
    assert [chart.title for chart in first.panels] == [*make_workspace.main_charts()]


@pytest.mark.parametrize("args", [[], ["project"], ["a/b/c"], ["a/"], ["a", "b"]])
def test_whose_workspace_it_is(args, capsys):
    assert make_workspace.main(args) == 2
    assert "give TEAM/PROJECT" in capsys.readouterr().err


def test_tables_are_those_that_wandb_makes() -> None:
    frame = pd.DataFrame({
        "latent": range(4), "share": [math.nan, 0.5, 1.0, 2.5], "text": ["a", "nan", "", "<b>"],
        "curved": [True, False, True, True], "none": [math.nan] * 4,
    })  # fmt: skip
    for shown in (frame, frame.head(1), frame.head(0)):
        ours, theirs = table_of(shown), wandb.Table(dataframe=shown)
        said = [json.dumps(t._to_table_json(), default=lambda n: n.item()) for t in (ours, theirs)]
        assert said[0] == said[1]
        assert ours._column_types.to_json() == theirs._column_types.to_json()
