"""The comparison of heads: what is run, in which order, and what the table says."""

import json
from pathlib import Path

import pytest

from benchmarks.compare_heads import (
    HEADS,
    RATES,
    RECORD,
    SEEDS,
    STUDIES,
    Cell,
    table,
    wanted,
)
from kanllama_lightning.heads import BatchTopK

OTHERS = {"base", "embedded", "multi_gpu", "side_by_side"}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def finish(out: Path, cell: Cell, fvu: float) -> None:
    """As if the cell had been run."""
    folder = out / cell.name
    summary = {"val/fvu": fvu, "val/delta_ce": 2 * fvu, "val/ce_score": 1 - fvu}
    summary |= {"val/l0": float(cell.k), "val/dead_frac": 0.0, "tokens_per_second": 1000.0}
    BatchTopK(8, 32, cell.k).save(folder / "head")
    (folder / "summary.json").write_text(json.dumps(summary))


def test_every_head_with_a_config_is_compared() -> None:
    configured = {p.stem for p in CONFIGS.glob("*.yaml")} - OTHERS
    assert set(HEADS) == configured
    assert set(HEADS) < set(STUDIES["stories"].heads)


def test_first_the_rates_then_the_seeds_and_sparsities(tmp_path: Path) -> None:
    study = STUDIES["stories"]
    cells = wanted("stories", tmp_path)
    assert {c.seed for c in cells} == {SEEDS[0]}
    assert len(cells) == (len(study.heads) - len(RECORD)) * len(RATES) + len(RECORD)
    fvus = dict(zip(RATES, (0.3, 0.1, 0.2, 0.4), strict=True))
    for head in ("kan", "topk"):
        for lr, fvu in fvus.items():
            finish(tmp_path, Cell(head, study.sparsities[0], lr, SEEDS[0]), fvu)
    later = [c for c in wanted("stories", tmp_path) if c.head in ("kan", "topk")]
    assert {c.lr for c in later} == {RATES[1]}
    assert {(c.k, c.seed) for c in later if c.head == "kan"} == {
        (8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (16, 0), (16, 1), (16, 2),
    }  # fmt: skip
    assert {(c.k, c.seed) for c in later if c.head == "topk"} == {(8, 1), (8, 2), (16, 0)}


def test_a_finished_cell_is_not_run_again(tmp_path: Path) -> None:
    cell = wanted("stories", tmp_path)[0]
    finish(tmp_path, cell, 0.1)
    assert cell not in wanted("stories", tmp_path)


def test_the_table_has_means_and_ranges(tmp_path: Path) -> None:
    for lr in RATES:
        finish(tmp_path, Cell("kan", 8, lr, 0), 0.1 if lr == RATES[0] else 0.5)
    for seed, fvu in ((1, 0.2), (2, 0.3)):
        finish(tmp_path, Cell("kan", 8, RATES[0], seed), fvu)
    [row] = table("stories", tmp_path)
    assert (row["head"], row["target_l0"], row["lr"], row["seeds"]) == ("kan", 8, RATES[0], 3)
    assert row["fvu"] == pytest.approx(0.2)
    assert (row["fvu_min"], row["fvu_max"]) == (0.1, 0.3)
    assert row["parameters"] == BatchTopK(8, 32, 8).n_parameters()
    # the encoder product and the sparse decoding; b_dec costs next to nothing
    assert row["flops_per_token"] == pytest.approx(2 * 8 * 32 + 2 * 8 * 8, rel=0.01)
