"""CE-Bench against a plain NumPy reading of its formulas."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.measures.contrast_scores import contrast_scores, permuted
from kanllama_lightning.prompts.pairs import ENGLISH, OPPOSITES, PAIRS, load_pairs, world_pairs
from kanllama_lightning.prompts.text_ids import seen_by, text_ids
from kanllama_lightning.reports.ce_bench_report import SCORES, CeBenchReport
from kanllama_lightning.reports.report import EvalRun
from kanllama_lightning.types import InputError
from tests.reports.test_capability import started_head

SUBJECTS = ["a", "a", "b", "c", "b"]


def plain(v1, v2, tokens, subjects, legacy=False):
    """Word for word: loops over pairs and subjects."""

    def z(a):
        std = a.std(ddof=1)
        return (a - a.mean()) / (std if std else 1)

    both = [(n[0] * a + n[1] * b) / sum(n) for a, b, n in zip(v1, v2, tokens, strict=True)]
    found = []
    for i, subject in enumerate(subjects):
        others = [
            np.mean([x for x, s in zip(both, subjects, strict=True) if s == name], axis=0)
            for name in sorted(set(subjects) - {subject})
        ]
        centre = 0 if legacy else np.mean(others, axis=0)
        apart, alone = np.abs(v1[i] - v2[i]), np.abs(both[i] - centre)
        found.append([z(apart).max(), z(alone).max(), z(apart + alone).max()])
    return np.array(found).T


@pytest.mark.parametrize("legacy", [False, True])
def test_scores_are_those_of_plain_numpy(legacy):
    rng = np.random.default_rng(0)
    v1, v2 = (np.maximum(rng.normal(size=(5, 40)), 0) for _ in range(2))
    v2[3] = v1[3]  # nothing apart: every deviation is 0
    tokens = rng.integers(3, 50, size=(5, 2))
    args = (torch.tensor(v1), torch.tensor(v2), torch.tensor(tokens), SUBJECTS)
    got = contrast_scores(*args, legacy=legacy)
    want = plain(v1, v2, tokens, SUBJECTS, legacy)
    assert torch.stack(got).numpy() == pytest.approx(want)
    assert got.contrastive[3] == 0
    assert max(s.max() for s in got) <= 39 / math.sqrt(40)


def test_one_latent_that_tells_a_pair_apart_reaches_the_bound():
    v1 = torch.zeros(2, 100)
    v1[0, 7] = 3
    got = contrast_scores(v1, torch.zeros(2, 100), torch.ones(2, 2, dtype=torch.int64), ["a", "b"])
    assert got.contrastive.tolist() == pytest.approx([99 / math.sqrt(100), 0])
    with pytest.raises(ValueError, match="two or more"):
        contrast_scores(v1, v1, torch.ones(2, 2, dtype=torch.int64), ["a", "a"])


def test_the_null_keeps_each_storys_values_and_mixes_them_independently():
    means = torch.arange(50.0).expand(4, 50)
    mixed = permuted(means, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.sort(1).values, means)
    assert len({tuple(row) for row in mixed.tolist()}) == 4


def test_shipped_pairs():
    english, world = load_pairs(ENGLISH), world_pairs()
    assert len(english) == 20
    assert len(world) == PAIRS * len(OPPOSITES)
    for pairs in (english, world):
        texts = [text for pair in pairs for text in pair[1:]]
        assert len(set(texts)) == len(texts)
        assert len({pair.subject for pair in pairs}) >= 8


def test_the_report_is_of_the_latents_of_every_token_but_bos(make_lm, tmp_path):
    lm = make_lm()
    head = started_head(lm)
    rows = [
        {
            "subject_title": subject,
            "story1": f"w{i} w3 w9 w{2 * i}",
            "story2": f"<subject>w7</subject> w{i}",
        }
        for i, subject in enumerate(SUBJECTS, start=11)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    run = EvalRun(tmp_path, head, lm, {}, [], tmp_path)
    report = CeBenchReport(pairs=str(path), permutations=3)
    report.begin(run)
    figures = report.finish(run)
    table = pd.read_csv(tmp_path / "ce_bench.csv")
    means, tokens, fired = [], [], 0
    for row in rows:
        for key in ("story1", "story2"):
            text = row[key].replace("<subject>", "").replace("</subject>", "")
            ids = text_ids(lm, text, "text")
            z = head(lm.acts(torch.tensor([[0, *ids]]))[0, 1:]).codes.dense().detach().numpy()
            means.append(z.mean(0))
            tokens.append(len(ids))
            fired += int((z != 0).sum())
    want = plain(
        np.array(means[::2], float), np.array(means[1::2], float),
        np.array(tokens).reshape(-1, 2), SUBJECTS,
    )  # fmt: skip
    for name, values in zip(SCORES, want, strict=True):
        assert table[name].to_numpy() == pytest.approx(values, rel=1e-4)
        assert figures[name] == pytest.approx(values.mean(), rel=1e-4)
        assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]
        assert figures[f"{name}_null"] == pytest.approx(table[f"{name}_null"].mean())
    assert figures["l0"] == pytest.approx(fired / sum(tokens))
    assert (figures["n_pairs"], figures["n_subjects"]) == (5, 3)
    assert seen_by(head, lm, [[0, 5]]).mask.tolist() == [[False, True]]
    assert (tmp_path / "ce_bench.html").is_file()


@pytest.mark.parametrize(("name", "n"), [("embedded", 24), (None, 20)])
def test_the_lm_chooses_the_pairs(make_lm, tmp_path, name, n):
    lm = FrozenLM(name, "model.layers.1.mlp").load_() if name else make_lm()
    report = CeBenchReport()
    report.begin(EvalRun(tmp_path, started_head(lm), lm, {}, [], tmp_path))
    assert len(report._pairs) == n
    reason = report.applies(EvalRun(tmp_path, started_head(lm), lm, {}, [], tmp_path))
    assert (reason is None) == (name == "embedded")  # the other knows no English


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1: .*no valid JSON"),
        ('{"story1": "a", "subject": "b"}', "line 1: lacks story2"),
        ('{"story1": " ", "story2": "a", "subject": "b"}', "story1=' ' must be a text"),
        ('{"story1": "c", "story2": "a", "subject": "b"}', "fewer than two subjects"),
        ("", "holds 0 pairs"),
    ],
)
def test_bad_files_are_named(tmp_path, line, reason):
    path = tmp_path / "mine.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=reason):
        load_pairs(path)
    with pytest.raises(InputError, match=r"ce_bench.pairs=.*none.jsonl: is missing"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="ce_bench.permutations=0"):
        CeBenchReport(permutations=0)
