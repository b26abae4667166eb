"""The comparison of heads: what is run, in which order, and what the tables say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import compare_heads
from benchmarks.compare_heads import (
    RATES,
    SHARES,
    STUDIES,
    Cell,
    Comparison,
    Study,
    arguments,
    main,
    named,
    split_text,
)
from kanllama_lightning import heads
from kanllama_lightning.corpus import resolve
from kanllama_lightning.heads import BatchTopK, BentDictionary, CurvedDictionary, SAEHead

ROOT = Path(__file__).resolve().parents[1]
STORIES = STUDIES["stories"]


def finish(comparison: Comparison, cell: Cell, fvu: float, l0: float | None = None) -> None:
    """As if the cell had been run; an infinite FVU: as if it had failed."""
    folder = comparison.out / cell.name
    folder.mkdir(parents=True)
    failed = fvu == float("inf")
    about = {**cell._asdict(), "commit": "abc", "exit": 2 if failed else 0}
    (folder / "cell.json").write_text(json.dumps(about))
    summary = {"val/choose/fvu": fvu, "val/report/l0": cell.k if l0 is None else l0}
    if not failed:
        (folder / "summary.json").write_text(json.dumps(summary))


def tried(comparison: Comparison, head: str, fvu: dict[float, float]) -> list[float]:
    """Learning rates that are asked for one after the other, if each has this FVU."""
    asked: list[float] = []
    while missing := comparison.missing_rates(head):
        asked += missing
        for lr in missing:
            finish(comparison, Cell(head, 8, lr, 0), fvu[round(lr, 6)])
    return asked


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return Comparison(STORIES, tmp_path)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_head_of_a_study_can_be_made(study: Study) -> None:
    for head in study.heads:
        kind = named(head)
        config = yaml.safe_load((ROOT / f"configs/{kind.config}.yaml").read_text())
        class_path = config["model"]["head"]["class_path"]
        nested: dict[str, Any] = {}
        for setting in kind.settings:
            *path, last = setting.partition("=")[0].split(".")
            inside = nested
            for name in path:
                inside = inside.setdefault(name, {})
            inside[last] = yaml.safe_load(setting.partition("=")[2])
        getattr(heads, class_path)(
            d_model=64, d_sae=int(kind.width or study.d_sae), target_l0=8, **nested
        )
    assert set(study.rivals) <= set(study.heads)


def test_a_bend_has_a_rival_of_its_size() -> None:
    """Within a latent's worth of parameters."""
    bend = BentDictionary(d_model=64, d_sae=512, target_l0=8)
    flat = BatchTopK(d_model=64, d_sae=798, target_l0=8)
    sizes = [sum(p.numel() for p in head.parameters()) for head in (bend, flat)]
    assert abs(sizes[0] - sizes[1]) < 2 * 64


def test_settings_and_width_are_part_of_a_name(tmp_path: Path) -> None:
    cell = Cell("kan@96:kan_args.spline_order=1,d_hidden=8", 8, 6e-3, 0)
    args = arguments(STORIES, cell, tmp_path)
    assert f"{ROOT}/configs/kan.yaml" in args
    assert "--model.head.d_sae=96" in args
    assert args[-2:] == ["--model.head.kan_args.spline_order=1", "--model.head.d_hidden=8"]
    assert cell.name not in {Cell("kan@96", 8, 6e-3, 0).name, Cell("kan", 8, 6e-3, 0).name}


def test_first_the_rates_then_the_seeds(comparison: Comparison) -> None:
    cells = comparison.wanted()
    assert {(c.seed, c.k) for c in cells} == {(0, 8)}
    assert [c.lr for c in cells if c.head == "kan"] == list(RATES)
    for lr, fvu in zip(RATES, (0.3, 0.1, 0.2), strict=True):
        finish(comparison, Cell("kan", 8, lr, 0), fvu)
    assert comparison.rate("kan") == (RATES[1], True)
    later = [c for c in comparison.wanted() if c.head == "kan"]
    assert later == [Cell("kan", 8, RATES[1], seed) for seed in (1, 2)]


def test_a_rate_at_which_another_seed_collapses_is_not_taken(comparison: Comparison) -> None:
    for lr, fvu in zip(RATES, (0.3, 0.1, 0.2), strict=True):
        finish(comparison, Cell("kan", 8, lr, 0), fvu)
    assert comparison.rate("kan") == (RATES[1], True)
    finish(comparison, Cell("kan", 8, RATES[1], comparison.study.seeds[1]), 0.8)
    assert comparison.collapsed("kan", RATES[1]) == {comparison.study.seeds[1]: 0.8}
    # the best that is left is now at the upper end, so that one further rate is tried
    assert comparison.missing_rates("kan") == [2 * RATES[2]]
    finish(comparison, Cell("kan", 8, 2 * RATES[2], 0), 0.4)
    assert comparison.rate("kan") == (RATES[2], True)
    assert {cell.lr for cell in comparison.finals("kan", 8)} == {RATES[2]}


def test_the_grid_grows_on_the_side_of_the_best(comparison: Comparison) -> None:
    falling = {0.006: 0.5, 0.012: 0.4, 0.024: 0.3, 0.048: 0.2, 0.096: 0.25}
    assert tried(comparison, "kan", falling) == pytest.approx([0.006, 0.012, 0.024, 0.048, 0.096])
    assert comparison.rate("kan") == (pytest.approx(0.048), True)
    rising = {0.0015: 0.3, 0.003: 0.2, 0.006: 0.25, 0.012: 0.4, 0.024: float("nan")}
    assert tried(comparison, "mlp", rising) == pytest.approx([0.006, 0.012, 0.024, 0.003, 0.0015])
    assert comparison.rate("mlp") == (pytest.approx(0.003), True)


def test_a_rate_that_stays_at_the_edge_is_told(comparison: Comparison) -> None:
    falling = {round(RATES[0] * 2.0**i, 6): 1 / (2 + i) for i in range(10)}
    assert len(tried(comparison, "kan", falling)) == len(RATES) + compare_heads.EXTENSIONS
    best, bracketed = comparison.rate("kan") or (0, True)
    assert (best, bracketed) == (pytest.approx(0.384), False)
    assert "0.384, is at the edge" in compare_heads.edge(comparison, "kan")


def test_a_run_that_came_to_nothing_is_the_worst_and_is_tried_again(
    comparison: Comparison,
) -> None:
    broken = {0.006: 0.2, 0.012: 0.1, 0.024: float("inf")}
    tried(comparison, "kan", broken)
    assert comparison.rate("kan") == (0.012, True)
    comparison.forget_failures()
    assert comparison.missing_rates("kan") == [0.024]


def test_the_slope_is_measured_where_l0_misses_its_target(comparison: Comparison) -> None:
    for head, l0 in (("kan", 8.3), ("mlp", 8.05)):
        for lr, fvu in zip(RATES, (0.3, 0.1, 0.2), strict=True):
            finish(comparison, Cell(head, 8, lr, 0), fvu, l0)
        for seed in (1, 2):
            finish(comparison, Cell(head, 8, RATES[1], seed), 0.1, l0)
    found = [c for c in comparison.wanted() if c.head in ("kan", "mlp")]
    assert found == [Cell("kan", 10, RATES[1], 0)]


def test_pairs_are_corrected_for_how_many_there_are() -> None:
    """Each once, whichever way round; quantities apart."""

    def row(head: str, rival: str, k: int, p: float | None, quantity: str = "fvu") -> Any:
        own = {"target_l0": k, "head": head, "rival": rival, "quantity": quantity, "p": p}
        ends = {"difference": -0.1, "low": -0.2, "high": -0.01, "rival_value": 1.0}
        return own | ends | {"l0": 8, "rival_l0": 8, "matching": "matched"}

    rows = [row("a", "b", 8, 0.02), row("b", "a", 8, 0.02), row("a", "b", 16, 0.03)]
    rows += [row("a", "c", 8, 0.001), row("a", "b", 8, 0.04, "delta_ce"), row("b", "c", 8, None)]
    compare_heads.correct(rows)
    assert [r["p_holm"] for r in rows[:5]] == pytest.approx([0.06, 0.06, 0.06, 0.004, 0.04])
    assert rows[5]["p_holm"] is None
    said = [line[3] for line in compare_heads._pair_lines(rows)]
    assert [s.endswith("no difference shown)") for s in said] == [True, True, True, False, True]


def test_parts_of_the_text_share_no_document(tmp_path: Path, text_file: Path) -> None:
    twice = tmp_path / "twice.jsonl"
    twice.write_text(text_file.read_text() * 2)
    study = STORIES._replace(text=str(twice))
    split_text(study, tmp_path)
    parts = {
        name: {d.text for d in resolve(str(tmp_path / "text" / f"{name}.jsonl")).once()}
        for name in SHARES
    }
    whole = {d.text for d in resolve(str(text_file)).once()}
    assert set.union(*parts.values()) == whole
    assert sum(map(len, parts.values())) == len(whole)
    for name, share in SHARES.items():
        assert len(parts[name]) / len(whole) == pytest.approx(share, abs=0.06)


def test_a_cell_reads_the_parts_as_what_they_are(tmp_path: Path) -> None:
    args = arguments(STORIES, Cell("batch_topk@2544", 8, 6e-3, 1), tmp_path)
    assert f"--data.train={tmp_path / 'text/train.jsonl'}" in args
    val = [str(tmp_path / f"text/{name}.jsonl") for name in ("choose", "report")]
    assert f"--data.val={json.dumps(val)}" in args
    assert "--model.head.d_sae=2544" in args
    assert "--seed_everything=1" in args


def started(head: SAEHead) -> tuple[SAEHead, torch.Tensor]:
    """A head as it is after the start statistics, calibrated, and activations."""
    x = torch.randn(2048, head.d_model, generator=torch.Generator().manual_seed(0)) + 0.5
    head.start_(x)
    head.calibrate_(x)
    return head.eval(), x


@pytest.mark.parametrize(("kind", "planes"), [(BatchTopK, 1), (CurvedDictionary, 9)])
def test_operations_are_those_of_the_latents_that_fire(
    tmp_path: Path, kind: type[SAEHead], planes: int
) -> None:
    """A curve costs as many rows as it has planes; a denser batch costs more."""
    head, x = started(kind(d_model=32, d_sae=64, target_l0=6))
    head.save(tmp_path / "head")
    for rows in (x, 3 * x[:500]):
        l0 = float(head(rows).codes.l0().double().mean())
        expected = 2 * 32 * 64 + l0 * planes * 2 * 32
        assert compare_heads.operations(tmp_path, rows) == pytest.approx(expected, rel=1e-6)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_mistakes_are_one_line(
    tmp_path: Path,
    text_file: Path,
    tiny_lm_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = ["--out", str(tmp_path / "out"), "--text", str(text_file), "--model", str(tiny_lm_dir)]
    assert "train it first" in refused(capsys, "table", "stories", "--out", str(tmp_path))
    assert "no such file" in refused(capsys, "train", "stories", "--text", str(tmp_path / "no"))
    assert "configs/nan.yaml" in refused(
        capsys, "train", "stories", *there, "--heads", "kan", "nan"
    )
    for wrong in ("kan:", "kan:order", "kan@", "kan@x:a=1"):
        assert f"--heads {wrong}" in refused(capsys, "train", "stories", *there, "--heads", wrong)
    assert "--rivals mlp" in refused(
        capsys, "train", "stories", *there, "--heads", "kan", "topk", "--rivals", "mlp"
    )
    assert "at least 1" in refused(capsys, "train", "stories", *there, "--tokens", "0")
    monkeypatch.setattr(compare_heads, "commit", lambda: "abc-dirty")
    assert "--dirty" in refused(capsys, "train", "stories", *there)
    assert "200 was asked for" in refused(capsys, "train", "stories", *there, "--tokens", "200")
    monkeypatch.setattr(compare_heads, "commit", lambda: "def")
    finish(Comparison(STORIES, tmp_path / "out/stories"), Cell("kan", 8, 6e-3, 0), 0.1)
    assert "--mixed" in refused(capsys, "train", "stories", *there)
