"""Heads side by side on SmolLM2: which run comes next, and what the table is of."""

import csv
import json
from pathlib import Path

import pytest

from benchmarks import compare_smollm2
from benchmarks.compare_heads import Cell
from benchmarks.compare_smollm2 import (
    DECIDING,
    EARLY,
    GRID,
    MIDDLE,
    RATE_SEED,
    STUDIES,
    Beside,
    main,
    member,
    rates_of,
    spec,
)
from kanllama_lightning.corpus import resolve
from kanllama_lightning.training.side_by_side import SideBySide
from kanllama_lightning.types import InputError
from tests.test_compare_heads import finish


def test_first_every_rate_then_a_run_per_seed(tmp_path: Path) -> None:
    study = DECIDING._replace(heads=("kan", "mlp"))
    beside = Beside(study, tmp_path)
    cells = beside.next_run()
    assert cells == [Cell(head, 32, lr, RATE_SEED) for head in ("kan", "mlp") for lr in GRID]
    for cell, fvu in zip(cells, (0.3, 0.1, 0.2, 0.3, 0.2, 0.1), strict=True):
        finish(beside, cell, fvu)
    # the best rate of the MLP is at the upper end: only that is tried on
    assert beside.next_run() == [Cell("mlp", 32, 2 * GRID[2], RATE_SEED)]
    finish(beside, beside.next_run()[0], 0.4)
    rates = {"kan": GRID[1], "mlp": GRID[2]}
    for seed in study.seeds:
        cells = beside.next_run()
        assert cells == [Cell(head, 32, rates[head], seed) for head in study.heads]
        for cell in cells:
            finish(beside, cell, 0.05)
    assert beside.next_run() == []


def test_the_early_place_takes_over_the_learning_rates(tmp_path: Path) -> None:
    heads = ("kan", "mlp")
    early = STUDIES[EARLY]._replace(heads=heads)
    assert early.hook_point != DECIDING.hook_point
    out = tmp_path / EARLY
    with pytest.raises(InputError, match="holds no study smollm2; train it first"):
        rates_of(early, out)
    middle = Beside(DECIDING._replace(heads=heads), tmp_path / MIDDLE)
    middle.out.mkdir()
    (middle.out / "study.json").write_text(json.dumps(middle.study._asdict()))
    for cell, fvu in zip(middle.next_run(), (0.3, 0.1, 0.2, 0.3, 0.1), strict=False):
        finish(middle, cell, fvu)
    with pytest.raises(InputError, match="--heads mlp: have no learning rate"):
        rates_of(early, out)
    finish(middle, middle.next_run()[0], 0.2)
    beside = Beside(early, out, rates_of(early, out))
    assert beside.next_run() == [Cell(head, 32, GRID[1], 0) for head in heads]
    with pytest.raises(InputError, match="--heads topk: not in the study smollm2"):
        rates_of(early._replace(heads=("topk", "kan")), out)
    with pytest.raises(InputError, match="--d_sae: 48 was asked for"):
        rates_of(early._replace(d_sae=48), out)


def test_every_head_can_stand_beside_the_others() -> None:
    heads = (*DECIDING.heads, "batch_topk@96", "kan:kan_args.spline_order=1,d_hidden=8")
    study = DECIDING._replace(d_sae=64)
    cells = [Cell(head, 32, 3e-3, 0) for head in heads]
    specs = {member(cell): spec(study, cell) for cell in cells}
    assert len(specs) == len(heads)
    together = SideBySide(d_model=16, heads=specs)
    widths = {name: head.d_sae for name, head in together.members.items()}
    assert widths[member(cells[-2])] == 96
    assert widths[member(cells[1])] > 64
    assert {found["lr"] for found in together.optimizers.values()} == {3e-3}
    assert specs[member(cells[-1])]["init_args"]["kan_args"] == {"spline_order": 1}


def test_mistakes_are_one_line(
    tmp_path: Path, tiny_lm_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: str) -> str:
        assert main([*args, "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    assert "train it first" in refused("table")
    assert "configs/nan.yaml" in refused("train", "--heads", "nan", "kan")
    assert "--heads kan@" in refused("train", "--heads", "kan@", "mlp")
    assert "at least two" in refused("train", "--heads", "kan")
    assert "--seeds 100" in refused("train", "--seeds", "100")
    assert "make smollm2" in refused("train", "--model", str(tmp_path / "none"))
    study = DECIDING._replace(model=str(tiny_lm_dir))
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2/study.json").write_text(json.dumps(study._asdict()))
    assert "5 was asked for" in refused("train", "--tokens", "5")
    place = ["--model", str(tiny_lm_dir), "--heads", *DECIDING.heads]
    said = refused("train", EARLY, *place, "--d_sae", "48")
    assert "48 was asked for" in said
    assert not (tmp_path / EARLY / "study.json").exists(), "nothing is begun"


@pytest.mark.slow
def test_the_whole_of_it_with_a_small_model(
    tmp_path: Path,
    tiny_lm_dir: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def write_text(out: Path) -> str:
        texts = [document.text for document in resolve(str(text_file)).once()]
        parts = {"train": texts[40:], "choose": texts[:20], "report": texts[20:40]}
        (out / "text").mkdir(parents=True)
        for name, own in parts.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in own)
            (out / f"text/{name}.jsonl").write_text(lines)
        return "sha256:"

    # the documentation takes longer to read than all the rest
    monkeypatch.setattr(compare_smollm2, "write_text", write_text)
    also = ["lm.untrained=true", "lm.bos=null", "model.start_tokens=512", "data.ctx_len=32"]
    also += ["model.buffer.capacity_tokens=2048", "model.sae_batch_tokens=256"]
    small = ["--tokens", "4096", "--rate_tokens", "2048", "--d_sae", "48", "--seeds", "0"]
    args = ["--model", str(tiny_lm_dir), "--hook_point", "model.layers.1.mlp", *small]
    args += ["--heads", "batch_topk", "wide_batch_topk", "--also", *also]
    shared = ["--out", str(tmp_path)]
    assert main(["train", *shared, *args, "--dirty"]) == 0
    out = tmp_path / "smollm2"
    assert (out / "rates-0/done").is_file()
    assert (out / "l0_32-seed_0/done").is_file()
    assert main(["table", *shared]) == 0
    said = capfd.readouterr().out
    assert "| 32 | wide_batch_topk | " in said
    with (out / "table.csv").open(newline="") as file:
        table = {row["head"]: row for row in csv.DictReader(file)}
    assert int(table["wide_batch_topk"]["parameters"]) > int(table["batch_topk"]["parameters"])
    assert float(table["batch_topk"]["fvu_low"]) < float(table["batch_topk"]["fvu"])
    cell = out / f"batch_topk-l0_32-lr_{float(table['batch_topk']['lr']):g}-seed_0"
    assert json.loads((cell / "cell.json").read_text())["seed"] == 0
    assert main(["train", *shared, "--dirty"]) == 0
    assert "train.py" not in capfd.readouterr().out, "what is finished is not made again"
