"""Comparing finished evaluations: numbers against NumPy, refusals, flags, seeds, pages."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from rich.console import Console

from kanllama_lightning import comparison
from kanllama_lightning.comparison import (
    Evaluated,
    conflicts,
    differences,
    figures,
    labelled,
    load,
    render,
    seed_table,
    table,
    write,
)
from kanllama_lightning.comparison.charts import _lines
from kanllama_lightning.pages.plots import LIBRARY
from kanllama_lightning.types import InputError

N_DOC = 40


def record(folder: Path, documents: int = N_DOC, level: float = 0.2, **about: Any) -> Path:
    """A finished evaluation of a head whose FVU and delta CE go with `level`."""
    l0, seed = about.pop("l0", 8.0), about.get("seed", 0)
    text = np.random.default_rng(0)  # the same documents for all runs
    tokens = text.integers(20, 200, documents)
    hard = text.uniform(0.7, 1.3, documents)
    clean, x2 = tokens * text.uniform(1.5, 2.5, documents), tokens * text.uniform(8, 12, documents)
    own = np.random.default_rng([seed, int(level * 1e6)]).normal(1, 0.02, (4, documents))
    frame = pd.DataFrame(
        {
            "set": "heldout",
            "document": range(documents),
            "n_tokens": tokens,
            "n_targets": tokens - 1,
            "l0": np.round(tokens * l0),
            "e2": x2 * level * hard * own[0],
            "x2": x2,
            "ce_clean": clean,
            "ce_recon": clean + tokens * level * hard * own[1],
            "ce_zero": clean + tokens * 4,
            "ce_mean": clean + tokens * 3,
            "kl_recon": tokens * level * hard * own[2],
            "kl_zero": tokens * 4,
            "kl_mean": tokens * 3,
        }
    )
    second = frame.head(documents // 2).assign(set="validation")
    values = {
        "head": "BatchTopK",
        "class_path": "kanllama_lightning.heads.batch_topk.BatchTopK",
        "lm": "tiny",
        "revision": None,
        "hook_point": "model.layers.1",
        "lm_dtype": "float32",
        "dtype": "float32",
        "d_model": 16,
        "d_sae": 64,
        "parameters": 2048,
        "train_tokens": 100_000,
        "train_finished": True,
        "scale": 1.5,
        "head_sha256": f"{folder.name}",
        "target_l0": 8,
        "seed": seed,
        "train_data": {"train": "stories", "ctx_len": 128},
        "train_tokens_per_second": 1234.5,
        "sets": {
            name: {"tokens": 5000, "documents": documents, "ids_sha256": name * 4}
            for name in ("heldout", "validation")
        },
        "sparsity/heldout/dead_frac": 0.125,
        "sparsity/heldout/dense_frac": 0.01,
        "latents/lens_kurtosis_median": 3.5,
        "concepts/recovered_frac": min(1.0, level),
    }
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "summary.json").write_text(json.dumps(values | about))
    pd.concat([frame, second]).to_csv(folder / "eval" / "documents.csv", index=False)
    return folder


def kan(folder: Path, **about: Any) -> Path:
    return record(folder, **{"head": "KAN", "class_path": "kan.KAN", "parameters": 2100} | about)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [record(tmp_path / "topk", level=0.2), kan(tmp_path / "kan", level=0.15, l0=8.1)]


@pytest.fixture
def seeded(tmp_path: Path) -> list[Path]:
    """Two heads, three seeds each, at L0 8; one of them also at 16."""
    return [
        *(record(tmp_path / f"topk-{s}", level=0.2 + s / 1000, seed=s) for s in range(3)),
        *(kan(tmp_path / f"kan-{s}", level=0.15 + s / 1000, seed=s) for s in range(3)),
        kan(tmp_path / "kan-wide", level=0.1, seed=0, target_l0=16, l0=16.0),
    ]


def printed(runs: list[Evaluated], flags: list[str]) -> str:
    out = io.StringIO()
    Console(width=160, file=out).print(render(runs, flags))
    return out.getvalue()


def drawn(documents: int, resamples: int = 2000) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(documents, (resamples, documents), generator=generator).numpy()


def test_table_equals_numpy(pair: list[Path]) -> None:
    rows = table(load(pair))
    assert [(r["set"], r["run"]) for r in rows] == [
        ("heldout", "topk"),
        ("heldout", "kan"),
        ("validation", "topk"),
        ("validation", "kan"),
    ]
    for row, folder in zip(rows[:2], pair, strict=True):
        d = pd.read_csv(folder / "eval" / "documents.csv").query("set == 'heldout'")
        n = d["n_targets"].sum()
        assert row["fvu"] == pytest.approx(d["e2"].sum() / d["x2"].sum())
        assert row["delta_ce"] == pytest.approx((d["ce_recon"] - d["ce_clean"]).sum() / n)
        assert row["kl"] == pytest.approx(d["kl_recon"].sum() / n)
        assert row["l0"] == pytest.approx(d["l0"].sum() / d["n_tokens"].sum())
        zero = (d["ce_zero"] - d["ce_recon"]).sum() / (d["ce_zero"] - d["ce_clean"]).sum()
        assert row["ce_score"] == pytest.approx(zero)
        share = (d["ce_recon"] - d["ce_clean"]).sum() / (d["ce_mean"] - d["ce_clean"]).sum()
        assert row["delta_ce_share"] == pytest.approx(share)
        e2, x2 = d["e2"].to_numpy(), d["x2"].to_numpy()
        ratios = [e2[i].sum() / x2[i].sum() for i in drawn(N_DOC)]
        low, high = np.quantile(ratios, [0.025, 0.975])
        assert (row["fvu_low"], row["fvu_high"]) == pytest.approx((low, high), rel=1e-9)
    first = rows[0]
    assert (first["dead_frac"], first["lens_kurtosis_median"], first["sae_kept_frac"]) == (
        0.125,
        3.5,
        None,
    )
    assert rows[2]["dead_frac"] is None  # of the other set, it was not measured
    assert (first["documents"], rows[2]["documents"]) == (N_DOC, N_DOC // 2)


def test_differences_are_paired(pair: list[Path]) -> None:
    rows = differences(load(pair))
    assert [r["quantity"] for r in rows] == ["fvu", "delta_ce", "kl"]
    frames = [pd.read_csv(p / "eval" / "documents.csv").query("set == 'heldout'") for p in pair]
    e2, x2 = (np.stack([f[c].to_numpy() for f in frames], 1) for c in ("e2", "x2"))
    ratios = np.array([e2[i].sum(0) / x2[i].sum(0) for i in drawn(N_DOC)])
    low, high = np.quantile(ratios[:, 0] - ratios[:, 1], [0.025, 0.975])
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((low, high), rel=1e-9)
    assert rows[0]["difference"] == pytest.approx(rows[0]["value_a"] - rows[0]["value_b"])
    assert {r["verdict"] for r in rows} == {"kan lower"}
    assert {r["covers"] for r in rows} == {"documents"}


def test_verdicts(tmp_path: Path) -> None:
    runs = load(
        [
            record(tmp_path / "one", level=0.2),
            record(tmp_path / "two", level=0.2, seed=1, train_tokens=5),
            record(tmp_path / "low", level=0.1),
            record(tmp_path / "far", level=0.1, l0=9.0),
        ]
    )
    found = {(r["a"], r["b"], r["quantity"]): r["verdict"] for r in differences(runs)}
    assert found["one", "two", "delta_ce"] == "no difference shown"
    assert found["one", "low", "fvu"] == "low lower"
    assert ("one", "far", "fvu") not in found  # L0 8 and 9
    assert any((r["a"], r["b"]) == ("one", "far") for r in differences(runs, tolerance=0.2))


def test_unequal_sparsity_is_corrected_along_a_measured_slope(tmp_path: Path) -> None:
    """kan at L0 8.4 and 10 gives the slope; topk, at 8, has none and stays where it is."""
    near, ahead, other = (tmp_path / name for name in ("near", "ahead", "other"))
    folders = [record(other, level=0.2), kan(near, level=0.18, l0=8.4)]
    assert differences(load(folders)) == [], "5 % apart, and nothing to correct along"
    folders.append(kan(ahead, level=0.1, l0=10.0, target_l0=10, seed=1))
    rows = [r for r in differences(load(folders)) if (r["a"], r["b"]) == ("other", "near")]
    assert {r["matching"] for r in rows} == {
        "near moved from L0 8.40 to 8.00 along its slope to 10.00"
    }
    frames = [pd.read_csv(f / "eval/documents.csv").query("set == 'heldout'") for f in folders]
    e2, x2 = (np.stack([f[c].to_numpy() for f in frames], 1) for c in ("e2", "x2"))
    l0 = [f["l0"].sum() / f["n_tokens"].sum() for f in frames]
    share = (l0[0] - l0[1]) / (l0[2] - l0[1])

    def corrected(fvu: np.ndarray) -> float:
        return float(fvu[0] - (fvu[1] + share * (fvu[2] - fvu[1])))

    assert rows[0]["difference"] == pytest.approx(corrected(e2.sum(0) / x2.sum(0)))
    drawn_ = [corrected(e2[i].sum(0) / x2[i].sum(0)) for i in drawn(N_DOC)]
    ends = np.quantile(drawn_, [0.025, 0.975])
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx(tuple(ends), rel=1e-6)
    far = kan(tmp_path / "far", level=0.15, l0=9.2, seed=2, target_l0=9)
    found = {(r["a"], r["b"]) for r in differences(load([*folders, far]))}
    assert ("other", "far") not in found, "15 % apart is too far for a correction"


def test_heads_of_unknown_training_are_no_points_of_one_curve(tmp_path: Path) -> None:
    """Two imported SAEs of one class: neither gives the other a slope, nor is its seed."""
    unknown = {"train_tokens": None, "train_data": None}
    folders = [record(tmp_path / "ours", level=0.2)]
    folders += [kan(tmp_path / "theirs", level=0.2, l0=8.0, **unknown)]
    folders += [kan(tmp_path / "peer", level=0.1, l0=8.4, **unknown)]
    runs = load(folders)
    assert {(r["a"], r["b"]) for r in differences(runs)} == {("ours", "theirs")}
    assert not any("they are not counted as seeds" in said for said in conflicts(runs))
    assert len(comparison.seeds(runs)) == 3
    assert {name: len(groups) for name, groups in _lines(runs, table(runs)).items()} == {
        "BatchTopK": 1, "KAN": 1, "KAN, peer": 1
    }  # fmt: skip


def test_a_head_at_two_sparsities_is_not_moved_onto_itself(tmp_path: Path) -> None:
    """The slope between the two would make their difference 0."""
    near, ahead, far = (tmp_path / name for name in ("near", "ahead", "far"))
    folders = [kan(near, level=0.2, l0=8.0), kan(ahead, level=0.1, l0=8.4, target_l0=9)]
    assert differences(load(folders)) == []
    folders.append(kan(far, level=0.05, l0=10.0, target_l0=10))
    rows = [r for r in differences(load(folders)) if (r["a"], r["b"]) == ("near", "ahead")]
    assert all(row["matching"].endswith("slope to 10.00") for row in rows)
    assert all(row["difference"] > 0 for row in rows)


def test_seeds_are_grouped(seeded: list[Path]) -> None:
    runs = load(seeded)
    groups = comparison.seeds(runs)
    assert [[r.label for r in g.runs] for g in groups] == [
        ["topk-0", "topk-1", "topk-2"],
        ["kan-0", "kan-1", "kan-2"],
        ["kan-wide"],
    ]
    rows = seed_table(runs)
    fvus = [r["fvu"] for r in table(runs)[:3]]
    assert rows[0]["fvu"] == pytest.approx(np.mean(fvus))
    half = scipy.stats.t.ppf(0.975, 2) * np.std(fvus, ddof=1) / 3**0.5
    assert rows[0]["fvu_low"] < np.mean(fvus) - half  # it covers the documents as well
    assert rows[0]["fvu_high"] > np.mean(fvus) + half
    assert rows[0]["seeds"] == 3
    pairs = differences(runs)
    means = [r for r in pairs if r["level"] == "seeds"]
    assert [(r["seeds_a"], r["seeds_b"]) for r in means] == [(3, 3)] * 3
    assert {r["covers"] for r in means} == {"documents and seeds"}
    assert means[0]["difference"] == pytest.approx(rows[0]["fvu"] - rows[1]["fvu"])
    assert means[0]["verdict"] == f"{groups[1].label} lower"
    alone = next(r for r in pairs if (r["a"], r["b"]) == ("topk-0", "kan-0"))
    assert means[0]["high"] - means[0]["low"] > alone["high"] - alone["low"]


def test_runs_of_one_seed_are_no_seeds(tmp_path: Path) -> None:
    runs = load([record(tmp_path / n, level=v) for n, v in (("fast", 0.2), ("slow", 0.3))])
    assert [len(g.runs) for g in comparison.seeds(runs)] == [1, 1]
    assert any("not counted as seeds" in flag for flag in conflicts(runs))
    assert seed_table(runs) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lm", "other", "different LM: tiny (topk); other (kan)"),
        ("revision", "abc", "revision of the LM"),
        ("hook_point", "model.layers.0", "hook point"),
        ("d_model", 32, "d_model: 16 (topk); 32 (kan)"),
        ("dtype", "bfloat16", "number format"),
        (
            "sets",
            {"heldout": {"tokens": 1, "documents": N_DOC, "ids_sha256": "f" * 64}},
            "tokens evaluated on",
        ),
    ],
)
def test_what_is_not_like_for_like_is_refused(
    tmp_path: Path, key: str, value: Any, said: str
) -> None:
    runs = load([record(tmp_path / "topk"), kan(tmp_path / "kan", **{key: value})])
    with pytest.raises(InputError, match="not like for like.*--force") as error:
        conflicts(runs)
    assert said in str(error.value)
    assert any(f.startswith("Not comparable: different") for f in conflicts(runs, force=True))
    if key == "sets":
        write(tmp_path / "out", runs, conflicts(runs, force=True))
        verdicts = {r["verdict"] for r in differences(runs)}
        assert verdicts == {"not comparable: different documents"}


def test_another_original_loss_is_refused(tmp_path: Path) -> None:
    folders = [record(tmp_path / "topk"), kan(tmp_path / "kan"), kan(tmp_path / "few")]
    for folder, change in ((folders[1], 0.05), (folders[2], None)):
        path = folder / "eval" / "documents.csv"
        frame = pd.read_csv(path)
        if change is None:
            frame = frame.drop(index=0)
        else:
            frame.loc[3, "ce_clean"] += change
        frame.to_csv(path, index=False)
    with pytest.raises(InputError, match="original loss of the LM on the same documents"):
        conflicts(load(folders[:2]))
    with pytest.raises(InputError, match=r"documents with losses \(40 for topk, 39 for few\)"):
        conflicts(load([folders[0], folders[2]]))


def test_rounding_of_the_lm_is_none_of_that(tmp_path: Path) -> None:
    folders = [record(tmp_path / "topk"), kan(tmp_path / "kan")]
    path = folders[1] / "eval" / "documents.csv"
    frame = pd.read_csv(path)
    frame["ce_clean"] += 1e-6 * frame["n_targets"]
    frame.to_csv(path, index=False)
    assert conflicts(load(folders)) == []


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (
            {"train_data": {"train": "news", "ctx_len": 128}},
            'Different training data: {"train": "stories"} (topk); {"train": "news"} (kan).',
        ),
        (
            {"train_data": None},
            'Different training data: {"train": "stories"} (topk); unknown (kan).',
        ),
        ({"train_tokens": 50_000}, "Different token budget: 100,000 (topk); 50,000 (kan)."),
        ({"d_sae": 128}, "Different width d_sae: 64 (topk); 128 (kan)."),
        ({"parameters": 2300}, "more than 10% apart"),
        ({"scale": 1.6}, "Different normalisation scale: 1.5 (topk); 1.6 (kan); more than 2%"),
        ({"lm_dtype": "bfloat16"}, "LM dtype in training"),
        ({"train_finished": False}, "Kan is unfinished: it stopped after 100,000 tokens."),
        ({"train_tokens": 0}, "Kan is untrained."),
        ({"head_sha256": "topk"}, "very same head"),
    ],
)
def test_flags(tmp_path: Path, about: dict[str, Any], said: str) -> None:
    runs = load([record(tmp_path / "topk"), kan(tmp_path / "kan", **about)])
    assert any(said in flag for flag in conflicts(runs)), conflicts(runs)


def test_alike_runs_have_no_flags(pair: list[Path]) -> None:
    assert conflicts(load(pair)) == []


def test_other_positions_are_flagged(pair: list[Path]) -> None:
    path = pair[1] / "eval" / "documents.csv"
    frame = pd.read_csv(path)
    frame.loc[0, "n_tokens"] -= 1
    frame.to_csv(path, index=False)
    assert any("number of activations counted in heldout" in f for f in conflicts(load(pair)))


def test_labels_are_what_distinguishes(tmp_path: Path) -> None:
    def labels(*places: str) -> list[str]:
        return [r.label for r in load([record(tmp_path / p, seed=i) for i, p in enumerate(places)])]

    assert labels("kan-lr_0.01-seed_0", "topk-lr_0.01-seed_0") == ["kan", "topk"]
    assert labels("a/kan-seed_0", "a/topk-fast-seed_0") == ["kan", "topk-fast"]
    assert labels("b/kan/run", "b/topk/run") == ["kan", "topk"]
    assert labels("run-1", "run-2") == ["run-1", "run-2"]  # bare numbers say nothing
    assert labels("c/x", "c/x/y") == [str(tmp_path / "c/x"), str(tmp_path / "c/x/y")]


def test_labels_can_be_given(tmp_path: Path, pair: list[Path]) -> None:
    odd = record(tmp_path / "lr=1")
    given = labelled([f"Linear={pair[0]}", str(pair[1]), str(odd)])
    assert given == [("Linear", pair[0]), (None, pair[1]), (None, odd)]
    names, folders = zip(*given, strict=True)
    assert [run.label for run in load(folders, names)] == ["Linear", "kan", "lr=1"]
    for bad in ("=x", "x="):
        with pytest.raises(InputError, match="LABEL=FOLDER"):
            labelled([bad])
    with pytest.raises(InputError, match="LABEL='kan'.*more than once"):
        load(pair, ["kan", "kan"])


def test_what_cannot_be_read_is_named(tmp_path: Path, pair: list[Path]) -> None:
    with pytest.raises(InputError, match="at least two runs"):
        load(pair[:1])
    with pytest.raises(InputError, match="more than once"):
        load([pair[0], pair[0]])
    with pytest.raises(InputError, match=r"eval/summary.json; run `python evaluate.py report"):
        load([pair[0], tmp_path / "none"])
    (pair[1] / "eval" / "documents.csv").write_text("set,document\nheldout,0\n")
    with pytest.raises(InputError, match="is damaged"):
        load(pair)
    (pair[1] / "eval" / "documents.csv").unlink()
    with pytest.raises(InputError, match=r"documents.csv \(losses\); run `python"):
        load(pair)


def test_files(tmp_path: Path, seeded: list[Path]) -> None:
    runs = load(seeded)
    written = write(tmp_path / "out", runs, conflicts(runs))
    assert [p.name for p in written] == [
        "comparison.csv",
        "differences.csv",
        "seeds.csv",
        "loss_against_sparsity.svg",
        "reconstruction_against_sparsity.svg",
        "dead_latents.svg",
        "concepts_against_sparsity.svg",
        "reconstruction_against_size.svg",
        "comparison.md",
        "comparison.tex",
        "comparison.html",
    ]
    there = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {p.name for p in there} == {p.name for p in written} | {LIBRARY}
    frame = pd.read_csv(written[0])
    assert frame["fvu"].tolist() == [row["fvu"] for row in table(runs)]
    assert list(pd.read_csv(written[1]).columns) == list(comparison.PAIR)
    html = written[-1].read_text()
    assert "Run by run" in html
    assert "KAN, 64 latents, L0 8 (3 seeds)" in html
    before = written[1].read_bytes()
    write(tmp_path / "out", load(seeded))
    assert written[1].read_bytes() == before


def test_no_pair_at_matched_l0(tmp_path: Path) -> None:
    runs = load([record(tmp_path / "topk"), kan(tmp_path / "kan", l0=80.0)])
    written = write(tmp_path / "out", runs)
    assert pd.read_csv(written[1]).empty
    assert "No two runs have the same L0" in written[-1].read_text()
    losses = figures(runs)[0]
    assert losses.layout.xaxis.type is None  # 8 to 80 is a decade, not more
    assert losses.layout.title.text == "Loss against sparsity"


def test_figures_are_logarithmic_over_a_decade(tmp_path: Path) -> None:
    runs = load([record(tmp_path / "topk", level=0.02), kan(tmp_path / "kan", l0=90.0, level=0.3)])
    loss = figures(runs)[0]
    assert (loss.layout.xaxis.type, loss.layout.yaxis.type) == ("log", "log")
    assert [t.name for t in loss.data] == ["BatchTopK", "KAN"]
    row = table(runs)[0]
    assert loss.data[0].error_y.array[0] == pytest.approx(row["delta_ce_high"] - row["delta_ce"])


def test_lines_go_through_means_over_seeds(seeded: list[Path]) -> None:
    loss = figures(load(seeded))[0]
    line = next(t for t in loss.data if t.mode == "lines")
    assert len(line.x) == 2  # L0 8 (three seeds) and 16
    assert line.legendgroup == "1"


def test_hostile_labels_are_escaped(tmp_path: Path, pair: list[Path]) -> None:
    bad = "<script>alert(1)</script>[red]"
    runs = load(pair, [bad, "kan"])
    runs[1].summary["head"] = "<img src=x>"
    runs[1].summary["train_data"] = {"train": "<b>"}
    flags = conflicts(runs)
    html = write(tmp_path / "out", runs, flags)[-1].read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert "<img src=x>" not in html
    assert "<b>" not in html.split("</script>", 1)[1].split("<script", 1)[0]
    assert "[red]" in printed(runs, flags)


def test_terminal(seeded: list[Path]) -> None:
    text = printed(load(seeded), ["Different seeds."])
    assert "95 % intervals over 40 documents" in text
    assert "b lower" in text
    assert "- Different seeds." in text


def test_a_document_alone_has_no_interval(tmp_path: Path) -> None:
    folders = [record(tmp_path / "topk", documents=2), kan(tmp_path / "kan", documents=2)]
    runs = load(folders)
    rows = [r for r in table(runs) if r["set"] == "validation"]  # half of the documents: one
    assert rows[0]["documents"] == 1
    assert rows[0]["fvu_low"] is None
    assert not math.isnan(rows[0]["fvu"])
    write(tmp_path / "out", runs)
