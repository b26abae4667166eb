"""The one command of the study: its reduced form against its golden table, and its mistakes."""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare_heads, compare_smollm2, finetune, study
from tests.test_golden import CLOSE, GOLDEN, HERE

KEPT = ("l0", "bits_per_token", "fvu", "delta_ce", "parameters")
ELSEWHERE = 0.3
"""As far as another kind of CPU may move a figure: it may choose another learning rate."""


def given(model: Path, text: Path, out: Path) -> list[str]:
    also = ["lm.untrained=true", "model.start_tokens=512", "model.buffer.capacity_tokens=2048"]
    also += ["data.ctx_len=32", "data.val_tokens=512", "model.sae_batch_tokens=256"]
    args = ["--model", str(model), "--text", str(text), "--hook_point", "model.layers.1.mlp"]
    return [*args, "--out", str(out), "--small", "--dirty", "--also", *also]


def read(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_reduced_form_reproduces_its_golden_table(
    tmp_path: Path,
    text_file: Path,
    tiny_lm_dir: Path,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    args = [*given(tiny_lm_dir, text_file, tmp_path), "--only", "stories", "ladder"]
    assert study.main(args) == 0
    said = capfd.readouterr().out
    table = {row["head"]: row for row in read(tmp_path / "stories/table.csv")}
    got = {head: {key: float(row[key]) for key in KEPT} for head, row in table.items()}
    path = GOLDEN / "study.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps({"made_on": HERE, "heads": got}, indent=1) + "\n")
    want = json.loads(path.read_text())
    rel, near = (CLOSE, 1e-7) if want["made_on"] == HERE else (ELSEWHERE, 0.02)
    assert got.keys() == want["heads"].keys()
    for head, values in got.items():
        assert values == pytest.approx(want["heads"][head], rel=rel, abs=near), head
    for part in ("stories", "ladder"):
        page = (tmp_path / f"{part}.md").read_text()
        assert page in said
        assert page.count("\n|") > 3
        assert f"\n{part}: " in said[said.rindex(".md") :]
    assert said.count("exit 0") >= 8
    assert "exit 2" not in said
    assert "| mlp | batch_topk |" in said
    linear, mlp = table["batch_topk"], table["mlp"]
    name = f"mlp-l0_4-lr_{float(mlp['lr']):g}-seed_0"
    summary = json.loads((tmp_path / f"stories/{name}/summary.json").read_text())
    assert summary["val/report/fvu"] > 0
    assert float(mlp["fvu_low"]) < float(mlp["fvu"]) < float(mlp["fvu_high"])
    assert int(mlp["parameters"]) > int(linear["parameters"])
    assert "seeds 0, 1" in said
    about = json.loads((tmp_path / f"stories/{name}/cell.json").read_text())
    assert mlp["commit"] == about["commit"]
    rows = read(tmp_path / "stories/differences.csv")
    pairs = {(row["head"], row["rival"], row["quantity"]): row for row in rows}
    there, back = pairs["mlp", "batch_topk", "fvu"], pairs["batch_topk", "mlp", "fvu"]
    assert float(there["difference"]) == pytest.approx(float(mlp["fvu"]) - float(linear["fvu"]))
    assert float(there["low"]) == pytest.approx(-float(back["high"]))
    assert there["covers"] == "documents and seeds"
    assert there["p"] == there["p_holm"] == back["p"], "one pair, there both ways round"
    assert compare_heads.main(["train", "stories", "--out", str(tmp_path), "--dirty"]) == 0
    assert "exit" not in capfd.readouterr().out, "a finished cell is not run again"


def test_what_a_part_took_is_that_of_its_cells(tmp_path: Path) -> None:
    for name, took in (("a", 60.0), ("b", 30.0)):
        (tmp_path / "stories" / name).mkdir(parents=True)
        (tmp_path / "stories" / name / "cell.json").write_text(json.dumps({"seconds": took}))
    assert study.seconds(tmp_path, "stories") == 90
    assert study.seconds(tmp_path, "decay") == 0


@pytest.mark.parametrize("part", study.PARTS)
def test_every_part_is_a_command_that_is_understood(
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the programs themselves read it."""
    monkeypatch.chdir(tmp_path)  # where nothing has fetched a model
    if part == "ladder":
        (tmp_path / "stories").mkdir()
        row = "head,target_l0,lr\nkan,8,0.012\nbatch_topk,8,0.024\n"
        (tmp_path / "stories/table.csv").write_text(row)
        (tmp_path / "stories/study.json").write_text(json.dumps({"seeds": [0, 1]}))
    settings = argparse.Namespace(out=tmp_path, workers=2, small=False, hook_point=None, also=None)
    settings.model, settings.text, settings.dirty = "no", str(tmp_path / "no.jsonl"), False
    program, *args = study.command(settings, part, "train")
    if part in study.OF_ENCODERS:
        runs = [str(tmp_path / f"stories/batch_topk-l0_8-lr_0.024-seed_{s}") for s in (0, 1)]
        assert part != "ladder" or args[2:4] == runs
        assert program.endswith("encoders.py")
    else:
        benchmark: Any = {"finetune": finetune, **dict.fromkeys(study.OF_SMOLLM2, compare_smollm2)}
        benchmark = benchmark.get(part, compare_heads)
        assert program.endswith(f"{benchmark.__name__.rpartition('.')[2]}.py")
        assert benchmark.main(args) == 2
        expected = "holds no study" if part == "finetune" else "no such f"
        assert expected in capsys.readouterr().err


def test_mistakes_are_one_line(
    tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = given(tmp_path / "no", text_file, tmp_path / "out")
    assert study.main([*args, "--only", "decay"]) == 2
    assert "--only decay: with --small there are stories, ladder" in capfd.readouterr().err
    assert study.main([*args, "--only", "ladder"]) == 2
    assert "make the part stories first" in capfd.readouterr().err


@pytest.mark.slow
def test_a_part_that_fails_stops_the_study(
    tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert study.main(given(tmp_path / "no", text_file, tmp_path / "out")) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "no such folder" in lines[0]
    assert "part stories ended with exit code 2" in lines[1]
    assert not (tmp_path / "out/stories.md").exists()
